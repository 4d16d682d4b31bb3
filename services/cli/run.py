"""One run, from a checked configuration to its summary: start the services, watch them, end them in order."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import structlog

from services.cli import scale
from services.cli.fleet import GRACE_S, Fleet
from services.cli.lock import sole_launcher
from services.cli.observe import Observer
from services.cli.preflight import check
from services.cli.progress import Progress
from services.cli.reward_engine import KEY_VARIABLE, RewardEngine, reward_engine
from services.cli.summary import write_results
from services.cli.supervisor import Child, Supervisor
from services.common import embedded_store
from services.common.config import Config, dump
from services.common.errors import PolyheadError
from services.common.lifecycle import STOPPED_EARLY
from services.common.process import free_port
from services.common.shared_directory import clear_shared_directory
from services.common.telemetry import configure_logging

log = structlog.get_logger()

# The trainer finishes its step and writes a checkpoint first.
TRAINER_GRACE_S = 120.0
# SGLang has nothing to save, and takes seconds to notice.
ENGINE_GRACE_S = 1.0
_GPUS = "CUDA_VISIBLE_DEVICES"


def run(config: Config, *, dry_run: bool = False) -> int:
    """Runs `config` to its end. Returns 0 when the trainer finished, 5 when somebody stopped the trainer before its
    last step, 130 after Ctrl-C, 143 after SIGTERM.

    Raises ConfigError before anything is written when the run cannot work, PolyheadError when a service fails for good.
    """
    check(config)
    if dry_run:
        print(dump(config), end="")
        return 0
    with sole_launcher(config.run.dir), tempfile.TemporaryDirectory(prefix="polyhead-") as socket_dir:
        resolved = _resolve(config, Path(socket_dir))
        engine = reward_engine(config)
        if engine is not None:
            resolved.reward.remote.urls = [engine.url]
        try:
            return asyncio.run(Launcher(resolved, engine, embedded=config.store.url == "embedded").run())
        finally:
            clear_shared_directory(resolved.run.dir)  # a trainer that was killed leaves its buckets


class Launcher:
    """Starts the processes of one run on this machine and keeps them running."""

    def __init__(self, config: Config, engine: RewardEngine | None = None, *, embedded: bool) -> None:
        """`engine` is the reward model's, to be started beside the services."""
        self._config = config
        self._reward_engine = engine
        self._embedded = embedded
        self._dir = config.run.dir
        self._stop = asyncio.Event()
        self._signal: signal.Signals | None = None
        self._progress = Progress(config)
        self._supervisor = Supervisor(self._stop, self._progress.restarted, self._spare)
        self._observer = Observer(config, self._supervisor)
        self._fleet = Fleet(config, self._supervisor, self._start, self._progress.say)

    async def run(self) -> int:
        self._catch_signals()
        self._log_to_file()
        (self._dir / "config.toml").write_text(dump(self._config))
        scale.forget(self._dir)
        started = time.time()
        beside: list[asyncio.Task[Any]] = []
        try:
            trainer = await self._start_all()
            following = asyncio.create_task(self._fleet.follow())
            watching = asyncio.create_task(self._observer.watch(self._progress))
            supervising = asyncio.create_task(self._supervisor.watch(trainer))
            beside += [following, watching, supervising]
            await asyncio.wait([following, supervising], return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                following.result()
            status = await supervising
            following.cancel()
            await self._end_all(trainer, watching)
        except BaseException:
            self._supervisor.kill_all()
            raise
        finally:
            for task in beside:
                task.cancel()
            self._progress.close()
        if status == 0:
            write_results(self._config, self._observer, started)
            return 0
        self._progress.say(f"stopped; the same command resumes {self._dir}")
        return 128 + self._signal if self._signal is not None else STOPPED_EARLY

    async def _start_all(self) -> Child:
        if self._embedded:
            self._start_store()
        for index in range(self._config.buffer.replicas):
            self._start("buffer", index)
        if (engine := self._reward_engine) is not None:
            self._add(
                "reward-engine", engine.command, "reward-engine.log", environment=engine.environment, foreign=True
            )
        self._fleet.settle()
        leader, *_ = [self._start("trainer", rank) for rank in range(self._config.trainer.ranks)]
        return leader

    def _start_store(self) -> None:
        directory = self._dir / "store"
        directory.mkdir(exist_ok=True)
        command = embedded_store.command(
            directory,
            Path(self._config.store.url.removeprefix("unix://")),
            self._config.store.appendfsync,
            self._config.store.max_memory_mb,
        )
        room = dict.fromkeys(embedded_store.NO_ROOM, f"room on the disk of {directory}")
        self._add("store", command, "store.log", waits_for=room)

    def _start(self, role: str, index: int = 0) -> Child:
        command = [
            sys.executable,
            "-m",
            f"services.{role}",
            "-c",
            str(self._dir / "config.toml"),
            "--index",
            str(index),
        ]
        engine = self._reward_engine
        environment = {KEY_VARIABLE: engine.key} if engine is not None and role == "reward" else {}
        return self._add(role, command, f"{role}-{index}.log", index, environment=environment)

    def _add(
        self,
        role: str,
        command: Sequence[str],
        log_name: str,
        index: int = 0,
        waits_for: Mapping[str, str] = MappingProxyType({}),
        environment: Mapping[str, str] = MappingProxyType({}),
        foreign: bool = False,
    ) -> Child:
        child = Child(
            role,
            command,
            self._dir / "logs" / log_name,
            index,
            env={**_environment(self._config, role, index), **environment},
            foreign=foreign,
            registers=role in scale.ROLES,
            group=role if role == "trainer" and self._config.trainer.ranks > 1 else "",
            stable_after_s=self._config.run.stable_after_s,
            waits_for=waits_for,
        )
        return self._supervisor.add(child)

    def _spare(self, child: Child, error: PolyheadError) -> bool:
        """A run that has not trained a step yet ends with its first failure: most likely its configuration is wrong."""
        return bool(self._observer.steps) and self._fleet.leave_out(child, error)

    async def _end_all(self, trainer: Child, watching: asyncio.Task[None]) -> None:
        """Consumers before the buffer, the buffer before its store."""
        await self._supervisor.end([trainer], TRAINER_GRACE_S)
        await self._supervisor.end(self._children("trainer"), GRACE_S)
        await self._supervisor.end(self._children("rollout", "reward"), GRACE_S)
        await self._supervisor.end(self._children("reward-engine"), ENGINE_GRACE_S)
        watching.cancel()
        await self._observer.look_at_the_end()
        await self._supervisor.end(self._children("buffer"), GRACE_S)
        await self._supervisor.end(self._children("store"), GRACE_S)

    def _children(self, *roles: str) -> Sequence[Child]:
        return [child for child in self._supervisor.children if child.role in roles]

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()

        def on_signal(number: signal.Signals) -> None:
            if self._stop.is_set():
                self._supervisor.kill_all()
                os._exit(128 + number)
            self._signal = number
            self._progress.say("stopping: the trainer writes a checkpoint; once more to kill at once")
            self._stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal, number)

    def _log_to_file(self) -> None:
        logs = self._dir / "logs"
        logs.mkdir(exist_ok=True)
        # Engines log their arguments, and so their keys.
        logs.chmod(0o700)
        configure_logging("launcher", stream=(logs / "launcher.log").open("a"))


