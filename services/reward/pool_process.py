"""One process of the pool: ``python -m services.reward.pool_process FD PARENT``.

It answers on a socket it inherits. Frames are msgpack: first the settings, answered with ``["", ""]`` or
``[reason, field]``; then lists of ``[kind, item]``, where kind is the item's class. Each is answered as soon as it is
done and before the next one begins, so that the parent always knows which one this process is on.
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import msgpack

from services.common.errors import ConfigError
from services.common.process import die_with_parent
from services.reward.filters import FIELD, GroupFilter, GroupItem, WaitingItem
from services.reward.jobs import FailureKind
from services.reward.scorers.base import SampleError, ScorerUnavailableError
from services.reward.scoring import scoring

Plugin = Callable[[Any], Any]
_CHUNK = 1 << 18
_MAX_REASON = 500


def main() -> None:
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as connection:
        # A process that a user's function starts must not hold the connection open after this one has died.
        connection.set_inheritable(False)
        frames = _frames(connection)
        plugins = _load(connection, next(frames))
        for items in frames:
            for kind, item in items:
                connection.sendall(_pack(_answer(plugins[kind], item)))


def _frames(connection: socket.socket) -> Iterator[Any]:
    """What the parent sends, until it closes its end."""
    unpacker = msgpack.Unpacker(max_buffer_size=0)
    while data := connection.recv(_CHUNK):
        unpacker.feed(data)
        yield from unpacker


def _load(connection: socket.socket, settings: dict[str, Any]) -> dict[str, Plugin]:
    """What answers each kind of item. When something does not load, it says so and ends the process."""
    search = [Path(path) for path in settings["paths"]]
    plugins: dict[str, Plugin] = {}
    field = "reward.scorer"
    try:
        plugins |= scoring(settings)
        field = FIELD
        if settings["filter"]:
            judge = GroupFilter(settings["filter"], search, settings["args"])
            plugins[GroupItem.__name__] = lambda item: judge(GroupItem(*item))
        field = "reward.buffer_filter"
        if settings["buffer_filter"]:
            prefer = _buffer_filter(settings, search)
            plugins[WaitingItem.__name__] = lambda item: prefer(WaitingItem(*item))
    except BaseException as error:  # user code runs here, and may even call sys.exit
        said = getattr(error, "reason", None) or _describe(error)
        field = error.field if isinstance(error, ConfigError) and error.field else field
        connection.sendall(_pack([_one_line(said), field]))
        raise SystemExit(0) from None
    connection.sendall(_pack(["", ""]))
    return plugins


def _buffer_filter(settings: dict[str, Any], search: list[Path]) -> Plugin:
    from services.reward.waiting import BufferFilter  # brings gRPC in, which no other plugin needs

    return BufferFilter(settings["buffer_filter"], search, settings["args"], settings["buffer_address"])


def _answer(plugin: Plugin, item: list[Any]) -> list[Any]:
    """``["", "", seconds, answer]``, or ``[failure, reason, seconds, None]``."""
    begun = time.perf_counter()
    try:
        answer = plugin(item)
    except SampleError as error:
        failure, reason = FailureKind.RAISED, str(error)
    except ScorerUnavailableError as error:
        failure, reason = FailureKind.UNAVAILABLE, str(error)
    except BaseException as error:  # a scorer may raise anything, SystemExit included
        failure, reason = FailureKind.RAISED, _describe(error)
    else:
        return ["", "", time.perf_counter() - begun, answer]
    return [failure, _one_line(reason), time.perf_counter() - begun, None]


def _pack(frame: list[Any]) -> bytes:
    packed: bytes = msgpack.packb(frame, unicode_errors="replace")
    return packed


def _describe(error: BaseException) -> str:
    """``ValueError: what it says (file.py:12)``, where the line is the innermost one."""
    where = _innermost(error.__traceback__)
    return f"{type(error).__name__}: {error}" + (f" ({where})" if where else "")


def _innermost(trace: TracebackType | None) -> str:
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_MAX_REASON]


if __name__ == "__main__":
    main()
