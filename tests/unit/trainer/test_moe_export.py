"""What leaves the trainer of a mixture of experts: exports, checkpoints turned into directories, pushes."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from services.common.config import Config
from services.common.errors import ConfigError
from services.common.versions import Version
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.batch.staleness import Clock
from services.trainer.checkpoint import CheckpointState, CheckpointStore
from services.trainer.convert import convert
from services.trainer.step import train_batch
from services.trainer.weights.form import EngineForm
from services.trainer.weights.snapshot import Snapshot, build_manifest
from tests.kit.fp8_reference import write_fp8_model
from tests.kit.hf_reference import load_reference
from tests.kit.tiny_model import build_tiny_mixtral, build_tiny_olmoe, build_tiny_qwen2_moe, build_tiny_qwen3_moe
from tests.kit.trainer_ragged import ragged_samples

CLOCK = Clock(Version(1, 0), {1: 0})
BUILDERS = {
    "qwen3_moe": build_tiny_qwen3_moe,
    "qwen2_moe": build_tiny_qwen2_moe,
    "mixtral": build_tiny_mixtral,
    "olmoe": build_tiny_olmoe,
}


def trained(directory, dtype="float32"):
    """A backend after one step that moves every weight."""
    config = Config(
        model={"hf_checkpoint": directory, "dtype": dtype}, trainer={"optimizer": {"lr": 1e-3, "weight_decay": 0.1}}
    )
    backend = TorchBackend(config)
    (result,) = train_batch(backend, ragged_samples(0), CLOCK, config)
    assert result.applied
    return backend


def stored(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def pushed(backend, form):
    snapshot = Snapshot(build_manifest(backend.layout, 5_000, form), torch.device("cpu"), form)
    snapshot.fill(backend.tensors())
    return snapshot.views


@pytest.mark.parametrize("name", BUILDERS)
def test_what_leaves_has_the_names_of_the_first_directory_and_equal_weights(tmp_path, name):
    """Experts one by one, as it was found and as engines take them."""
    original = BUILDERS[name](tmp_path / "original")
    backend = trained(original)
    backend.save_pretrained(tmp_path / "hf")
    exported, before = stored(tmp_path / "hf"), stored(original)
    assert exported.keys() == before.keys()
    assert all(not torch.equal(exported[key], before[key]) for key in before)
    store = CheckpointStore(tmp_path / "run", 1)
    state = CheckpointState(1, Version(1, 1), 1, str(original), "float32", "", None)
    store.save(state, backend.state(), store.temporary(1), backend.group.beside)
    convert(store.load_newest().directory, tmp_path / "converted")
    views = pushed(backend, EngineForm.of_directory(original))
    assert views.keys() == before.keys()
    converted = stored(tmp_path / "converted")
    for key, tensor in exported.items():
        assert torch.equal(converted[key], tensor), key
        assert torch.equal(views[key], tensor), key
    tokens = torch.from_numpy(np.random.default_rng(0).integers(3, 128, (1, 40)))
    exact = copy.deepcopy(backend.model).double()
    exact.set_attn_implementation("sdpa")
    exact.set_experts_implementation("eager")
    with torch.no_grad():
        expected = exact(tokens).logits
        for directory in (tmp_path / "hf", tmp_path / "converted"):
            assert torch.equal(load_reference(directory, torch.float64)(tokens).logits, expected)


def test_a_run_goes_on_from_what_it_exported(tmp_path):
    backend = trained(build_tiny_qwen3_moe(tmp_path / "m"), "bfloat16")
    backend.save_pretrained(tmp_path / "hf")
    again = TorchBackend(Config(model={"hf_checkpoint": tmp_path / "hf", "dtype": "bfloat16"}))
    assert all(torch.equal(tensor, again.weights()[name]) for name, tensor in backend.weights().items())


def test_experts_under_mixtrals_names_travel_in_fp8(tmp_path):
    directory = build_tiny_mixtral(tmp_path / "m")
    weights = TorchBackend(Config(model={"hf_checkpoint": directory})).weights()
    plain = stored(directory)
    write_fp8_model(directory, marks=(".w1.", ".w2.", ".w3.", "_proj"))
    form = EngineForm.of_directory(directory)
    assert sum(".experts." in name for name in form.fp8) == 2 * 5 * 3
    snapshot = Snapshot(build_manifest(weights, 5_000, form), torch.device("cpu"), form)
    snapshot.fill(weights.items())
    assert snapshot.views.keys() == stored(directory).keys() > plain.keys()
    for name, tensor in stored(directory).items():
        assert torch.equal(snapshot.views[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_experts_under_unknown_names_are_refused():
    weights = {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(2, 4, 4)}
    form = EngineForm(frozenset({"model.layers.0.mlp.experts.0.linear_fc1.weight"}))
    with pytest.raises(ConfigError, match=r"model\.hf_checkpoint: .*experts\.gate_up_proj"):
        build_manifest(weights, 5_000, form)
