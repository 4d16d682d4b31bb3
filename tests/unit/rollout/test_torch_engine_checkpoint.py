"""Weights from files: strict, sharded or not, addressed by Hugging Face's names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.common.errors import ConfigError, InvalidArgumentError
from services.rollout.engines.torch_engine.checkpoint import load_checkpoint, read_tensors
from services.rollout.engines.torch_engine.decoder_config import read_config
from services.rollout.engines.torch_engine.parameters import Parameters
from tests.kit.tiny_model import build_tiny_llama, build_tiny_qwen3


def empty(path: Path) -> Parameters:
    return Parameters(read_config(path), torch.float32, torch.device("cpu"))


def test_every_tensor_lands_under_its_name(tmp_path: Path) -> None:
    path = build_tiny_qwen3(tmp_path)
    parameters = empty(path)
    load_checkpoint(path, parameters)
    tensors = load_file(path / "model.safetensors")
    assert parameters.names == set(tensors)
    copy = empty(path)
    copy.load(dict(reversed(tensors.items())))
    assert copy.checksums() == parameters.checksums()
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.self_attn.q_norm.weight"):
        other = empty(path)
        other.load(tensors | {name: tensors[name] + 1})
        changed = {key for key, value in other.checksums().items() if value != parameters.checksums()[key]}
        assert changed == {name}


def test_shards_behind_an_index(tmp_path: Path) -> None:
    path = build_tiny_llama(tmp_path)
    whole = empty(path)
    load_checkpoint(path, whole)
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "model.safetensors").unlink()
    sharded = empty(path)
    load_checkpoint(path, sharded)
    assert sharded.checksums() == whole.checksums()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "extra: is not a tensor of this model"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(65)}),
            r"model.norm.weight: has shape \[65\], the model's is \[64\]",
        ),
    ],
)
def test_wrong_checkpoints_are_refused_by_name(tmp_path: Path, change: object, reason: str) -> None:
    path = build_tiny_qwen3(tmp_path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(InvalidArgumentError, match=reason):
        read_tensors(path, empty(path))


def test_a_tied_head_may_be_written_twice_but_not_in_another_shape(tmp_path: Path) -> None:
    path = build_tiny_qwen3(tmp_path)
    tensors = load_file(path / "model.safetensors")
    parameters = empty(path)
    save_file(tensors | {"lm_head.weight": torch.zeros(128, 64)}, path / "model.safetensors")
    load_checkpoint(path, parameters)
    assert torch.equal(parameters.head, tensors["model.embed_tokens.weight"])
    save_file(tensors | {"lm_head.weight": torch.zeros(127, 64)}, path / "model.safetensors")
    with pytest.raises(InvalidArgumentError, match=r"lm_head\.weight"):
        load_checkpoint(path, parameters)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = build_tiny_qwen3(tmp_path)
    parameters = empty(path)
    (path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_checkpoint(path, parameters)
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_checkpoint(path, parameters)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(InvalidArgumentError, match="outside"):
        load_checkpoint(path, parameters)
