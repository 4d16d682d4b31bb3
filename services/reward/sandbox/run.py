"""Starts a program in its sandbox and waits for it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.reward.scorers.base import ScorerUnavailableError

_LAUNCH = Path(__file__).parent / "launch.py"
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}

# In less, a sandbox need not be ready on a busy machine: the time of the program is over, that is all.
_ENOUGH_S = 1.0


@dataclass(frozen=True)
class Limits:
    """Of one program and all it starts."""

    memory_mb: int = 512
    """Address space of each process, and what its files may hold in all."""
    output_mb: int = 8
    """Of its output, and of each file."""
    processes: int = 32
    """Not enforced for root."""


@dataclass(frozen=True)
class Outcome:
    ended_well: bool
    """With exit status 0."""
    output: str
    timed_out: bool


class SandboxError(ScorerUnavailableError):
    """The sandbox could not be set up: not the program's doing."""


def run(files: Mapping[str, str], program: str, text: str, *, seconds: float, limits: Limits) -> Outcome:
    """Runs `program`, one of `files`, with `text` as its input, for at most `seconds`.

    It has an empty directory of its own, no site-packages and nothing of this process's environment. Its process
    group and, where the kernel gives it namespaces, all it has started are gone when this returns; they end with this
    process, too. Raises SandboxError.
    """
    numbers = {
        "seconds": math.ceil(seconds),
        "memory_mb": limits.memory_mb,
        "output_mb": limits.output_mb,
        "processes": limits.processes,
    }
    request = json.dumps({"files": dict(files), "program": program, "input": text}).encode()
    try:
        begun, status, data = _run(request, numbers, seconds)
    except OSError as error:  # no disk, no process
        raise SandboxError(f"the sandbox could not be set up: {error.strerror}") from error
    if not begun and (status is not None or seconds >= _ENOUGH_S):
        raise SandboxError("the sandbox could not be set up")
    return Outcome(status == 0, data.decode(errors="replace"), status is None)


def _run(request: bytes, numbers: Mapping[str, int], seconds: float) -> tuple[bool, int | None, bytes]:
    """Whether the program was begun, its exit status, None when it is over its time, and its output."""
    with (
        tempfile.TemporaryDirectory(prefix="polyhead-code-", ignore_cleanup_errors=True) as directory,
        tempfile.TemporaryFile() as source,
        tempfile.TemporaryFile() as output,
    ):
        source.write(request)
        source.flush()
        source.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_LAUNCH), str(os.getpid()), directory, json.dumps(numbers)],
            stdin=source,
            stdout=output,
            stderr=subprocess.DEVNULL,
            env={**_ENVIRONMENT, "HOME": directory, "TMPDIR": directory},
            cwd="/",
            start_new_session=True,
        )
        status = _wait(process, seconds)
        output.seek(0)
        data = output.read(numbers["output_mb"] << 20)
        begun = os.fstat(source.fileno()).st_size == 0
    return begun, status, data


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Its exit status, None when it is over its time. Nothing of its group is left."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
