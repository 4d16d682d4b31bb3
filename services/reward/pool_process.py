"""One process of the pool: ``python -m services.reward.pool_process FD PARENT``.

It answers on a socket it inherits. Frames are msgpack: first the settings, answered with ``["", ""]`` or
``[reason, field]``; then lists of items to score and groups to judge, each answered as soon as it is done and before
the next one begins, so that the parent always knows which one this process is on.
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import msgpack

from services.common.process import die_with_parent
from services.reward.filters import FIELD, GroupFilter, GroupItem, WaitingItem
from services.reward.scorers import build
from services.reward.scorers.base import Item, SampleError, Scorer
from services.reward.scorers.builtin import Options

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
        scorer, judge, prefer = _load(connection, next(frames))
        for items in frames:
            for item in items:
                if len(item) == len(GroupItem._fields):
                    call: Callable[[], tuple[Any, Any]] = partial(_plugin, judge, GroupItem(*item))
                elif len(item) == len(WaitingItem._fields):
                    call = partial(_plugin, prefer, WaitingItem(*item))
                else:
                    call = partial(_score, scorer, Item(*item))
                connection.sendall(_pack(_answer(call)))


def _frames(connection: socket.socket) -> Iterator[Any]:
    """What the parent sends, until it closes its end."""
    unpacker = msgpack.Unpacker(max_buffer_size=0)
    while data := connection.recv(_CHUNK):
        unpacker.feed(data)
        yield from unpacker


def _load(connection: socket.socket, settings: dict[str, Any]) -> tuple[Scorer, Plugin | None, Plugin | None]:
    paths, args = settings["paths"], settings["args"]
    search = [Path(path) for path in paths]
    field = "reward.scorer"
    try:
        scorer = build(settings["name"], paths=paths, args=args, options=_options(settings))
        field = FIELD
        judge = GroupFilter(settings["filter"], search, args) if settings["filter"] else None
        field = "reward.buffer_filter"
        prefer = _buffer_filter(settings, search) if settings["buffer_filter"] else None
    except BaseException as error:  # user code runs here, and may even call sys.exit
        connection.sendall(_pack([_one_line(getattr(error, "reason", None) or _describe(error)), field]))
        raise SystemExit(0) from None
    connection.sendall(_pack(["", ""]))
    return scorer, judge, prefer


def _options(settings: dict[str, Any]) -> Options:
    return Options(**{field.name: settings[field.name] for field in fields(Options)})


def _buffer_filter(settings: dict[str, Any], search: list[Path]) -> Plugin:
    from services.reward.waiting import BufferFilter  # brings gRPC in, which no other plugin needs

    return BufferFilter(settings["buffer_filter"], search, settings["args"], settings["buffer_address"])


def _score(scorer: Scorer, item: Item) -> tuple[float, dict[str, float]]:
    return scorer(item)


def _plugin(plugin: Plugin | None, item: Any) -> tuple[Any, None]:
    if plugin is None:
        raise SampleError("this process has no such filter")
    return plugin(item), None


def _answer(call: Callable[[], tuple[Any, Any]]) -> list[Any]:
    """``[reward, parts, "", seconds]``, ``[answer, None, "", seconds]``, or ``[None, None, reason, seconds]``."""
    begun = time.perf_counter()
    try:
        value, parts = call()
    except SampleError as error:
        return [None, None, _one_line(str(error)), time.perf_counter() - begun]
    except BaseException as error:  # a scorer may raise anything, SystemExit included
        return [None, None, _one_line(_describe(error)), time.perf_counter() - begun]
    return [value, parts, "", time.perf_counter() - begun]


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
