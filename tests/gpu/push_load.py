"""Streaming requests and when their tokens came: ``push_load.py URL KEY``, with JSON lines on both sides.

An answer has the "id" of its command.

{"start": {"first", "requests", "length", "prompt", "vocab"}} is answered by {} when each has some tokens,
{"finish": true} by {"requests": [{"arrivals": [[seconds, tokens], ...], "end"}]} when all have ended. Seconds are of
the machine's monotonic clock, which all of its processes share.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from services.common.errors import PolyheadError
from services.rollout.engines.client import EngineClient
from services.rollout.engines.messages import GenerateRequest

# Every request has so many before it counts as running.
FIRST_TOKENS = 8


@dataclass
class Stream:
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """When, and how many tokens there were then."""
    end: str = ""
    """How it ended."""

    async def run(self, client: EngineClient, request: GenerateRequest) -> None:
        count = 0
        try:
            async for _, chunk in client.generate([request], "push"):
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
    async with EngineClient(url, key) as client:
        while line := await reader.readline():
            command = json.loads(line)
            if "start" in command:
                requests = [_request(number, **command["start"]) for number in range(command["start"]["requests"])]
                streams = [Stream() for _ in requests]
                pairs = zip(streams, requests, strict=True)
                tasks = [asyncio.create_task(stream.run(client, request)) for stream, request in pairs]
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
