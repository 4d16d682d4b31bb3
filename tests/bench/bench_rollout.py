"""What the rollout service costs, beside a bare client of the same engine in the same run. `polyhead bench rollout`.

* `overhead_pct`: engine throughput lost between a bare asynchronous client and one rollout process with its buffer and
  store, by number of requests; both measured in turn, the medians compared.
* `tokens_lost_per_push`, `tokens_recomputed_per_push`, `pause_s`: over updates in place while requests run.
* `scaling_1_to_4`: throughput of four replicas over four times that of one, each over an engine of a fixed rate.
* `drain_256_s`: from the call until every partial is in the buffer.

On a CPU the engine is the in-house one at a fixed rate of tokens per request. Another engine that runs already is
measured with --url and --model (then without scaling, which would need four).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import stamina.instrumentation

from tests.bench.rollout_scene import Scene, open_scene
from tests.kit.engine_process import ADMIN_KEY, start_torch_engine
from tests.kit.tiny_model import build_tiny_qwen3

GROUP = 8
DECODE_RATE = 20.0
WARM_UP_S = 3.0
PUSHES = 5
DRAIN_REQUESTS = 256
SCALING_REQUESTS = 32


class Bench:
    """One engine under test, and how it is asked."""

    def __init__(self, url: str, model: Path, options: argparse.Namespace, directory: Path) -> None:
        self.url, self.model, self.options = url, model, options
        self._directory = directory
        self._scenes = 0

    @contextlib.asynccontextmanager
    async def scene(self, requests: int, urls: Sequence[str] | None = None) -> AsyncIterator[Scene]:
        """Replicas that keep `requests` in flight, each."""
        self._scenes += 1
        rollout = {
            "max_inflight": requests,
            "sampling": {"max_response_len": self.options.length},
            "engine": {"stream_interval": self.options.stream_interval, "kind": self.options.kind},
        }
        directory = self._directory / f"scene-{self._scenes}"
        async with open_scene(directory, self.model, urls or [self.url], self.options.key, rollout) as scene:
            yield scene

    async def service_rate(self, requests: int, urls: Sequence[str] | None = None) -> float:
        """Tokens per second that reach the replicas."""
        async with self.scene(requests, urls) as scene:
            await scene.until_running(requests * len(urls or [self.url]))
            await asyncio.sleep(WARM_UP_S)
            began, before = time.monotonic(), (await scene.totals())["tokens_generated"]
            await asyncio.sleep(self.options.seconds)
            after, elapsed = (await scene.totals())["tokens_generated"], time.monotonic() - began
        return (after - before) / elapsed

    async def bare_rate(self, requests: int) -> float:
        """Tokens per second that reach clients which do nothing but ask again: groups of eight, as the service does."""
        counted = 0

        async def client(session: aiohttp.ClientSession, number: int) -> None:
            nonlocal counted
            async for tokens in _groups(session, self.url, number, self.options):
                counted += tokens

        headers = {"Authorization": f"Bearer {self.options.key}"}
        timeout = aiohttp.ClientTimeout(total=None, sock_read=600)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
            clients = [asyncio.create_task(client(session, number)) for number in range(requests // GROUP)]
            while counted < requests:
                await asyncio.sleep(0.05)
            await asyncio.sleep(WARM_UP_S)
            began, before = time.monotonic(), counted
            await asyncio.sleep(self.options.seconds)
            rate = (counted - before) / (time.monotonic() - began)
            for task in clients:
                task.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
        return rate

    async def overhead(self, requests: int) -> dict[str, Any]:
        bare, service = [], []
        for _ in range(self.options.repeat):
            bare.append(await self.bare_rate(requests))
            service.append(await self.service_rate(requests))
        lost = 1 - statistics.median(service) / statistics.median(bare)
        return {"overhead_pct": round(100 * lost, 2), "bare_tokens_per_s": bare, "service_tokens_per_s": service}

    async def pushes(self, requests: int) -> dict[str, float]:
        async with self.scene(requests) as scene:
            await scene.until_running(requests)
            before = await scene.totals()
            pauses = []
            for _ in range(PUSHES):
                pauses.append(await scene.push())
                await asyncio.sleep(0.5)
            after = await scene.totals()
        grown = {name: (after[name] - before[name]) / PUSHES for name in before}
        return {
            "tokens_lost_per_push": grown["tokens_discarded"],
            "tokens_recomputed_per_push": grown["tokens_recomputed"],
            "push_pause_p50_s": statistics.median(pauses),
            "push_pause_max_s": max(pauses),
        }

    async def drain(self, requests: int) -> dict[str, float]:
        async with self.scene(requests) as scene:
            await scene.until_running(requests)
            returned, seconds = await scene.drain()
        return {"drain_256_s": round(seconds, 3), "drain_samples": returned}


async def _groups(
    session: aiohttp.ClientSession, url: str, number: int, options: argparse.Namespace
) -> AsyncIterator[int]:
    """New tokens of each event, group after group."""
    sampling = {"max_new_tokens": options.length, "temperature": 1.0, "sampling_seed": number}
    while True:
        body = {
            "input_ids": [[20 + number % 64, 30, 31, 32]] * GROUP,
            "sampling_params": [sampling] * GROUP,
            "return_logprob": True,
            "stream": True,
        }
        known = [0] * GROUP
        async with session.post(f"{url}/generate", data=orjson.dumps(body), headers=_JSON) as response:
            response.raise_for_status()
            rest = b""
            async for data in response.content.iter_any():
                *events, rest = (rest + data).split(b"\n\n")
                for event in events:
                    if event.startswith(b"data: {"):
                        answer = orjson.loads(event.removeprefix(b"data: "))
                        index, total = answer.get("index", 0), answer["meta_info"]["completion_tokens"]
                        yield total - known[index]
                        known[index] = total


_JSON = {"Content-Type": "application/json"}


async def measure(bench: Bench, urls: Sequence[str]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    by_requests = {str(requests): await bench.overhead(requests) for requests in bench.options.requests}
    figures["overhead_pct"] = max(each["overhead_pct"] for each in by_requests.values())
    figures["overhead"] = by_requests
    figures |= await bench.pushes(max(bench.options.requests))
    figures |= await bench.drain(DRAIN_REQUESTS)
    if urls:
        one = await bench.service_rate(SCALING_REQUESTS, urls[:1])
        four = await bench.service_rate(SCALING_REQUESTS, urls[:4])
        figures["scaling_1_to_4"] = round(four / (4 * one), 4)
        figures["scaling_tokens_per_s"] = {"1": one, "4": four}
    return figures


@contextlib.contextmanager
def _paced_engines(directory: Path, count: int, slots: int) -> Iterator[tuple[Path, list[str]]]:
    """In-house engines of a fixed rate over a random model that never ends a completion by itself."""
    model = build_tiny_qwen3(directory / "model", eos_token_id=None, max_position_embeddings=512)
    flags = ["--incremental-streaming-output", "--skip-tokenizer-init", "--max-running-requests", str(slots)]
    flags += ["--decode-rate", str(DECODE_RATE)]
    with ExitStack() as stack:
        engines = [
            stack.enter_context(start_torch_engine(model, context_length=512, flags=tuple(flags))) for _ in range(count)
        ]
        yield model, [engine.url for engine in engines]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    # Waiting for a service to come up is no news.
    stamina.instrumentation.set_on_retry_hooks([])
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        directory = Path(name)
        if options.url:
            model, urls, more = options.model, [options.url], []
        else:
            slots = max(DRAIN_REQUESTS, *options.requests)
            model, urls = stack.enter_context(_paced_engines(directory, 4, slots))
            more = urls
        bench = Bench(urls[0], model, options, directory)
        figures = asyncio.run(measure(bench, more))
    figures["conditions"] = {
        "engine": options.kind if options.url else f"in-house, {DECODE_RATE:g} tokens/s per request",
        "model": options.label,
        "requests": options.requests,
        "length": options.length,
        "stream_interval": options.stream_interval,
        "window_s": options.seconds,
        "windows": options.repeat,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "store": "Valkey, AOF always",
    }
    content = orjson.dumps(figures, option=orjson.OPT_INDENT_2) + b"\n"
    if options.json:
        options.json.write_bytes(content)
    sys.stdout.buffer.write(content)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="polyhead bench rollout", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--requests", type=int, nargs="+", default=[256], help="in flight, multiples of 8")
    parser.add_argument("--length", type=int, default=100, help="tokens of a completion")
    parser.add_argument("--seconds", type=float, default=15.0, help="of one throughput measurement")
    parser.add_argument("--repeat", type=int, default=2, help="measurements of each side")
    parser.add_argument("--stream-interval", type=int, default=8, help="of the engine")
    parser.add_argument("--url", help="an engine that runs already")
    parser.add_argument("--model", type=Path, help="its model directory")
    parser.add_argument("--label", default="random Qwen3, 2 layers, hidden 64", help="its model in words")
    parser.add_argument("--kind", default="torch", choices=("torch", "sglang"))
    parser.add_argument("--key", default=ADMIN_KEY, help="its admin key")
    options = parser.parse_args(arguments)
    if options.url and not options.model:
        parser.error("--url needs --model")
    return options


if __name__ == "__main__":
    main()
