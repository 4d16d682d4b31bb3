"""A rollout replica's receiving end in a process of its own, and pushes to it."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import rollout_pb2 as rpb
from services.common.config import Config, dump
from services.common.config.models import WeightsConfig
from services.common.versions import Version
from services.rollout.engines.client import EngineClient
from services.trainer.weights.channel import Channel
from services.trainer.weights.directory import VersionDirectories
from services.trainer.weights.disk import DiskChannel
from services.trainer.weights.snapshot import Snapshot
from tests.gpu.push_process import JsonProcess

WEIGHTS = {"backend": "gloo", "timeout_s": 60.0}


@asynccontextmanager
async def replica_of(
    kind: str, model: Path, directory: Path, dtype: str, python: Path | None = None
) -> AsyncIterator[tuple[str, EngineClient]]:
    """The receiving end with one engine: its address, and the way to its engine. `python`: another one for SGLang."""
    engine = {"kind": kind, "context_length": 128, "max_running_requests": 4, "start_timeout_s": 400.0}
    if python is not None:
        engine["python"] = str(python)
    config = {
        "run": {"dir": str(directory / "run")},
        "model": {"hf_checkpoint": str(model), "dtype": dtype},
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


async def checksums(client: EngineClient) -> dict[str, str]:
    """Of everything that the engine computes with, by its own names."""
    session = client._session
    async with session.post(client.url + "/weights_checker", json={"action": "checksum"}) as response:
        assert response.status == 200
        (rank,) = (await response.json())["ranks"]
        return rank["checksums"]


def _channel(transport: str, address: str, model: Path, directory: Path) -> Channel | DiskChannel:
    replica = pb.Replica(replica_id="rollout-0", address=address)
    common = replica, 0, 1, WeightsConfig(**WEIGHTS | {"backend": transport}), rpb.PAUSE_MODE_IN_PLACE
    if transport == "disk":
        return DiskChannel(*common, VersionDirectories(directory, model, keep_last=1))
    return Channel(*common)


async def push(
    transport: str,
    address: str,
    model: Path,
    snapshots: Sequence[Snapshot],
    directory: Path,
    client: EngineClient,
    first: int,
) -> list[dict[str, str]]:
    """Pushes each, to versions of the first epoch from `first` on; the engine's checksums after each."""
    channel, seen = _channel(transport, address, model, directory), []
    if not channel.joined:
        await channel.join(1)
    for number, snapshot in enumerate(snapshots, start=first):
        done = await channel.push(Version(1, number), snapshot)
        assert done.pause_s > 0
        assert done.effect["salt_race"] == 0
        seen.append(await checksums(client))
    await channel.leave()
    return seen
