"""Moments of a weight push at which a process is struck, by the files of `tests.kit.faults.points`.

They have a table of their own, since most of them are reached by few of the runs that the other campaign strikes. Each
replica and the trainer has a directory, PUSH_POINTS, that its engine shares. Beyond "kill" and "freeze", of the process
itself or of those that the action names, there is "fail": the call raises, as when the network breaks.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from services.common.errors import UnavailableError

VARIABLE = "PUSH_POINTS"
ENGINE = "services.rollout.engines.torch_engine"
ROLES = {"tests.kit.pushes.pusher": "trainer", "services.rollout": "rollout", ENGINE: "engine"}
_RECEIVER = "services.rollout.weights:WeightReceiver"
_CLIENT = "services.rollout.engines.client:EngineClient"
_UPDATES = f"{ENGINE}.weight_updates:WeightUpdates"
_THREAD = f"{ENGINE}.engine_thread:EngineThread"
# Those whose name says which bucket it was: the first is 0, the last 1.
_PLACES = {
    "trainer": {"": "services.trainer.weights.channel:Channel._call"},
    "rollout": {
        **{
            verb: f"{_RECEIVER}.{verb}"
            for verb in ("join", "leave", "stage", "begin", "load", "load_staged", "commit", "abort")
        },
        "pause": f"{_CLIENT}.pause",
        "resume": f"{_CLIENT}.resume",
    },
    "engine": {
        **{verb: f"{_UPDATES}.{verb}" for verb in ("join", "leave", "end")},
        "receive": f"{_UPDATES}._receive",
        "load": f"{_UPDATES}._load",
        "pause": f"{_THREAD}.pause",
        "resume": f"{_THREAD}.resume",
    },
}
Named = Callable[[Sequence[Any]], str]


def _verb_and_replica(arguments: Sequence[Any]) -> str:
    """Of a call of the trainer: its verb, the bucket if it is about one, and the replica that it goes to."""
    channel, verb, request = arguments[:3]
    bucket = request.bucket if verb == "LoadBucket" else ""
    return f"{verb}{bucket}@{channel._name.partition('.')[0]}"


def _bucket_of_request(arguments: Sequence[Any]) -> str:
    return str(arguments[1].bucket)


def _bucket_of_engine(arguments: Sequence[Any]) -> str:
    """Only the last one brings a version."""
    stated = arguments[1].weight_version if hasattr(arguments[1], "weight_version") else arguments[2]
    return "0" if stated is None else "1"


_SUFFIXES: dict[str, Named] = {
    "trainer.": _verb_and_replica,
    "rollout.load": _bucket_of_request,
    "engine.receive": _bucket_of_engine,
    "engine.load": _bucket_of_engine,
}


def places() -> list[str]:
    """Every function that has points."""
    return [place for role in _PLACES.values() for place in role.values()]


def install(command: Sequence[str]) -> None:
    """Wraps the functions of the process that `command` starts."""
    module = command[command.index("-m") + 1] if "-m" in command[:-1] else ""
    if (role := ROLES.get(module)) is None:
        return
    directory = Path(os.environ[VARIABLE])
    for name, place in _PLACES[role].items():
        _wrap(place, f"{role}.{name}", directory)
    if role == "rollout":
        # Struck again and again, an engine would be kept waiting for up to half a minute before each start.
        lives = importlib.import_module("services.rollout.engines.lives")
        lives._BACKOFF_MAX_S = lives._BACKOFF_FIRST_S


def _wrap(place: str, point: str, directory: Path) -> None:
    module, _, path = place.partition(":")
    *outer, name = path.split(".")
    owner = functools.reduce(getattr, outer, importlib.import_module(module))
    inner = getattr(owner, name)
    suffix = _SUFFIXES.get(point, lambda _: "")

    @functools.wraps(inner)
    def call(*arguments: Any, **named: Any) -> Any:
        here = point + suffix(arguments)
        _reach(directory, f"{here}.before")
        answer = inner(*arguments, **named)
        _reach(directory, f"{here}.after")
        return answer

    @functools.wraps(inner)
    async def call_async(*arguments: Any, **named: Any) -> Any:
        here = point + suffix(arguments)
        _reach(directory, f"{here}.before")
        answer = await inner(*arguments, **named)
        _reach(directory, f"{here}.after")
        return answer

    setattr(owner, name, call_async if inspect.iscoroutinefunction(inner) else call)


def _reach(directory: Path, name: str) -> None:
    claimed = directory / "hit" / f"{name}.{time.monotonic_ns()}.{os.getpid()}"
    try:
        (directory / "armed" / name).rename(claimed)
    except FileNotFoundError:
        return
    verb, *whom = claimed.read_text().split()
    if verb == "fail":
        raise UnavailableError("broken off by a test", field=name)
    for pid in map(int, whom or [os.getpid()]):
        os.kill(pid, signal.SIGSTOP if verb == "freeze" else signal.SIGKILL)
