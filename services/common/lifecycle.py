"""How a service process begins and ends: configuration, logging, signals, exit codes."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
import uvloop

from services.common.config import Config, load
from services.common.errors import PolyheadError
from services.common.process import keep_freed_memory, keep_loaded
from services.common.telemetry import configure_logging

log = structlog.get_logger()

STOPPED_EARLY = 5
"""Exit status of a process that was told to stop before its work was complete: no failure, and no success either."""

Serve = Callable[[Config, "Process"], Awaitable[int | None]]
"""A service's life; what it returns is its exit status, None standing for 0."""


@dataclass(frozen=True)
class Process:
    """What a service knows about its own process."""

    role: str
    index: int
    """Which of the launcher's processes of this role it is."""
    replica_id: str
    """Unique per process start."""
    stop: asyncio.Event
    """Set by the first SIGTERM or SIGINT: stop admitting, give work back, leave."""


def run_service(role: str, serve: Serve) -> int:
    """Runs one service until it ends or is told to stop; the return value is the exit status.

    A typed error becomes one line on standard error and its own exit status. A second signal ends the process at once.
    """
    arguments = _parse(role)
    try:
        config = load(arguments.config)
        configure_logging(role, arguments.index)
        _set_title(role, arguments.index)
        keep_freed_memory()
        return uvloop.run(_serve(role, arguments.index, config, serve)) or 0
    except PolyheadError as error:
        log.error("ended", error=type(error).__name__, reason=str(error))
        print(f"polyhead {role}: {error}", file=sys.stderr)
        return error.exit_code


async def _serve(role: str, index: int, config: Config, serve: Serve) -> int | None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)
        log.info("stopping")
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    process = Process(role, index, f"{role}-{index}.{uuid.uuid4().hex[:8]}", stop)
    keep_loaded()
    log.info("starting", replica_id=process.replica_id, pid=os.getpid())
    status = await serve(config, process)
    log.info("stopped")
    return status


def _parse(role: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m services.{role}")
    parser.add_argument("-c", "--config", type=Path, required=True, help="the run's TOML file")
    parser.add_argument("--index", type=int, default=0, help="which replica of this role it is")
    return parser.parse_args()


def _set_title(role: str, index: int) -> None:
    import setproctitle

    setproctitle.setproctitle(f"polyhead-{role}-{index}")
