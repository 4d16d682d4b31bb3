"""Everything that takes part in a push: a buffer, real replicas with their engines, a pusher and one that stands by.

The buffer is real, over its store in memory, and part of the witness's process: it is not struck here.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import buffer_pb2_grpc, rollout_pb2, rollout_pb2_grpc
from services.buffer.memory_store import MemoryStore
from services.buffer.memory_watch import MemoryWatch
from services.buffer.service import BufferService
from services.buffer.settings import run_params
from services.common import rpc
from services.common.buffer_client import BufferClient
from services.common.config import Config, dump
from services.common.process import die_with_parent, free_port
from services.common.versions import Version
from tests.kit.engine_process import ROOT, engine_environment
from tests.kit.faults.points import Points
from tests.kit.pushes.canaries import EngineAddress, EngineCanary, Flow, Judge, Lag
from tests.kit.pushes.models import LONG, Models
from tests.kit.pushes.points import VARIABLE

INJECT = Path(__file__).parents[1] / "faults" / "inject"
UP_S = 240.0
_LOOK_S = 0.05


@dataclass
class State:
    """What a replica says of its engine."""

    state: str
    version: Version | None


class ReplicaProcess:
    """A replica with one engine, started again by its launcher, the scene, when it has ended."""

    def __init__(self, index: int, config: Path, directory: Path) -> None:
        self.index = index
        self.points = Points(directory / f"points-{index}")
        self._config = config
        self._log = directory / f"rollout-{index}.log"
        self._channel: grpc.aio.Channel | None = None
        self._address = ""
        self.start()

    def start(self) -> None:
        paths = [str(INJECT), engine_environment()["PYTHONPATH"]]
        environment = {
            **engine_environment(),
            "PYTHONPATH": os.pathsep.join(paths),
            VARIABLE: str(self.points.directory),
        }
        parent = os.getpid()
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.rollout", "-c", str(self._config), "--index", str(self.index)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                preexec_fn=lambda: die_with_parent(parent),
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def psutil(self) -> psutil.Process | None:
        if self.process.poll() is not None:
            return None
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid)
        return None

    async def state(self, address: str) -> State | None:
        """None while it does not answer."""
        if self._channel is None or address != self._address:
            self._channel, self._address = rpc.channel(address), address
        stub = rollout_pb2_grpc.RolloutServiceStub(self._channel)
        try:
            said = await stub.GetStatus(rollout_pb2.RolloutServiceGetStatusRequest(), timeout=1.0)
        except grpc.aio.AioRpcError:
            return None
        if said.replica.pid != self.pid:
            return None
        (engine,) = said.replica.engines
        version = Version.from_proto(engine.weight_version) if engine.HasField("weight_version") else None
        return State(pb.ReplicaState.Name(engine.state).removeprefix("REPLICA_STATE_"), version)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class PusherProcess:
    """One trainer, standing by until `go`."""

    process: asyncio.subprocess.Process
    points: Points
    on_version: Callable[[str, int], None]
    lines: list[dict[str, Any]] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    reading: asyncio.Task[None] | None = None
    frozen: list[tuple[float, float]] = field(default_factory=list)
    """When it was stopped, by time.time()."""

    @classmethod
    async def start(cls, config: Path, models: Path, directory: Path, on_version: Callable[[str, int], None]) -> Any:
        points = Points(directory / "points-trainer")
        paths = [str(INJECT), engine_environment()["PYTHONPATH"]]
        environment = {**engine_environment(), "PYTHONPATH": os.pathsep.join(paths), VARIABLE: str(points.directory)}
        with (directory / "pusher.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.kit.pushes.pusher", str(config), str(models), str(os.getpid())),
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        made = cls(process, points, on_version)
        made.reading = asyncio.create_task(made._read())
        return made

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def over(self) -> bool:
        return self.process.returncode is not None

    def push(self, model: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"push": model}).encode() + b"\n")

    def said(self, key: str) -> list[Any]:
        return [line[key] for line in self.lines if key in line]

    async def until_says(self, key: str, count: int, within_s: float = UP_S) -> Any:
        """The value of `key` in the line that is the `count`th to have it."""
        async with asyncio.timeout(within_s):
            while len(found := self.said(key)) < count:
                assert self.reading is not None
                if self.reading.done():
                    raise AssertionError(f"the pusher ended: {self.lines[-3:]}")
                self.news.clear()
                await self.news.wait()
        return found[count - 1]

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            said = json.loads(line)
            if "version" in said:
                self.on_version(said["version"], said["model"])
            self.lines.append(said)
            self.news.set()
        self.news.set()

    async def end(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


class Scene:
    """`kinds`: of each replica's engine, "torch" or "sglang"."""

    def __init__(self, directory: Path, models: Models, kinds: Sequence[str], timeout_s: float, back_s: float) -> None:
        """`back_s`: within it everything that was struck is back and serves, on a busy machine."""
        self.models, self.kinds, self.timeout_s = models, kinds, timeout_s
        self.back_s = back_s
        self.directory = directory
        self.judge = Judge(models)
        self.replicas: list[ReplicaProcess] = []
        self.canaries: list[EngineCanary] = []
        self.target = Version(0, 0)
        """What the newest trainer offers."""
        self._model = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Scene:
        address = f"127.0.0.1:{free_port()}"
        configs = [self._write_config(index, kind, address) for index, kind in enumerate(self.kinds)]
        self._trainers_config = configs[0]
        config = self._config(self.kinds[0], address)
        store = MemoryStore()
        await store.open(run_params(config, None))
        self.service = BufferService(store, None, MemoryWatch(store, 4096), config.buffer, 1)
        self._server = await rpc.serve(
            address, lambda server: buffer_pb2_grpc.add_BufferServiceServicer_to_server(self.service, server), []
        )
        self.buffer = BufferClient(address)
        self.replicas = [ReplicaProcess(index, path, self.directory) for index, path in enumerate(configs)]
        self.trainer, self.standby = await asyncio.gather(self.pusher(), self.pusher())
        self.canaries = [EngineCanary(each.index, each.psutil, self.models.prompt) for each in self.replicas]
        self.flow = Flow(self.buffer)
        self.lag = Lag()
        self._tasks = [asyncio.create_task(part.run()) for part in (*self.canaries, self.flow, self.lag)]
        self._tasks.append(asyncio.create_task(self._launch()))
        await self.trainer.until_says("ready", 1)
        self.trainer.push(self.next_model())
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for pusher in (self.trainer, self.standby):
            await pusher.end()
        for replica in self.replicas:
            replica.end()
        await self.buffer.close()
        await self._server.stop(0)

    def next_model(self) -> int:
        """Never the one before. The first is what engines start with."""
        self._model = self._model % (len(self.models.answers) - 1) + 1
        return self._model

    def engine(self, replica: int) -> EngineAddress | None:
        return self.canaries[replica].engine()

    async def until_served(self) -> float:
        """Waits until every engine serves what the trainer offers, and has said so itself; how long that took."""
        began = time.monotonic()
        await self.until(self._all_serve, self.back_s, "an engine does not serve the version")
        return time.monotonic() - began

    async def until(self, condition: Callable[[], Awaitable[bool]], within_s: float, otherwise: str) -> None:
        deadline = time.monotonic() + within_s
        while not await condition():
            self.check()
            assert not self.trainer.over, f"the trainer has ended: {self.trainer.lines[-3:]}"
            if time.monotonic() > deadline:
                raise AssertionError(f"{otherwise} within {within_s} s: {await self.states()}, {self.target}")
            await asyncio.sleep(_LOOK_S)

    def check(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()

    async def states(self) -> list[State | None]:
        listed = {each.pid: each.address for each in await self.buffer.list_replicas(pb.ROLE_ROLLOUT)}
        return list(
            await asyncio.gather(
                *(each.state(listed[each.pid]) if each.pid in listed else _nothing() for each in self.replicas)
            )
        )

    async def _all_serve(self) -> bool:
        states = await self.states()
        served = [each.version if each is not None and each.state == "SERVING" else None for each in states]
        said = [canary.answers[-1].version if canary.answers else "" for canary in self.canaries]
        return all(each == self.target for each in served) and all(each == str(self.target) for each in said)

    async def take_over(self) -> None:
        """The trainer that stands by becomes the trainer, with an epoch of its own."""
        old, self.trainer = self.trainer, self.standby
        await self.trainer.until_says("ready", 1)
        self.trainer.push(self.next_model())
        await self.trainer.until_says("version", 1)
        self.standby = await self.pusher()
        self.former = old

    async def pusher(self) -> PusherProcess:
        """One that stands by."""
        made: PusherProcess = await PusherProcess.start(
            self._trainers_config, self.models.directory, self.directory, self._learn
        )
        return made

    def _learn(self, version: str, model: int) -> None:
        self.judge.learn(version, model)
        self.target = max(self.target, Version.parse(version))

    async def _launch(self) -> None:
        while True:
            for replica in self.replicas:
                if replica.process.poll() is not None:
                    replica.start()
            await asyncio.sleep(_LOOK_S)

    def _write_config(self, index: int, kind: str, address: str) -> Path:
        path = self.directory / f"run-{index}.toml"
        path.write_text(dump(self._config(kind, address)))
        return path

    def _config(self, kind: str, address: str) -> Config:
        # SGLang's second half arrives while the first is loaded.
        engine = {"kind": kind, "context_length": 128, "stream_interval": 4, "max_running_requests": 8, "staging_mb": 2}
        engine["start_timeout_s"] = self.back_s
        return Config.model_validate(
            {
                "run": {"dir": self.directory / "run"},
                "model": {"hf_checkpoint": self.models.paths[0]},
                "batch": {"rollout_batch_size": 1, "n_samples_per_prompt": 1},
                "staleness": {"max_staleness": 1_000_000},
                "buffer": {"address": address, "lease_ttl_s": 3.0, "replica_ttl_s": 4.0},
                "rollout": {
                    "max_inflight": 4,
                    "save_interval_s": 0.1,
                    "sampling": {"max_response_len": LONG, "top_k": 1},
                    "engine": engine,
                },
                "trainer": {"weights": {"timeout_s": self.timeout_s, "bucket_mb": 1}},
            }
        )


async def _nothing() -> None:
    return None


def freeze(pids: Sequence[int], *, on: bool) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP if on else signal.SIGCONT)
