"""Rollout replicas at work with a real buffer and store, over engines that already run; the scene plays the trainer."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import rollout_pb2 as rpb
from polyhead.v1 import rollout_pb2_grpc
from services.common import rpc
from services.common.buffer_client import BufferClient
from services.common.config import Config, dump
from services.common.process import free_port
from services.common.versions import Version
from tests.kit import valkey

ROOT = Path(__file__).parents[2]
WAIT_S = 120.0
ADMIN_KEY_VARIABLE = "POLYHEAD_ROLLOUT__ENGINE__ADMIN_KEY"
COUNTERS = ("tokens_generated", "tokens_discarded", "tokens_recomputed", "samples_completed")


class Scene:
    """Use `open_scene`. Versions are loaded from the model's own directory: the weights stay the same."""

    def __init__(self, config: Config, buffer: BufferClient, processes: list[subprocess.Popen[bytes]]) -> None:
        self.config = config
        self.buffer = buffer
        self._processes = processes
        self._stubs: list[rollout_pb2_grpc.RolloutServiceStub] = []
        self._epoch = 0
        self._step = 0

    async def begin(self, replicas: int) -> None:
        """Every replica gets the first version, which is then published: work begins."""
        self._epoch = (await self.buffer.acquire_epoch("bench")).epoch
        await self.buffer.recover(self._epoch, 0)
        for replica in await self._joined(replicas):
            stub = rollout_pb2_grpc.RolloutServiceStub(rpc.channel(replica.address))
            self._stubs.append(stub)
            await self._load(stub, Version(self._epoch, 0))
        await self.buffer.publish_version(Version(self._epoch, 0))

    async def push(self) -> float:
        """The next version on every replica. Returns the longest pause, in seconds."""
        self._step += 1
        version = Version(self._epoch, self._step)
        return max(await asyncio.gather(*(self._load(stub, version) for stub in self._stubs)))

    async def totals(self) -> dict[str, float]:
        """Counters summed over the replicas, and `running` requests, as the replicas have them now."""
        statuses = [await stub.GetStatus(rpb.RolloutServiceGetStatusRequest(), timeout=10) for stub in self._stubs]
        sums = {name: sum(status.replica.stats[name] for status in statuses) for name in COUNTERS}
        return sums | {"running": sum(status.running_requests for status in statuses)}

    async def until_running(self, requests: int) -> None:
        """Returns when so many requests are running, but for a few between an end and a start, and tokens come."""
        deadline = time.monotonic() + WAIT_S
        while (now := await self.totals())["running"] < 0.95 * requests or now["tokens_generated"] < requests:
            assert time.monotonic() < deadline, f"{now} where {requests} requests should run"
            await asyncio.sleep(0.05)

    async def drain(self) -> tuple[int, float]:
        """Ends the first replica. Returns the samples it gave back, and the seconds until the buffer had them all."""
        began = time.monotonic()
        done = await self._stubs[0].Drain(rpb.DrainRequest(epoch=self._epoch), timeout=30)
        seconds = time.monotonic() - began
        ledger = await self.buffer.get_ledger()
        assert ledger.imbalance == 0
        return done.samples_returned, seconds

    async def _joined(self, count: int) -> Sequence[pb.Replica]:
        deadline = time.monotonic() + WAIT_S
        while True:
            replicas = await self.buffer.list_replicas(pb.ROLE_ROLLOUT)
            joining = [replica for replica in replicas if replica.state == pb.REPLICA_STATE_JOINING]
            if len(joining) == count:
                return joining
            assert all(process.poll() is None for process in self._processes), "a service has ended"
            assert time.monotonic() < deadline, f"{len(joining)} replicas of {count}"
            await asyncio.sleep(0.05)

    async def _load(self, stub: rollout_pb2_grpc.RolloutServiceStub, version: Version) -> float:
        request = rpb.LoadVersionRequest(
            epoch=self._epoch, version=version.to_proto(), directory=str(self.config.model.hf_checkpoint)
        )
        done = await stub.LoadVersion(request, timeout=WAIT_S)
        return float(done.pause.ToNanoseconds() / 1e9)


@asynccontextmanager
async def open_scene(
    directory: Path, model: Path, urls: Sequence[str], admin_key: str, rollout: dict[str, Any]
) -> AsyncIterator[Scene]:
    """One replica for each engine of `urls`; `rollout` are further settings of the section.

    Admission is no bound: nothing is consumed, and there are prompts enough.
    """
    prompts = _write_prompts(directory)
    with valkey.running(appendfsync="always", max_memory_mb=2048) as store:
        tree = {
            "run": {"dir": directory / "run"},
            "model": {"hf_checkpoint": model},
            "data": {"prompt_data": str(prompts)},
            "batch": {"rollout_batch_size": 1024, "n_samples_per_prompt": 8},
            "store": {"url": store.url},
            "buffer": {"address": f"127.0.0.1:{free_port()}"},
            "rollout": {**rollout, "replicas": len(urls)},
        }
        tree["rollout"]["engine"] = {**rollout.get("engine", {}), "external": list(urls)}
        config = Config.model_validate(tree)
        file = directory / "run.toml"
        file.write_text(dump(config))
        processes = [_start("buffer", 0, file, admin_key)]
        processes += [_start("rollout", index, file, admin_key) for index in range(len(urls))]
        try:
            async with BufferClient(config.buffer.address, retry_for_s=WAIT_S) as buffer:
                scene = Scene(config, buffer, processes)
                await scene.begin(len(urls))
                yield scene
        finally:
            for process in reversed(processes):
                process.terminate()
                process.wait(30)


def _write_prompts(directory: Path) -> Path:
    directory.mkdir(parents=True)
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input": f"{number}+{number}="}) + "\n" for number in range(4096)))
    return prompts


def _start(role: str, index: int, file: Path, admin_key: str) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "protos"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        ADMIN_KEY_VARIABLE: admin_key,
    }
    command = [sys.executable, "-m", f"services.{role}", "-c", str(file), "--index", str(index)]
    with (file.parent / f"{role}-{index}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
