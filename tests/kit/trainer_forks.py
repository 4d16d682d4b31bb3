"""Trainer processes that start in a fraction of a second: each is a fork of one process that has imported everything.

Run as a program, it reads run directories, a line each, and answers with the exit status of the trainer it forked for
it: negative for the signal that ended it.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import traceback
from pathlib import Path

from services.common.config import load
from services.common.lifecycle import Process
from services.common.telemetry import configure_logging
from tests.kit.faults import points

# Beside those that running systems are struck at.
POINTS = {
    "state_loaded": "services.trainer.backends.torch.backend:TorchBackend.load_state",
    "fork_recorded": "services.trainer.trainer:record_fork",
    "state_copied": "services.trainer.backends.torch.backend:TorchBackend.state",
    "checkpoint_pruned": "services.trainer.checkpoint:CheckpointStore._prune",
    "line_written": "services.trainer.records:JsonLines.write",
}


def point_names() -> list[str]:
    return [*points.names("trainer"), *(f"trainer.{name}.{when}" for name in POINTS for when in ("before", "after"))]


class TrainerForks:
    """Takes run directories with a ``config.toml``."""

    def __init__(self, environment: dict[str, str]) -> None:
        """`environment` is added to this process's."""
        paths = {"PYTHONPATH": ".:protos", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kit.trainer_forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment, **paths},
        )

    async def run(self, run_dir: Path) -> int:
        """A trainer from start to end. Returns its exit status."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(run_dir, file=self._process.stdin, flush=True)
        return int(await asyncio.to_thread(self._process.stdout.readline))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    # Only now: the tests' own process imports this module for its names.
    import transformers

    import services.trainer.trainer  # noqa: F401

    _ = transformers.AutoModelForCausalLM, transformers.Qwen3ForCausalLM
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(_train(Path(line.strip())))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _train(run_dir: Path) -> int:
    from services.trainer.__main__ import serve

    log = os.open(run_dir / "trainer.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        if directory := os.environ.get("FAULT_POINTS"):
            points.install(["-m", "services.trainer"])
            for name, place in POINTS.items():
                points._wrap(place, f"trainer.{name}", Path(directory))
        configure_logging("trainer")
        return asyncio.run(_serve(serve, run_dir))
    except BaseException:
        traceback.print_exc()
        return 1


async def _serve(serve: object, run_dir: Path) -> int:
    process = Process("trainer", 0, f"trainer-0.{os.getpid()}", asyncio.Event())
    return int(await serve(load(run_dir / "config.toml"), process))  # type: ignore[operator]


if __name__ == "__main__":
    main()
