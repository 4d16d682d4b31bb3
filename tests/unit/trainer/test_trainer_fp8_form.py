"""What the trainer makes of an engines' directory in fp8: what it starts from, and what it pushes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from services.common.config import Config
from services.common.errors import ConfigError, TrainingDivergedError
from services.common.fp8 import dequantise
from services.common.model_files import SCALE_SUFFIX, fp8_weights
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.weights.form import EngineForm
from services.trainer.weights.quantise import FP8
from services.trainer.weights.snapshot import Snapshot, build_manifest
from tests.kit.fp8_reference import quantise_reference, write_fp8_model
from tests.kit.tiny_model import build_tiny_qwen3

CPU = torch.device("cpu")


@pytest.fixture
def fp8_model(tmp_path):
    """Of ragged shapes: projections of 64, 192, 80 and 240 rows and columns."""
    return write_fp8_model(build_tiny_qwen3(tmp_path / "fp8", hidden=80, num_attention_heads=6))


def filled(weights, form, bucket_bytes=1 << 20):
    snapshot = Snapshot(build_manifest(weights, bucket_bytes, form), CPU, form)
    snapshot.fill(weights.items())
    return snapshot


def test_projections_travel_in_fp8_and_the_rest_as_it_is_trained(fp8_model):
    form = EngineForm.of_directory(fp8_model)
    trained = TorchBackend(Config(model={"hf_checkpoint": fp8_model})).weights()
    snapshot = filled(trained, form, bucket_bytes=50_000)
    specs = {spec.name: spec for bucket in snapshot.manifest.buckets for spec in bucket.tensors}
    assert specs.keys() == load_file(fp8_model / "model.safetensors").keys()
    assert len(form.fp8) == 14
    for name, weight in trained.items():
        if name not in form.fp8:
            assert specs[name].dtype == "float32"
            assert torch.equal(snapshot.views[name], weight)
            continue
        codes, scales = quantise_reference(weight.numpy())
        assert (specs[name].dtype, specs[name + SCALE_SUFFIX].dtype) == ("float8_e4m3fn", "float32")
        assert np.array_equal(snapshot.views[name].view(torch.uint8).numpy(), codes)
        assert np.array_equal(snapshot.views[name + SCALE_SUFFIX].numpy(), scales)


def test_what_was_stored_comes_back_when_nothing_was_trained(fp8_model):
    """The largest value of a block stands for itself, so that its scale is found again."""
    form = EngineForm.of_directory(fp8_model)
    snapshot = filled(TorchBackend(Config(model={"hf_checkpoint": fp8_model})).weights(), form)
    for name, tensor in load_file(fp8_model / "model.safetensors").items():
        again = snapshot.views[name]
        if name.endswith(SCALE_SUFFIX):
            assert torch.allclose(again, tensor, rtol=1e-6, atol=0)
        else:
            assert torch.equal(again.float(), tensor.float())


def test_experts_travel_by_themselves_as_transformers_exports_them(tmp_path):
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        moe_intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path)
    exported = load_file(tmp_path / "model.safetensors")
    weights = dict(model.state_dict())
    plain = dict(EngineForm.of_directory(tmp_path).named(weights.items()))
    assert plain.keys() == exported.keys()
    assert all(torch.equal(plain[name], tensor) for name, tensor in exported.items())
    write_fp8_model(tmp_path)
    form = EngineForm.of_directory(tmp_path)
    snapshot = filled(weights, form)
    stored = load_file(tmp_path / "model.safetensors")
    assert snapshot.views.keys() == stored.keys()
    assert sum(".experts." in name for name in form.fp8) == 2 * 4 * 3
    assert "model.layers.0.mlp.gate.weight" not in form.fp8
    for name, tensor in stored.items():
        assert torch.equal(snapshot.views[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_pushed(fp8_model, bad):
    form = EngineForm.of_directory(fp8_model)
    weights = {
        name: tensor.clone()
        for name, tensor in TorchBackend(Config(model={"hf_checkpoint": fp8_model})).weights().items()
    }
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 3] = bad
    with pytest.raises(TrainingDivergedError, match=name):
        filled(weights, form)


def test_training_begins_with_what_the_engines_weights_stand_for(fp8_model):
    backend = TorchBackend(Config(model={"hf_checkpoint": fp8_model, "dtype": "bfloat16"}))
    stored = load_file(fp8_model / "model.safetensors")
    for name, tensor in backend.weights().items():
        expected = stored[name].bfloat16()
        if name + SCALE_SUFFIX in stored:
            expected = dequantise(stored[name], stored[name + SCALE_SUFFIX], torch.bfloat16)
        assert torch.equal(tensor, expected)


def test_or_with_the_plain_directory_that_is_named_beside_it(fp8_model, tmp_path):
    plain = build_tiny_qwen3(tmp_path / "plain", seed=1, hidden=80, num_attention_heads=6)
    backend = TorchBackend(Config(model={"hf_checkpoint": fp8_model, "ref_checkpoint": plain}))
    assert torch.equal(
        backend.weights()["model.norm.weight"], load_file(plain / "model.safetensors")["model.norm.weight"]
    )
    # Beside a plain directory it is the reference alone.
    other = build_tiny_qwen3(tmp_path / "other", seed=2, hidden=80, num_attention_heads=6)
    backend = TorchBackend(Config(model={"hf_checkpoint": other, "ref_checkpoint": plain}))
    assert torch.equal(
        backend.weights()["model.norm.weight"], load_file(other / "model.safetensors")["model.norm.weight"]
    )


def test_what_is_exported_at_the_end_is_plain(fp8_model, tmp_path):
    backend = TorchBackend(Config(model={"hf_checkpoint": fp8_model}))
    backend.save_pretrained(tmp_path / "hf")
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    assert fp8_weights(tmp_path / "hf") == frozenset()
    again = Qwen3ForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(again.model.norm.weight, backend.weights()["model.norm.weight"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"quant_method": "gptq"}, "quant_method = 'gptq'"),
        ({"weight_block_size": [1, 32]}, r"weight_block_size = \[1, 32\]"),
        ({"weight_block_size": None}, "weight_block_size = None"),
        ({"activation_scheme": "static"}, "activation_scheme = 'static'"),
        ({"scale_fmt": "ue8m0"}, "scale_fmt = 'ue8m0'"),
        ({"fmt": "e5m2"}, "fmt = 'e5m2'"),
    ],
)
def test_another_quantisation_is_refused_by_its_field(tmp_path, change, reason):
    directory = write_fp8_model(build_tiny_qwen3(tmp_path), **change)
    for use in (fp8_weights, lambda path: TorchBackend(Config(model={"hf_checkpoint": path}))):
        with pytest.raises(ConfigError, match=f"model.hf_checkpoint: .*{reason}"):
            use(directory)


def test_scales_that_do_not_fit_their_weight_are_refused_by_name(fp8_model):
    tensors = load_file(fp8_model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name + SCALE_SUFFIX] = torch.ones(1, 1)
    save_file(tensors, fp8_model / "model.safetensors")
    with pytest.raises(ConfigError, match=name):
        fp8_weights(fp8_model)
    assert tensors[name].dtype == FP8
