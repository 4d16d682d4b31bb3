"""Reward servers elsewhere, over real HTTP and gRPC, with faults to order."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from aiohttp import web

from polyhead.v1 import reward_pb2, reward_pb2_grpc
from services.common.config.remote import RemoteConfig
from services.common.process import free_port
from services.reward.remote.station import RemoteStation

# Patience for tests: faults and recoveries take tenths of seconds.
QUICK: dict[str, Any] = {
    "timeout_s": 1.0,
    "connect_timeout_s": 1.0,
    "attempts": 3,
    "backoff_s": 0.02,
    "max_backoff_s": 0.05,
    "batch_delay_s": 0.005,
    "breaker_failures": 5,
    "breaker_reset_s": 0.1,
    "breaker_max_reset_s": 0.2,
    "max_response_kb": 64,
}


@dataclass
class HttpServer:
    """Answers each POST with what `answer` makes of its JSON: a response, or what goes into one as JSON."""

    answer: Callable[[dict[str, Any]], Any]
    port: int = field(default_factory=free_port)
    calls: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    tls: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/score"

    async def start(self) -> None:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self.tls).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.calls.append(body)
        self.headers.append(dict(request.headers))
        self.paths.append(request.path)
        answer = self.answer(body)
        if asyncio.iscoroutine(answer):
            answer = await answer
        if answer is HANG_UP:
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        return answer if isinstance(answer, web.StreamResponse) else web.json_response(answer)


HANG_UP = object()
"""The connection is closed without an answer."""


@asynccontextmanager
async def http_server(answer: Callable[[dict[str, Any]], Any], **fields: Any) -> AsyncIterator[HttpServer]:
    server = HttpServer(answer, **fields)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@dataclass
class GrpcServer(reward_pb2_grpc.RewardServiceServicer):
    """Answers each item with what `answer` says: a number, a ScoreError, a whole result, or it raises."""

    answer: Callable[[reward_pb2.ScoreItem], Any]
    port: int = field(default_factory=free_port)
    batches: list[list[str]] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    credentials: grpc.ServerCredentials | None = None
    delay_s: float = 0.0

    def __post_init__(self) -> None:
        self._server: grpc.aio.Server | None = None

    @property
    def url(self) -> str:
        return f"grpc://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = grpc.aio.server()
        reward_pb2_grpc.add_RewardServiceServicer_to_server(self, self._server)
        if self.credentials is None:
            self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        else:
            self._server.add_secure_port(f"127.0.0.1:{self.port}", self.credentials)
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        self.batches.append([item.sample_id for item in request.items])
        self.metadata.append({str(key): str(value) for key, value in context.invocation_metadata() or ()})
        await asyncio.sleep(self.delay_s)
        results = []
        for item in request.items:
            answer = self.answer(item)
            if isinstance(answer, grpc.StatusCode):
                await context.abort(answer, "ordered by the test")
            results.append(_result(item.sample_id, answer))
        return reward_pb2.ScoreResponse(results=results)


def _result(sample_id: str, answer: Any) -> reward_pb2.ScoreResult:
    if isinstance(answer, reward_pb2.ScoreResult):
        return answer
    result = reward_pb2.ScoreResult(sample_id=sample_id)
    if isinstance(answer, reward_pb2.ScoreError):
        result.error.CopyFrom(answer)
    else:
        result.score.reward = answer
    return result


@asynccontextmanager
async def grpc_server(answer: Callable[[reward_pb2.ScoreItem], Any], **fields: Any) -> AsyncIterator[GrpcServer]:
    server = GrpcServer(answer, **fields)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def remote(kind: str, urls: str | Sequence[str], **settings: Any) -> AsyncIterator[RemoteStation]:
    """A station for servers of a kind, with little patience."""
    station = RemoteStation(RemoteConfig.model_validate({**QUICK, "kind": kind, "urls": urls, **settings}))
    await station.start()
    try:
        yield station
    finally:
        await station.close()
