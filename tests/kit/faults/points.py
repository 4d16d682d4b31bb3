"""Points at which a service crashes or freezes when a test has armed them. Production code knows nothing of it.

A directory, FAULT_POINTS, holds ``armed/<point>`` with an action. The first process that gets there moves the file to
``hit/`` and carries the action out: "kill" is SIGKILL to itself, "kill PID" to another process, "freeze" SIGSTOP.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.kit.faults import clocks, links
from tests.kit.faults.witness import Witness

ENGINE = "services.rollout.engines.torch_engine"
ROLES = {
    "services.buffer": "buffer",
    "services.rollout": "rollout",
    "services.reward": "reward",
    "services.trainer": "trainer",
    ENGINE: "engine",
}
# Store scripts that change something. "after" is when the store has applied it and nobody has been told.
_SCRIPTS = (
    "issue", "lease_generate", "lease_score", "lease_train", "extend", "complete_generate", "complete_score",
    "commit_step", "publish_version", "confirm_checkpoint", "acquire_epoch", "recover",
)  # fmt: skip
# Calls of the buffer's clients. "after" is when the answer is there and has not been read.
_CALLS = {
    "rollout": ("Lease", "Extend", "Complete"),
    "reward": ("Lease", "Fetch", "Complete"),
    "trainer": ("AcquireEpoch", "Recover", "Lease", "Fetch", "CommitStep", "PublishVersion", "ConfirmCheckpoint"),
}
# Functions by their place: the point is ``<role>.<name>``.
_FUNCTIONS = {
    "rollout": {
        "push_begin": "services.rollout.weights:WeightReceiver.begin",
        "push_load": "services.rollout.weights:WeightReceiver.load",
        "push_commit": "services.rollout.weights:WeightReceiver.commit",
    },
    "trainer": {
        "gradient_clip": "services.trainer.backends.torch.optimizer:Optimizer.clip",
        "optimizer_step": "services.trainer.backends.torch.optimizer:Optimizer.step",
        "push_bucket": "services.common.weight_group:WeightGroup.broadcast",
        "checkpoint_tensors": "services.trainer.shards:save_file",
        "checkpoint_shards": "services.trainer.checkpoint:write_shards",
        "checkpoint_files": "services.trainer.checkpoint:_write_state",
        "checkpoint_fsync": "services.trainer.files:fsync",
        "checkpoint_rename": "services.trainer.checkpoint:write_directory",
        "checkpoint_verified": "services.trainer.checkpoint:CheckpointStore.save",
    },
    "engine": {
        "decode": f"{ENGINE}.scheduler:Scheduler._decode",
        "pause": f"{ENGINE}.engine_thread:EngineThread.pause",
        "push_receive": f"{ENGINE}.weight_updates:WeightUpdates._receive",
        "push_load": f"{ENGINE}.weight_updates:WeightUpdates._load",
    },
}


def names(role: str) -> list[str]:
    """All points of a role."""
    if role == "buffer":
        stems: Iterable[str] = _SCRIPTS
    else:
        stems = (*_CALLS.get(role, ()), *_FUNCTIONS.get(role, ()))
    return [f"{role}.{stem}.{when}" for stem in stems for when in ("before", "after")]


class Points:
    """The test's side: arms points and looks whether they were reached."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("armed", "hit", "witness"):
            (directory / name).mkdir(parents=True, exist_ok=True)

    def environment(self) -> dict[str, str]:
        """What the processes of a run need."""
        return {"FAULT_POINTS": str(self.directory), "PYTHONPATH": str(Path(__file__).parent / "inject")}

    def arm(self, point: str, action: str = "kill") -> None:
        temporary = self.directory / f"arming-{point}"
        temporary.write_text(action)
        temporary.rename(self.directory / "armed" / point)

    def is_armed(self, point: str) -> bool:
        return (self.directory / "armed" / point).exists()

    def disarm(self, point: str) -> bool:
        """Whether it had not been reached."""
        try:
            (self.directory / "armed" / point).unlink()
        except FileNotFoundError:
            return False
        return True

    def hits(self, point: str) -> list[int]:
        """The processes that reached it, in order."""
        return [int(path.suffix[1:]) for path in sorted((self.directory / "hit").glob(f"{point}.*"))]


def install(command: Sequence[str]) -> None:
    """Wraps the functions of the service that `command` starts."""
    module = command[command.index("-m") + 1] if "-m" in command[:-1] else ""
    if (role := ROLES.get(module)) is None:
        return
    directory = Path(os.environ["FAULT_POINTS"])
    clocks.install(role, directory)
    links.install(role, directory)
    seen: dict[str, Callable[..., None]] = {}
    if role == "buffer":
        _wrap("services.buffer.redis_scripts:ScriptRunner.run", role, directory, stems=_SCRIPTS)
    elif role in _CALLS:
        witness = Witness(directory / "witness", role)
        place = "services.common.buffer_client:BufferClient._call"
        _wrap(place, role, directory, stems=_CALLS[role], seen=witness.acknowledged)
        seen["push_commit"] = witness.pushed
    for name, place in _FUNCTIONS.get(role, {}).items():
        _wrap(place, f"{role}.{name}", directory, seen=seen.get(name, _nothing))


def _nothing(*_: object) -> None:
    pass


def _wrap(
    place: str,
    point: str,
    directory: Path,
    stems: Sequence[str] = (),
    seen: Callable[..., None] = _nothing,
) -> None:
    """With `stems`, the first argument is the rest of the point's name, if it is one of them. `seen` gets the arguments
    and the answer of a call that was answered, before its "after" is reached.
    """
    module, _, path = place.partition(":")
    *outer, name = path.split(".")
    owner = functools.reduce(getattr, outer, importlib.import_module(module))
    inner = getattr(owner, name)
    on_self = 1 if outer else 0

    def point_of(arguments: Sequence[Any]) -> str | None:
        if not stems:
            return point
        stem = arguments[on_self]
        return f"{point}.{stem}" if stem in stems else None

    @functools.wraps(inner)
    def call(*arguments: Any, **named: Any) -> Any:
        here = point_of(arguments)
        _reach(directory, here, "before")
        answer = inner(*arguments, **named)
        seen(*arguments[on_self:], answer)
        _reach(directory, here, "after")
        return answer

    @functools.wraps(inner)
    async def call_async(*arguments: Any, **named: Any) -> Any:
        here = point_of(arguments)
        _reach(directory, here, "before")
        answer = await inner(*arguments, **named)
        seen(*arguments[on_self:], answer)
        _reach(directory, here, "after")
        return answer

    setattr(owner, name, call_async if inspect.iscoroutinefunction(inner) else call)


def _reach(directory: Path, point: str | None, when: str) -> None:
    if point is None:
        return
    name = f"{point}.{when}"
    claimed = directory / "hit" / f"{name}.{time.monotonic_ns()}.{os.getpid()}"
    try:
        (directory / "armed" / name).rename(claimed)
    except FileNotFoundError:
        return
    verb, _, whom = claimed.read_text().partition(" ")
    os.kill(int(whom) if whom else os.getpid(), signal.SIGSTOP if verb == "freeze" else signal.SIGKILL)
