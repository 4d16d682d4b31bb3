"""Processes that start in a fraction of a second: forks of one that has imported what they need.

Each is as ``python -m`` would make it, with arguments, environment and output of its own. Run as a program, this module
reads requests from its standard input, a line of JSON each, and answers with the process made for it; when one ends, it
says how.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

from services.common import process
from services.common.process import die_with_parent

ROOT = Path(__file__).parents[2]
ENGINE = "services.rollout.engines.torch_engine"
# What these modules come to import on their way; anything else is imported by each process.
_MODELS = tuple(f"transformers.models.{model}.modeling_{model}" for model in ("qwen3", "llama", "qwen2"))
_IMPORTS = {
    "services.trainer": ("services.trainer.trainer", "transformers.models.auto.modeling_auto", *_MODELS),
    "tests.kit.trainer_ranks": ("tests.kit.trainer_ranks", *_MODELS),
    ENGINE: (f"{ENGINE}.server",),
}


class Fork:
    """As much of `subprocess.Popen` as tests use."""

    def __init__(self, pid: int, ended: Future[int]) -> None:
        self.pid = pid
        self._ended = ended

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._ended.result() if self._ended.done() else None

    def wait(self, timeout: float | None = None) -> int:
        try:
            return self._ended.result(timeout)
        except TimeoutError:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0) from None

    async def ended(self, within_s: float) -> int:
        """Its exit status."""
        return await asyncio.to_thread(self.wait, within_s)

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Warm:
    """The one that is forked."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kit.warm"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'protos'}", "OMP_NUM_THREADS": "1"},
        )
        self._started: Future[int] = Future()
        self._ended: dict[int, Future[int]] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def prepare(self, module: str) -> None:
        """Has what `module` needs imported by the time that it is asked for: takes some seconds."""
        self._ask({"prepare": module})

    def start(
        self, module: str, *arguments: str, environment: Mapping[str, str], log: Path | None = None, before: str = ""
    ) -> Fork:
        """``python -m module arguments``. Output is appended to `log`; `before`, ``module:function``, is called first.

        Takes some seconds if `module` has not been prepared.
        """
        request = {"module": module, "arguments": arguments, "environment": dict(environment), "before": before}
        request["log"] = None if log is None else str(log)
        pid = self._ask(request)
        return Fork(pid, self._ended[pid])

    def _ask(self, request: dict[str, Any]) -> int:
        with self._lock:
            self._started = Future()
            assert self._process.stdin is not None
            print(json.dumps(request), file=self._process.stdin, flush=True)
            return self._started.result(60)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = json.loads(line)
            if "started" in event:
                self._ended[event["started"]] = Future()
                self._started.set_result(event["started"])
            else:
                self._ended[event["ended"]].set_result(event["status"])


_warm: Warm | None = None


def warm() -> Warm:
    """This test process's own. It ends with it, and all that it made."""
    global _warm
    if _warm is None:
        _warm = Warm()
    return _warm


def spawn(
    command: Sequence[str], *, log_path: Path, env: Mapping[str, str] | None = None, **how: Any
) -> Fork | subprocess.Popen[bytes]:
    """In place of `services.common.process.spawn`: engines of this project start warm."""
    if list(command[:3]) != [sys.executable, "-m", ENGINE]:
        return process.spawn(command, log_path=log_path, env=env, **how)
    log_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    log_path.touch(mode=0o600)
    inherited = {name: value for name, value in os.environ.items() if not process._configures(name)}
    return warm().start(ENGINE, *command[3:], environment={**inherited, **(env or {})}, log=log_path)


def main() -> None:
    die_with_parent(os.getppid())
    wakeup, alarm = os.pipe()
    os.set_blocking(alarm, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
    requests = sys.stdin.buffer
    while True:
        ready, _, _ = select.select([requests, wakeup], [], [])
        if wakeup in ready:
            os.read(wakeup, 4096)
            _reap()
        if requests in ready:
            if not (line := requests.readline()):
                return
            _serve(json.loads(line))


def _serve(request: dict[str, Any]) -> None:
    if "prepare" in request:
        _import(request["prepare"])
        _say({"started": 0})
        return
    _import(request["module"])
    gc.freeze()
    server = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become(server, request)
    _say({"started": pid})


def _import(module: str) -> None:
    for name in _IMPORTS.get(module, ()):
        importlib.import_module(name)


def _become(server: int, request: dict[str, Any]) -> NoReturn:
    """The process that was asked for, from here to its end."""
    die_with_parent(server)
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = request["log"]
    output = 2 if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = [request["module"], *request["arguments"]]
    if before := request["before"]:
        module, _, function = before.partition(":")
        getattr(importlib.import_module(module), function)()
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    sys.exit()


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            _say({"ended": ended[0], "status": os.waitstatus_to_exitcode(ended[1])})


def _say(event: dict[str, Any]) -> None:
    os.write(1, json.dumps(event).encode() + b"\n")


if __name__ == "__main__":
    main()
