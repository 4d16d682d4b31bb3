"""Ten thousand leases that wait, over a hundred connections: what they cost, and whom one arrival wakes."""

from __future__ import annotations

import asyncio
import time

import psutil
from redis.asyncio import Redis

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.buffer_client import BufferClient
from services.common.versions import Version
from tests.bench.buffer_flow import GROUP_SIZE, payload
from tests.bench.buffer_load import cpu_s
from tests.bench.buffer_scene import Scene

CONNECTIONS, WAITING, OPENED_PER_S = 100, 10_000, 1_600
WAIT_S, SETTLE_S, WINDOW_S = 58.0, 15.0, 8.0
ARRIVALS = GROUP_SIZE


async def measure_waiting(place: Scene) -> dict[str, float]:
    """The cost of those that wait in vain, then of single samples that arrive for them, one after the other.

    `woken_per_arrival` is how often the buffer looks into the store for a waiting lease because of an arrival: the
    calls of scripts while samples arrive, less those of a while without arrivals and the arrivals themselves.
    """
    clients = [BufferClient(place.address) for _ in range(CONNECTIONS)]
    first, process = clients[0], psutil.Process(place.pid)
    store = Redis.from_url(place.server.url)
    version = Version((await first.acquire_epoch("bench")).epoch, 0)
    await first.recover(version.epoch, 0)
    await first.publish_version(version)
    lease = await first.lease(sample_pb2.STAGE_GENERATE, "r", max_samples=ARRIVALS, weight_version=version)
    before = process.memory_info().rss
    waiting = []
    began = time.monotonic()
    for number in range(WAITING):
        client = clients[number % CONNECTIONS]
        call = client.lease(sample_pb2.STAGE_SCORE, f"s{number}", max_samples=1, wait_s=WAIT_S)
        waiting.append(asyncio.create_task(call))
        await asyncio.sleep(max(0.0, began + number / OPENED_PER_S - time.monotonic()))
    await asyncio.sleep(SETTLE_S)
    cpu, looks, at = cpu_s(place.pid), await _script_calls(store), time.monotonic()
    await asyncio.sleep(WINDOW_S)
    idle_s = time.monotonic() - at
    share = (cpu_s(place.pid) - cpu) / idle_s
    idle_looks = await _script_calls(store) - looks
    memory = process.memory_info().rss - before
    still_waiting = sum(not call.done() for call in waiting)
    looks, at = await _script_calls(store), time.monotonic()
    for group in lease.groups:
        for each in group.samples:
            sample = payload(each.sample_id, group.group_id, each.index, version)
            completed = pb.CompletedSample(sample_id=each.sample_id, lease_id=each.lease_id, sample=sample)
            await first.complete(sample_pb2.STAGE_GENERATE, "r", [completed])
            await asyncio.sleep(WINDOW_S / ARRIVALS)
    busy_s = time.monotonic() - at
    looks = await _script_calls(store) - looks - ARRIVALS - round(idle_looks * busy_s / idle_s)
    answered = sum(call.done() and not call.exception() and bool(call.result().groups) for call in waiting)
    for call in waiting:
        call.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    for client in clients:
        await client.close()
    await store.aclose()
    return {
        "waiting_leases": still_waiting,
        "waiting_leases_core_pct": round(100 * share, 2),
        "waiting_leases_mb": round(memory / 2**20),
        "answered_per_arrival": round(answered / ARRIVALS, 2),
        "woken_per_arrival": round(looks / ARRIVALS, 2),
    }


async def _script_calls(store: Redis) -> int:
    return int((await store.info("commandstats"))["cmdstat_evalsha"]["calls"])