def _resolve(config: Config, socket_dir: Path) -> Config:
    """The configuration every process reads: real ports, and the embedded store's socket."""
    resolved = config.model_copy(deep=True)
    resolved.run.dir = config.run.dir.resolve()
    if config.store.url == "embedded":
        # In a short private directory: socket paths are limited to 107 bytes, and a run directory may be anywhere.
        resolved.store.url = embedded_store.url(socket_dir / "store.sock")
    if resolved.trainer.rendezvous.endswith(":0"):
        host = resolved.trainer.rendezvous.rpartition(":")[0]
        resolved.trainer.rendezvous = f"{host}:{free_port(host)}"
    if resolved.buffer.address.endswith(":0"):
        resolved.buffer.address = ",".join(f"127.0.0.1:{port}" for port in _free_ports(config.buffer.replicas))
    return resolved


def _environment(config: Config, role: str, index: int) -> Mapping[str, str]:
    """A rank of the trainer sees the GPU that it takes, of those that the launcher sees, and no other."""
    if role != "trainer" or config.trainer.device != "cuda":
        return {}
    gpu = config.trainer.base_gpu + index
    seen = [each for each in os.environ.get(_GPUS, "").split(",") if each]
    return {_GPUS: (seen[gpu] if gpu < len(seen) else "") if seen else str(gpu)}


def _free_ports(count: int) -> set[int]:
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return ports
