"""A reward server whose answers are known from the completion alone, and that fails in one way after the other.

Over real HTTP or gRPC, in a thread of its own, always on one port.
"""

from __future__ import annotations

import asyncio
import threading
import zlib
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc
from aiohttp import web

from polyhead.v1 import reward_pb2
from services.common.process import free_port
from tests.kit.reward_servers import GrpcServer, HttpServer

FAULTS = ("gone", "errors", "slow", "wrong types", "NaN", "half-closed")
LATENCY_S = 30.0


def reward_of(completion: str) -> float:
    """Within [0.25, 0.75): whatever else is recorded was invented."""
    return 0.25 + zlib.crc32(completion.encode()) / (1 << 33)


class FailingServer:
    """`fault` is what it does at present; "" to score."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.fault = ""
        self._port = free_port()
        self._server: HttpServer | GrpcServer
        if kind == "http":
            self._server = HttpServer(self._over_http, port=self._port)
        else:
            self._server = GrpcServer(self._over_grpc, port=self._port)
        self._half_closing: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()

    @property
    def url(self) -> str:
        return self._server.url

    def become(self, fault: str) -> None:
        """Returns when it is so."""
        self._call(self._become(fault))

    def _call(self, what: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(30)

    async def _become(self, fault: str) -> None:
        away = ("gone", "half-closed")
        if self.fault == "half-closed" and self._half_closing is not None:
            self._half_closing.close()
        if fault in away and self.fault not in away:
            await self._server.stop()
        if fault == "half-closed":
            self._half_closing = await asyncio.start_server(_half_close, "127.0.0.1", self._port)
        if fault not in away and self.fault in away:
            await self._server.start()
        self.fault = fault
        if isinstance(self._server, GrpcServer):
            self._server.delay_s = LATENCY_S if fault == "slow" else 0.0

    async def _over_http(self, body: dict[str, Any]) -> Any:
        if self.fault == "slow":
            await asyncio.sleep(LATENCY_S)
        answers: dict[str, Any] = {
            "errors": web.Response(status=500),
            "wrong types": {"score": [str(reward_of(body["response"]))]},
            "NaN": web.Response(body=b'{"score": NaN}', content_type="application/json"),
        }
        return answers.get(self.fault, {"score": reward_of(body["response"])})

    def _over_grpc(self, asked: reward_pb2.ScoreItem) -> Any:
        answers: dict[str, Any] = {
            "errors": grpc.StatusCode.INTERNAL,
            "wrong types": reward_pb2.ScoreResult(sample_id="another"),
            "NaN": float("nan"),
        }
        return answers.get(self.fault, reward_of(asked.completion))

    def run(self) -> None:
        self._loop.run_until_complete(self._server.start())
        self._loop.run_forever()

    def stop(self) -> None:
        self._call(self._become("gone"))
        self._loop.call_soon_threadsafe(self._loop.stop)


async def _half_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Promises an answer, sends no more, and goes on reading."""
    with suppress(OSError):
        await reader.read(1 << 16)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        writer.write_eof()
        while await reader.read(1 << 16):
            pass
    writer.close()


@contextmanager
def failing_server(kind: str) -> Iterator[FailingServer]:
    server = FailingServer(kind)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(10)
