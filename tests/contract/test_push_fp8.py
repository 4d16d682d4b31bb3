"""Engines in block-wise fp8 under plain training: whatever way a version comes, an engine has what one would have that
loaded the exported directory."""

import os
import sys
from contextlib import asynccontextmanager

import pytest
import torch

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import rollout_pb2 as rpb
from services.common.config import Config, dump
from services.common.config.models import WeightsConfig
from services.common.versions import Version
from services.rollout.engines.client import EngineClient
from services.rollout.engines.launch import sglang_python
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.weights.channel import Channel
from services.trainer.weights.directory import VersionDirectories, write_version
from services.trainer.weights.disk import DiskChannel
from services.trainer.weights.form import EngineForm
from services.trainer.weights.snapshot import Snapshot, build_manifest
from tests.gpu.push_process import JsonProcess
from tests.kit.engine_process import SGLANG_WANTED
from tests.kit.fp8_reference import write_fp8_model
from tests.kit.sglang_fp8_python import fp8_python
from tests.kit.tiny_model import build_tiny_qwen3

CPU = torch.device("cpu")
WEIGHTS = {"backend": "gloo", "timeout_s": 60.0}
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


@asynccontextmanager
async def replica_of(kind, model, directory):
    """The receiving end with one engine: its address, and the way to its engine."""
    engine = {"kind": kind, "context_length": 128, "max_running_requests": 4, "start_timeout_s": 400.0}
    if kind == "sglang":
        plain = Config.model_validate({"rollout": {"engine": {"kind": "sglang"}}})
        engine["python"] = str(fp8_python(directory, sglang_python(plain.rollout.engine)))
    config = {
        "run": {"dir": str(directory / "run")},
        "model": {"hf_checkpoint": str(model), "dtype": "bfloat16"},
        "rollout": {"engine": engine},
        "trainer": {"weights": WEIGHTS},
    }
    (directory / "run" / "logs").mkdir(parents=True)
    file = directory / "replica.toml"
    file.write_text(dump(Config.model_validate(config)))
    environment = {"PYTHONPATH": f".{os.pathsep}protos", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.gpu.push_replica", str(file)]
    async with JsonProcess.running(command, environment) as process:
        where = await process.answer(400.0)
        async with EngineClient(where["url"], where["key"]) as client:
            yield where["address"], client


async def checksums(client):
    session = client._session
    async with session.post(client.url + "/weights_checker", json={"action": "checksum"}) as response:
        assert response.status == 200
        (rank,) = (await response.json())["ranks"]
        return rank["checksums"]


def channel_of(transport, address, model, directory):
    replica = pb.Replica(replica_id="rollout-0", address=address)
    common = replica, 0, 1, WeightsConfig(**WEIGHTS | {"backend": transport}), rpb.PAUSE_MODE_IN_PLACE
    if transport == "disk":
        return DiskChannel(*common, VersionDirectories(directory, model, keep_last=1))
    return Channel(*common)


async def push(transport, address, model, snapshots, directory, client, first):
    """The engine's checksums after each."""
    channel, seen = channel_of(transport, address, model, directory), []
    if not channel.joined:
        await channel.join(1)
    for number, snapshot in enumerate(snapshots, start=first):
        done = await channel.push(Version(1, number), snapshot)
        assert done.pause_s > 0
        assert done.effect["salt_race"] == 0
        seen.append(await checksums(client))
    await channel.leave()
    return seen


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
    async with replica_of(kind, exported[0], tmp_path) as (address, client):
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
