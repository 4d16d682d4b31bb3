"""The in-house engine holds fp8 as it comes, and computes with what its values and scales stand for."""

import pytest
import torch
from safetensors.torch import load_file

from services.common.errors import ConfigError, InvalidArgumentError
from services.common.fp8 import dequantise
from services.common.model_files import SCALE_SUFFIX, fp8_weights
from services.rollout.engines.torch_engine.checkpoint import load_checkpoint, read_tensors
from services.rollout.engines.torch_engine.decoder_config import read_config
from services.rollout.engines.torch_engine.parameters import Parameters
from services.rollout.layout import ModelLayout
from services.trainer.weights.form import EngineForm
from services.trainer.weights.snapshot import build_manifest
from tests.kit.fp8_reference import write_fp8_model
from tests.kit.tiny_model import build_tiny_qwen3

CPU = torch.device("cpu")
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path):
    return write_fp8_model(build_tiny_qwen3(tmp_path / "fp8", hidden=80, num_attention_heads=6))


def empty(path):
    return Parameters(read_config(path), torch.float32, CPU, fp8_weights(path))


def test_it_computes_with_the_weights_that_values_and_scales_stand_for(model):
    parameters, tensors = empty(model), load_file(model / "model.safetensors")
    load_checkpoint(model, parameters)
    assert parameters.names == tensors.keys()
    gate_up = [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up")]
    expected = [dequantise(tensors[name], tensors[name + SCALE_SUFFIX], torch.float32) for name in gate_up]
    assert torch.equal(parameters.layers[1].gate_up, torch.cat(expected))


@pytest.mark.parametrize("first", ["values", "scales"])
def test_values_and_scales_may_come_in_different_buckets_in_any_order(model, first):
    whole, parts = empty(model), empty(model)
    tensors = load_file(model / "model.safetensors")
    whole.load(tensors)
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(SCALE_SUFFIX)}
    values = {name: tensor for name, tensor in tensors.items() if name not in scales}
    for part in (values, scales) if first == "values" else (scales, values):
        parts.load(part)
    assert parts.checksums() == whole.checksums()
    assert torch.equal(parts.layers[1].gate_up, whole.layers[1].gate_up)


def test_a_plain_directory_is_no_update_of_it(model, tmp_path):
    plain = build_tiny_qwen3(tmp_path / "plain", hidden=80, num_attention_heads=6)
    with pytest.raises(InvalidArgumentError, match=r"missing: .*scale_inv"):
        read_tensors(plain, empty(model))
    with pytest.raises(InvalidArgumentError, match="not a tensor"):
        read_tensors(model, Parameters(read_config(plain), torch.float32, CPU))


def test_another_quantisation_is_refused(tmp_path):
    directory = write_fp8_model(build_tiny_qwen3(tmp_path), quant_method="gptq")
    with pytest.raises(ConfigError, match="quant_method = 'gptq'"):
        read_config(directory)


def test_a_manifest_has_to_bring_each_weight_in_the_dtype_that_the_engine_has(model):
    form, layout = EngineForm.of_directory(model), ModelLayout.of_directory(model, "bfloat16")
    weights = {
        name: tensor.to(torch.bfloat16)
        for name, tensor in load_file(model / "model.safetensors").items()
        if not name.endswith(SCALE_SUFFIX)
    }
    layout.check(build_manifest(weights, 100_000, form))
    with pytest.raises(InvalidArgumentError, match=rf"{UP}{SCALE_SUFFIX}: not sent"):
        layout.check(build_manifest(weights, 100_000, EngineForm(form.names, form.fp8 - {UP})))
    fp32 = weights | {"model.norm.weight": weights["model.norm.weight"].float()}
    with pytest.raises(InvalidArgumentError, match=r"model.norm.weight: dtype float32, the engine's is bfloat16"):
        layout.check(build_manifest(fp32, 100_000, form))
    manifest = build_manifest(weights, 100_000, form)
    for spec in (spec for bucket in manifest.buckets for spec in bucket.tensors):
        if spec.name == UP:
            spec.dtype = "uint8"
    manifest.layout_digest = "another"
    with pytest.raises(InvalidArgumentError, match=f"{UP}: dtype uint8, the engine's is float8_e4m3fn"):
        layout.check(manifest)
