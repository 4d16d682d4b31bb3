"""The transport `ipc`: a replica's engine reads the trainer's memory. Real processes, the protocol's own channel."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.common.config import Config, dump
from services.common.errors import UnavailableError
from services.common.shared_directory import clear_shared_directory, shared_directory
from services.common.weight_memory import SharedFile, open_file
from services.rollout.engines.client import EngineClient
from services.trainer.weights.shared import SharedMemory
from services.trainer.weights.snapshot import Snapshot, build_manifest
from tests.gpu.push_link import Link
from tests.gpu.push_process import JsonProcess
from tests.kit.engine_process import ROOT, SGLANG_WANTED
from tests.kit.tiny_model import build_tiny_qwen3

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one shape."""
    directory = tmp_path_factory.mktemp("models")
    return build_tiny_qwen3(directory / "first", seed=0), build_tiny_qwen3(directory / "second", seed=1)


class Pushing:
    def __init__(self, link: Link, run_dir: Path, where: dict[str, str]) -> None:
        self.link, self.run_dir, self.where = link, run_dir, where

    def snapshot(self, model: Path) -> Snapshot:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        weights = {name: parameter.detach() for name, parameter in loaded.named_parameters()}
        # Several buckets.
        manifest = build_manifest(weights, 1 << 17)
        assert len(manifest.buckets) > 1
        snapshot = Snapshot(manifest, CPU, memory=SharedMemory(shared_directory(self.run_dir), CPU))
        snapshot.fill(weights.items())
        return snapshot


@asynccontextmanager
async def replica_of(model: Path, directory: Path, kind: str) -> AsyncIterator[Pushing]:
    """A replica of one engine that has loaded `model`."""
    run_dir = directory / "run"
    config = {
        "run": {"dir": str(run_dir)},
        "model": {"hf_checkpoint": str(model)},
        "rollout": {"engine": {"kind": kind, "context_length": 128, "max_running_requests": 4}},
        "trainer": {"weights": {"backend": "ipc", "timeout_s": 20.0}},
    }
    (run_dir / "logs").mkdir(parents=True)
    file = directory / "run.toml"
    file.write_text(dump(Config.model_validate(config)))
    command = [sys.executable, "-m", "tests.gpu.push_replica", str(file)]
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'protos'}"}
    try:
        async with JsonProcess.running(command, environment) as process:
            where = await process.answer(280.0)
            async with EngineClient(where["url"], where["key"]) as client:
                yield Pushing(Link(process, where["address"], client, "ipc", 20.0), run_dir, where)
    finally:
        clear_shared_directory(run_dir)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["torch", "sglang"])
async def test_the_engine_has_the_weights_of_one_that_loaded_the_directory(
    models: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    if kind == "sglang" and not os.environ.get(SGLANG_WANTED):
        pytest.skip("make conformance")
    first, second = models
    async with replica_of(first, tmp_path, kind) as pushing:
        link = pushing.link
        own = await link.checksum()
        await link.client.begin_update()
        await link.client.update_from_disk(str(second), version="e1.s0", timeout_s=60.0)
        await link.client.end_update()
        expected = await link.checksum()
        assert own != expected
        await link.join("in_place")
        # Thrice: the first time copies are recorded, then the buckets are elsewhere, then they are where they were.
        snapshots = [pushing.snapshot(second), pushing.snapshot(first)]
        for snapshot, checksum in ((snapshots[0], expected), (snapshots[1], own), (snapshots[0], expected)):
            pushed = await link.push(snapshot)
            assert await link.checksum() == checksum
            assert pushed.requests_aborted == 0
        # What the trainer no longer shares is refused before the pause, or before the model is touched.
        snapshots[1].close()
        with pytest.raises(UnavailableError):
            await link.push(snapshots[1])
        assert await link.checksum() == expected
        await link.leave()
        snapshots[0].close()
        assert list(shared_directory(pushing.run_dir).iterdir()) == []


@pytest.mark.timeout(120)
async def test_only_buckets_of_the_run_are_read(models: tuple[Path, Path], tmp_path: Path) -> None:
    async with replica_of(models[0], tmp_path, "torch") as pushing, aiohttp.ClientSession() as session:
        before = await pushing.link.checksum()
        outside = tmp_path / "bucket-0123456789abcdef"
        outside.write_bytes(bytes(8))
        directory = shared_directory(pushing.run_dir)
        directory.mkdir(mode=0o700, exist_ok=True)
        (directory / outside.name).symlink_to(outside)
        names = ["../run.toml", str(outside), outside.name, "bucket-ffffffffffffffff", ""]
        headers = {"Authorization": f"Bearer {pushing.where['key']}"}
        await (await session.post(pushing.where["url"] + "/begin_weight_update", headers=headers)).read()
        for name in names:
            body = {"weight_version": "e1.s1", "buckets": [{"file": name, "num_bytes": 0, "tensors": []}]}
            url = pushing.where["url"] + "/update_weights_from_shared"
            async with session.post(url, headers=headers, data=json.dumps(body)) as response:
                answer = await response.json()
            assert (response.status, answer["weights_touched"]) == (400, False), answer
        assert await pushing.link.checksum() == before


def test_a_file_is_read_by_its_user_under_its_name_alone(tmp_path: Path) -> None:
    directory = tmp_path / "shared"
    made = SharedFile(directory, 16)
    made.tensor.copy_(torch.arange(16, dtype=torch.uint8))
    opened = open_file(directory, made.name, 16)
    assert torch.equal(opened, made.tensor)
    opened.zero_()
    assert made.tensor.any(), "a reader changes its own copy"
    with pytest.raises(ValueError, match="15 bytes"):
        open_file(directory, made.name, 15)
    (directory / made.name).chmod(0o644)
    with pytest.raises(PermissionError):
        open_file(directory, made.name, 16)
    made.close()
    with pytest.raises(FileNotFoundError):
        open_file(directory, made.name, 16)
    directory.chmod(0o755)
    with pytest.raises(PermissionError):
        SharedFile(directory, 16)
