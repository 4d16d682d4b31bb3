"""An engine of the HTTP API that generates by formula and fails on demand: for faults the real engines do not show.

The token at an absolute position depends on the seed and the position only, so a resumed completion is exact.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

EOS = 2


def token_at(seed: int, position: int) -> int:
    """A printable token of the tiny tokenizer: never a special one."""
    return 3 + (seed * 31 + position * 17) % 60


def logprob_of(token: int) -> float:
    return -0.25 - (token % 8) / 8


@dataclass
class Running:
    """One request on the fake engine."""

    rid: str
    prompt: list[int]
    params: dict[str, Any]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    aborted: bool = False
    sent: int = 0


class FakeEngine:
    """Serves on a free port of this process. Knobs are plain attributes."""

    def __init__(self) -> None:
        self.version = "default"
        self.chunk_tokens = 2
        self.delay_s = 0.0
        self.incremental = True
        self.spans_in_every_event = True
        self.report_versions = True
        self.context_length = 64
        self.go = asyncio.Event()
        """Generation proceeds while set."""
        self.go.set()
        self.limit_tokens: int | None = None
        """All requests stop making tokens after this many, without finishing."""
        self.nan_at: tuple[int, int] | None = None
        """(index in the batch, token) whose log-prob is NaN."""
        self.refuse_containing: int | None = None
        """Requests whose prompt holds this token get HTTP 400."""
        self.abort_all_after: int | None = None
        """Every request is ended as aborted once it has this many tokens."""
        self.stop_after: int | None = None
        """Every request samples EOS as this token."""
        self.fail_update: str | None = None
        """The answer to update_weights_from_distributed: a reason."""
        self.fail_update_touched: bool | None = None
        self.hang_update = False
        self.on_load: Callable[[], None] = lambda: None
        """What a custom weight loader does."""
        self.token_at_abort: int | None = None
        """Comes with the end of every request that is aborted: of the pass that was under way."""
        self.info: dict[str, Any] = {}
        """Added to what it says about itself."""
        self.fail_pause = False
        self.fail_generate: int | None = None
        """The status of every generation."""
        self.requests: list[dict[str, Any]] = []
        """Bodies of /generate; a single request is shown as a batch of one."""
        self.keys: list[str] = []
        """What they were authorised with."""
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.running: dict[str, Running] = {}
        self.paused: str | None = None
        self.url = ""
        self._unpaused = asyncio.Event()
        self._unpaused.set()
        self._transports: set[Any] = set()
        self._runner: web.AppRunner | None = None

    async def start(self, port: int = 0) -> None:
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_get("/health", self._ok)
        app.router.add_get("/health_generate", self._ok)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get("/model_info", self._server_info)
        app.router.add_post("/{verb}", self._admin)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self._runner is not None:
            self.cut()
            await self._runner.cleanup()
            self._runner = None

    def cut(self) -> None:
        """Every connection breaks, as when the process is killed."""
        for transport in self._transports:
            transport.abort()

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    async def _ok(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "kind": "fake_engine",
                "version": "1",
                "context_length": self.context_length,
                "weight_version": self.version,
                **self.info,
            }
        )

    async def _admin(self, request: web.Request) -> web.Response:
        name, body = request.match_info["verb"], await request.json()
        self.calls.append((name, body))
        match name:
            case "pause_generation":
                if self.fail_pause:
                    return web.json_response({"error": "no"}, status=500)
                self.paused = body["mode"]
                self._unpaused.clear()
                if body["mode"] == "abort":
                    self._abort(body)
            case "continue_generation":
                self.paused = None
                self._unpaused.set()
            case "abort_request":
                self._abort({} if body.get("abort_all") else {"rid": body["rid"]})
            case "update_weights_from_distributed":
                if self.hang_update:
                    await asyncio.sleep(30)
                if self.fail_update is not None:
                    answer: dict[str, Any] = {"success": False, "message": self.fail_update}
                    if self.fail_update_touched is not None:
                        answer["weights_touched"] = self.fail_update_touched
                    return web.json_response(answer, status=400)
                self.version = body["weight_version"] or self.version
            case "update_weights_from_tensor":
                await asyncio.to_thread(self.on_load)
                self.version = body["weight_version"]
            case "update_weights_from_disk":
                if self.fail_update is not None:
                    return web.json_response({"success": False, "message": self.fail_update}, status=400)
                self.version = body["weight_version"]
        return web.json_response({"success": True, "message": ""})

    def _abort(self, body: dict[str, Any]) -> None:
        for rid, running in self.running.items():
            if rid == body.get("rid", rid):
                running.aborted = True
                if self.token_at_abort is not None:
                    self._append(running, self.token_at_abort)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if isinstance(body["rid"], str):
            body |= {name: [body[name]] for name in ("rid", "input_ids", "sampling_params")}
        self.requests.append(body)
        self.keys.append(request.headers.get("Authorization", ""))
        if self.fail_generate is not None:
            return web.json_response({"error": {"message": "no"}}, status=self.fail_generate)
        if self.refuse_containing is not None and any(self.refuse_containing in ids for ids in body["input_ids"]):
            return web.json_response({"error": {"message": "bad token"}}, status=400)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self._transports.add(request.transport)
        batch = [
            Running(rid, ids, params)
            for rid, ids, params in zip(body["rid"], body["input_ids"], body["sampling_params"], strict=True)
        ]
        self.running.update({running.rid: running for running in batch})
        try:
            await self._stream(response, batch)
        except ConnectionResetError:
            pass  # the client has gone: that aborts its requests
        finally:
            self._transports.discard(request.transport)
            for running in batch:
                self.running.pop(running.rid, None)
        return response

    async def _stream(self, response: web.StreamResponse, batch: Sequence[Running]) -> None:
        left = dict(enumerate(batch))
        while left:
            await asyncio.sleep(self.delay_s)
            halted = not self.go.is_set() or not self._unpaused.is_set()
            for index, running in list(left.items()):
                if not halted and not self._to_abort(running):
                    self._advance(running, index)
                finish = self._finish(running)
                if finish is not None:
                    del left[index]
                if finish is not None or len(running.tokens) > running.sent:
                    await response.write(b"data: " + self._event(index, running, finish) + b"\n\n")
            if halted:
                await asyncio.sleep(0.005)
        await response.write(b"data: [DONE]\n\n")

    def _advance(self, running: Running, index: int) -> None:
        limit = running.params["max_new_tokens"]
        if self.limit_tokens is not None:
            limit = min(limit, self.limit_tokens)
        for _ in range(min(self.chunk_tokens, limit - len(running.tokens))):
            position = len(running.prompt) + len(running.tokens)
            token = token_at(running.params["sampling_seed"], position)
            if self.stop_after is not None and len(running.tokens) + 1 == self.stop_after:
                token = EOS
            nan = self.nan_at == (index, len(running.tokens))
            self._append(running, token)
            if nan:
                running.logprobs[-1] = float("nan")
            if token == EOS:
                break

    def _append(self, running: Running, token: int) -> None:
        running.tokens.append(token)
        running.logprobs.append(logprob_of(token))
        running.versions.append(self.version)

    def _to_abort(self, running: Running) -> bool:
        return running.aborted or (self.abort_all_after is not None and len(running.tokens) >= self.abort_all_after)

    def _finish(self, running: Running) -> dict[str, Any] | None:
        if self._to_abort(running):
            return {"type": "abort", "message": "Aborted", "status_code": None}
        if running.tokens and running.tokens[-1] == EOS:
            return {"type": "stop", "matched": EOS}
        if len(running.tokens) >= running.params["max_new_tokens"]:
            return {"type": "length", "length": len(running.tokens)}
        return None

    def _event(self, index: int, running: Running, finish: dict[str, Any] | None) -> bytes:
        start = running.sent if self.incremental else 0
        running.sent = len(running.tokens)
        meta: dict[str, Any] = {
            "id": running.rid,
            "finish_reason": finish,
            "completion_tokens": len(running.tokens),
            "output_token_logprobs": [
                [logprob, token, None]
                for logprob, token in zip(running.logprobs[start:], running.tokens[start:], strict=True)
            ],
            "weight_version": self.version,
        }
        if self.report_versions and (self.spans_in_every_event or finish is not None):
            meta["weight_versions"] = _spans(running.versions)
        return json.dumps({"index": index, "output_ids": running.tokens[start:], "meta_info": meta}).encode()


def _spans(versions: Sequence[str]) -> list[dict[str, Any]]:
    spans: list[dict[str, Any]] = []
    for position, version in enumerate(versions):
        if spans and spans[-1]["version"] == version:
            spans[-1]["end"] = position + 1
        else:
            spans.append({"version": version, "start": position, "end": position + 1})
    return spans
