"""Generation through sglang-router: one streamed request per sample, so that a lost engine takes its own only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import aiohttp
import orjson

from services.rollout.engines.client import (
    CALL_TIMEOUT_S,
    CONNECT_TIMEOUT_S,
    IDLE_TIMEOUT_S,
    sampling_params,
    streamed,
)
from services.rollout.engines.messages import (
    Chunk,
    EngineUnavailableError,
    Finish,
    GenerateRequest,
    RequestRefusedError,
)
from services.rollout.engines.stream import ChunkReader

# Chunks that wait for whoever takes them; beyond that, the streams are read no further.
_MERGED_MAX = 256
# What finished streams may take to end in order, which lets their connections be used again.
_ENDING_S = 0.5
_KEEPALIVE_S = 2.0

Merged = asyncio.Queue[tuple[int, Chunk] | Exception]


class RoutedClient:
    """One HTTP session to one life of the router. Close it when the router ends.

    The calls about workers raise EngineUnavailableError when the router does not answer in time, or refuses.
    """

    def __init__(self, url: str, key: str, *, idle_timeout_s: float = IDLE_TIMEOUT_S) -> None:
        self._url = url
        self._stream_timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=idle_timeout_s
        )
        self._heard: dict[asyncio.Timeout, float] = {}
        """Of each stream that is waited for: when it was last heard."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
            headers={"Authorization": f"Bearer {key}"},
            read_bufsize=1 << 20,
        )

    async def close(self) -> None:
        await self._session.close()

    async def generate(
        self, batch: Sequence[GenerateRequest], extra_key: str
    ) -> AsyncGenerator[tuple[int, Chunk], None]:
        """(index in the batch, new tokens) of all requests, as they come, until each has finished.

        A stream that breaks ends its own request only, as LOST; a request that is refused ends as ERROR. Close the
        iterator to abort.
        """
        merged: Merged = asyncio.Queue(_MERGED_MAX)
        streams = [
            asyncio.create_task(self._follow(index, request, extra_key, merged)) for index, request in enumerate(batch)
        ]
        running = len(streams)
        try:
            while running:
                item = await merged.get()
                if isinstance(item, Exception):
                    raise item
                index, chunk = item
                running -= chunk.finish is not None
                yield index, chunk
            await asyncio.wait(streams, timeout=_ENDING_S)
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)

    def drop_idle(self, seconds: float) -> None:
        """Ends the streams that have been silent for that long, as LOST."""
        now = asyncio.get_running_loop().time()
        for stream, heard in self._heard.items():
            if now - heard >= seconds and not stream.expired():
                stream.reschedule(now)

    async def _follow(self, index: int, request: GenerateRequest, extra_key: str, merged: Merged) -> None:
        """Puts the request's chunks; the last one, and no other, has a finish."""
        body = {
            # The router takes no batches, and drops every field that it does not know.
            "rid": request.rid,
            "input_ids": list(request.input_ids),
            "sampling_params": sampling_params(request),
            "extra_key": extra_key,
            "return_logprob": True,
            "stream": True,
        }
        total, finished = 0, False
        stream = streamed(self._session, self._url, body, ChunkReader(1), self._stream_timeout)
        try:
            async with aclosing(self._droppable(stream)) as chunks:
                async for chunk in chunks:
                    if finished:
                        continue
                    total, finished = chunk.total, chunk.finish is not None
                    await merged.put((index, chunk))
            end, reason = Finish.LOST, "the stream ended before the request had finished"
        except RequestRefusedError as error:
            end, reason = Finish.ERROR, str(error)
        except EngineUnavailableError as error:
            end, reason = Finish.LOST, str(error)
        except Exception as defect:  # whoever waits for this request's end has to see it
            await merged.put(defect)
            return
        if not finished:
            await merged.put((index, Chunk([], [], total, None, None, end, reason)))

    async def _droppable(self, stream: AsyncGenerator[tuple[int, Chunk], None]) -> AsyncGenerator[Chunk, None]:
        """The stream's chunks. `drop_idle` interrupts the waiting for one, never the taking of it."""
        loop = asyncio.get_running_loop()
        async with aclosing(stream):
            while True:
                try:
                    async with asyncio.timeout(None) as waiting:
                        self._heard[waiting] = loop.time()
                        _, chunk = await anext(stream)
                except StopAsyncIteration:
                    return
                except TimeoutError as error:
                    raise EngineUnavailableError("silent, and an engine was lost", field="router /generate") from error
                finally:
                    self._heard.pop(waiting, None)
                yield chunk

    async def healthy(self, timeout_s: float = CALL_TIMEOUT_S) -> bool:
        """Whether the router answers; it need not have workers."""
        try:
            await self._call("GET", "/health", timeout_s=timeout_s)
        except EngineUnavailableError:
            return False
        return True

    async def workers(self) -> Mapping[str, str]:
        """Address -> id of the engines that requests go to now."""
        answer = await self._call("GET", "/workers")
        try:
            return {worker["url"]: worker["id"] for worker in orjson.loads(answer)["workers"]}
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise EngineUnavailableError(f"cannot be read: {error!r}", field="router /workers") from error

    async def add_worker(self, url: str, key: str) -> None:
        """Queues an engine; `workers` lists it when it gets requests. `key` is what the router shows it."""
        await self._call("POST", "/workers", {"url": url, "api_key": key})

    async def remove_worker(self, worker_id: str) -> None:
        """Queues the removal. What streams from that engine goes on."""
        await self._call("DELETE", f"/workers/{worker_id}", missing_ok=True)

    async def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        missing_ok: bool = False,
    ) -> bytes:
        field = "router /" + path.split("/")[1]
        try:
            async with self._session.request(
                method,
                self._url + path,
                json=body,
                timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S),
            ) as response:
                content = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EngineUnavailableError(f"{type(error).__name__}: {error}".rstrip(": "), field=field) from error
        if response.status >= 300 and not (missing_ok and response.status == 404):
            raise EngineUnavailableError(
                f"HTTP {response.status}: {content[:200].decode(errors='replace')}", field=field
            )
        return content
