"""Engines in block-wise fp8 under plain training: whatever way a version comes, an engine has what one would have that
loaded the exported directory."""

import os

import pytest
import torch

from services.common.config import Config
from services.rollout.engines.launch import sglang_python
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.weights.directory import write_version
from services.trainer.weights.form import EngineForm
from services.trainer.weights.snapshot import Snapshot, build_manifest
from tests.kit.engine_process import SGLANG_WANTED
from tests.kit.fp8_reference import write_fp8_model
from tests.kit.pushed_engine import checksums, push, replica_of
from tests.kit.sglang_fp8_python import fp8_python
from tests.kit.tiny_model import build_tiny_qwen3

CPU = torch.device("cpu")
# Parts of SGLang's fused projections are whole blocks.
SHAPE = {"hidden": 256}


def snapshot_of(model, plain):
    """What is pushed of the plain model to an engine that has loaded `model`."""
    trained = TorchBackend(
        Config(model={"hf_checkpoint": model, "ref_checkpoint": plain, "dtype": "bfloat16"})
    ).weights()
    form = EngineForm.of_directory(model)
    # Values and scales in different buckets.
    snapshot = Snapshot(build_manifest(trained, 200_000, form), CPU, form)
    snapshot.fill(trained.items())
    return snapshot


@pytest.fixture
def models(tmp_path):
    """Three directories of one model with other weights: the engine's, in fp8, and two that are trained."""
    made = [build_tiny_qwen3(tmp_path / f"model-{seed}", seed=seed, **SHAPE) for seed in range(3)]
    return write_fp8_model(made[0]), *made[1:]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["torch", pytest.param("sglang", id="sglang")])
async def test_an_engine_has_after_a_push_what_one_has_that_loaded_the_exported_directory(kind, models, tmp_path):
    if kind == "sglang" and not os.environ.get(SGLANG_WANTED):
        pytest.skip("make conformance")
    model, first, second = models
    snapshots = [snapshot_of(model, first), snapshot_of(model, second)]
    exported = [tmp_path / "exported-first", tmp_path / "exported-second"]
    for directory, snapshot in zip(exported, snapshots, strict=True):
        write_version(directory, snapshot, model)
    python = None
    if kind == "sglang":
        plain = Config.model_validate({"rollout": {"engine": {"kind": "sglang"}}})
        python = fp8_python(tmp_path, sglang_python(plain.rollout.engine))
    async with replica_of(kind, exported[0], tmp_path, "bfloat16", python) as (address, client):
        loaded = await checksums(client)
        for number, transport in enumerate(("gloo", "disk")):
            other, own = await push(
                transport, address, model, snapshots[::-1], tmp_path / "versions", client, first=1 + 2 * number
            )
            assert own == loaded, transport
            assert {name for name in own if "_proj.weight" in name and own[name] == other[name]} == set()
        # Loaded again, in the engine's own way.
        await client.update_from_disk(str(exported[1]), version="e1.s9", timeout_s=60.0)
        assert await checksums(client) == other
