"""The routes that need no key: generation, health, information."""

from __future__ import annotations

import asyncio
import dataclasses
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import orjson
from aiohttp import web

from services.rollout.engines.torch_engine.engine import Engine
from services.rollout.engines.torch_engine.http_json import read_object, refusal, reply
from services.rollout.engines.torch_engine.replies import Reply

HEALTH_TIMEOUT_S = 20.0


class ServingRoutes:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/generate", self.generate),
            web.get("/health", self.health),
            web.get("/health_generate", self.health_generate),
            web.get("/model_info", self.model_info),
            web.get("/get_model_info", self.model_info),
            web.get("/server_info", self.server_info),
            web.get("/get_server_info", self.server_info),
            web.get("/v1/loads", self.loads),
        ]

    async def generate(self, request: web.Request) -> web.StreamResponse:
        generation = self._engine.parser.parse(await read_object(request))
        if self._engine.memory.asleep:
            return _asleep(self._engine)
        answer = self._engine.submit(generation)
        try:
            if generation.stream:
                return await _stream(request, answer)
            content = await answer.answer()
            return refusal(answer.failure[1], answer.failure[0]) if answer.failure else reply(content)
        finally:
            # The client went away, or writing failed.
            if answer.unfinished:
                self._engine.abort(list(answer.unfinished))

    async def health(self, _: web.Request) -> web.Response:
        if not self._engine.thread.alive:
            return refusal("the engine's thread has ended", 503)
        if self._engine.memory.asleep:
            return _asleep(self._engine)
        if self._engine.updates.state == "torn":
            return refusal("the weights are torn: nothing is generated until an update brings every tensor", 503)
        return web.Response(status=200)

    async def health_generate(self, request: web.Request) -> web.Response:
        """Generates one token, unless the engine is held back on purpose."""
        response = await self.health(request)
        if response.status != 200 or self._engine.thread.paused or not self._engine.updates.whole:
            return response
        probe = self._engine.parser.parse(
            {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        )
        answer = self._engine.submit(probe)
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await answer.answer()
        except TimeoutError:
            self._engine.abort(list(answer.unfinished))
            return refusal(f"no token within {HEALTH_TIMEOUT_S:g} s", 503)
        return response

    async def model_info(self, _: web.Request) -> web.Response:
        options = self._engine.options
        return reply(
            {
                "model_path": str(options.model_path),
                "tokenizer_path": str(options.model_path),
                "is_generation": True,
                "weight_version": self._engine.scheduler.weight_version,
                "architectures": [self._engine.model_config.architecture],
                "vocab_size": self._engine.model_config.vocab_size,
                "context_length": self._engine.context_length,
            }
        )

    async def server_info(self, _: web.Request) -> web.Response:
        options: dict[str, Any] = dataclasses.asdict(self._engine.options)
        options["admin_api_key"] = "***" if options["admin_api_key"] else None
        for name in ("model_path", "shared_weights_dir"):
            options[name] = str(options[name]) if options[name] is not None else None
        return reply({**options, **self._engine.info(), "version": _version()})

    async def loads(self, _: web.Request) -> web.Response:
        """One entry, as of an SGLang without data parallelism. There are core figures only."""
        load = await self._engine.thread.call(self._engine.load)
        return reply({"version": _version(), "dp_rank_count": 1, "loads": [load]})


def _asleep(engine: Engine) -> web.Response:
    return refusal(f"asleep: it has given up {', '.join(sorted(engine.memory.asleep))}", 503)


async def _stream(request: web.Request, answer: Reply) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    while events := await answer.events():
        await response.write(b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in events))
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def _version() -> str:
    try:
        return version("polyhead")
    except PackageNotFoundError:
        return "0+checkout"
