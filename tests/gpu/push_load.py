"""Streaming requests and when their tokens came: ``push_load.py URL KEY``, with JSON lines on both sides.

An answer has the "id" of its command.

{"start": {"first", "requests", "length", "prompt", "vocab", "every"}} is answered by {} when each has some tokens, of
which the engine sends `every` so many at a time,
{"finish": true} by {"requests": [{"arrivals": [[seconds, tokens], ...], "end"}]} when all have ended. Seconds are of
the machine's monotonic clock, which all of its processes share.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from services.common.errors import PolyheadError
from services.rollout.engines.client import sampling_params, streamed
from services.rollout.engines.messages import GenerateRequest
from services.rollout.engines.stream import ChunkReader

# Every request has so many before it counts as running.
FIRST_TOKENS = 8


@dataclass
class Stream:
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """When, and how many tokens there were then."""
    end: str = ""
    """How it ended."""

    async def run(self, session: aiohttp.ClientSession, url: str, request: GenerateRequest, every: int) -> None:
        count = 0
        body = {
            "rid": [request.rid],
            "input_ids": [list(request.input_ids)],
            "sampling_params": [sampling_params(request) | {"stream_interval": every}],
            "extra_key": "push",
            "return_logprob": True,
            "stream": True,
        }
        try:
            async for _, chunk in streamed(session, url, body, ChunkReader(1), aiohttp.ClientTimeout(total=None)):
                count += len(chunk.token_ids)
                self.arrivals.append((time.monotonic(), count))
                if chunk.finish is not None:
                    self.end = chunk.finish.value
        except PolyheadError as error:
            self.end = str(error)

    @property
    def runs(self) -> bool:
        return bool(self.end) or (bool(self.arrivals) and self.arrivals[-1][1] >= FIRST_TOKENS)


async def main(url: str, key: str) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    streams: list[Stream] = []
    tasks: list[asyncio.Task[None]] = []
    # Its own collections of garbage would look like pauses.
    gc.disable()
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(connector=connector, headers=headers, read_bufsize=1 << 20) as session:
        while line := await reader.readline():
            command = json.loads(line)
            if "start" in command:
                every = command["start"].pop("every")
                requests = [_request(number, **command["start"]) for number in range(command["start"]["requests"])]
                streams = [Stream() for _ in requests]
                pairs = zip(streams, requests, strict=True)
                tasks = [asyncio.create_task(stream.run(session, url, request, every)) for stream, request in pairs]
                while not all(stream.runs for stream in streams):
                    await asyncio.sleep(0.01)
                answer: dict[str, Any] = {}
            else:
                await asyncio.gather(*tasks)
                answer = {"requests": [{"arrivals": each.arrivals, "end": each.end} for each in streams]}
            print(json.dumps({**answer, "id": command["id"]}), flush=True)


def _request(
    number: int, *, first: int, requests: int, length: int, prompt: int, vocab: int, label: str
) -> GenerateRequest:
    """`first`: the number of the first of these `requests`, which are drawn by their numbers."""
    assert number < requests
    draw = random.Random(first + number)
    return GenerateRequest(
        rid=f"{label}-{first + number}",
        input_ids=[draw.randrange(3, vocab) for _ in range(prompt)],
        max_new_tokens=length,
        temperature=1.0,
        top_p=1.0,
        top_k=-1,
        stop=[],
        stop_token_ids=[],
        sampling_seed=first + number,
    )


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
