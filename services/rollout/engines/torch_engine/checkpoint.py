"""Reads the weights of a Hugging Face directory: one safetensors file, or several behind an index."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from services.common.errors import ConfigError, InvalidArgumentError
from services.rollout.engines.torch_engine.parameters import Parameters

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_tensors(model_path: Path, parameters: Parameters) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint in memory, checked against the model.

    Raises ConfigError for files that cannot be read, InvalidArgumentError for a tensor that is unknown, missing or of
    another shape. Nothing is loaded into the model.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in _files(model_path):
        try:
            with safe_open(path, framework="pt") as file:
                # Old Llama exports carry this constant as a tensor.
                names = [name for name in file.keys() if not name.endswith("rotary_emb.inv_freq")]  # noqa: SIM118
                parameters.check(names, [file.get_slice(name).get_shape() for name in names])
                tensors.update({name: file.get_tensor(name) for name in names})
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"cannot be read: {error}", field=str(path)) from error
    parameters.check_complete(tensors)
    return tensors


def load_checkpoint(model_path: Path, parameters: Parameters) -> None:
    """Fills the model. Raises ConfigError or InvalidArgumentError as `read_tensors` does."""
    parameters.load(read_tensors(model_path, parameters))


def _files(model_path: Path) -> list[Path]:
    index = model_path / INDEX
    if not index.exists():
        return [model_path / SINGLE]
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"is not a safetensors index: {error}", field=str(index)) from error
    if not names or any(Path(name).name != name for name in names):
        raise InvalidArgumentError("names files outside its directory, or none", field=str(index))
    return [model_path / name for name in names]
