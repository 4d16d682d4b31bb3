"""One process of the pool: ``python -m services.reward.pool_process FD PARENT``.

It answers on a socket it inherits. Frames are msgpack: first the settings, answered with ``[true, ""]`` or
``[false, reason]``; then lists of items, each item answered as soon as it is scored and before the next one begins,
so that the parent always knows which item this process is on.
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import msgpack

from services.common.process import die_with_parent
from services.reward.scorers import build
from services.reward.scorers.base import Item, SampleError, Scorer

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
        scorer = _load(connection, next(frames))
        for items in frames:
            for item in items:
                connection.sendall(_pack(_answer(scorer, Item(*item))))


def _frames(connection: socket.socket) -> Iterator[Any]:
    """What the parent sends, until it closes its end."""
    unpacker = msgpack.Unpacker(max_buffer_size=0)
    while data := connection.recv(_CHUNK):
        unpacker.feed(data)
        yield from unpacker


def _load(connection: socket.socket, settings: dict[str, Any]) -> Scorer:
    try:
        scorer = build(settings["name"], paths=settings["paths"], args=settings["args"])
    except BaseException as error:  # user code runs here, and may even call sys.exit
        connection.sendall(_pack([False, _one_line(getattr(error, "reason", None) or _describe(error))]))
        raise SystemExit(0) from None
    connection.sendall(_pack([True, ""]))
    return scorer


def _answer(scorer: Scorer, item: Item) -> list[Any]:
    """``[reward, parts, "", seconds]``, or ``[None, None, reason, seconds]``."""
    begun = time.perf_counter()
    try:
        verdict = scorer(item)
    except SampleError as error:
        return [None, None, _one_line(str(error)), time.perf_counter() - begun]
    except BaseException as error:  # a scorer may raise anything, SystemExit included
        return [None, None, _one_line(_describe(error)), time.perf_counter() - begun]
    return [verdict.reward, verdict.parts, "", time.perf_counter() - begun]


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
