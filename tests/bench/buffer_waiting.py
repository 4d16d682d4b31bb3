"""Ten thousand leases that wait, over a hundred connections: what they cost, and whom one arrival wakes."""

from __future__ import annotations

import asyncio
import time

import psutil

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.buffer_client import BufferClient
from services.common.versions import Version
from tests.bench.buffer_flow import payload

CONNECTIONS, WAITING, OPENED_PER_S = 100, 10_000, 1_600
WAIT_S, SETTLE_S, WINDOW_S = 58.0, 15.0, 10.0


async def measure_waiting(address: str, pid: int) -> dict[str, float]:
    """`pid` is the buffer's. Its run is new."""
    clients = [BufferClient(address) for _ in range(CONNECTIONS)]
    first, process = clients[0], psutil.Process(pid)
    version = Version((await first.acquire_epoch("bench")).epoch, 0)
    await first.recover(version.epoch, 0)
    await first.publish_version(version)
    lease = await first.lease(sample_pb2.STAGE_GENERATE, "r", max_samples=1, weight_version=version)
    group, leased = lease.groups[0], lease.groups[0].samples[0]
    before = process.memory_info().rss
    waiting = []
    began = time.monotonic()
    for number in range(WAITING):
        client = clients[number % CONNECTIONS]
        call = client.lease(sample_pb2.STAGE_SCORE, f"s{number}", max_samples=1, wait_s=WAIT_S)
        waiting.append(asyncio.create_task(call))
        await asyncio.sleep(max(0.0, began + number / OPENED_PER_S - time.monotonic()))
    await asyncio.sleep(SETTLE_S)
    cpu, at = _cpu(process), time.monotonic()
    await asyncio.sleep(WINDOW_S)
    share = (_cpu(process) - cpu) / (time.monotonic() - at)
    memory = process.memory_info().rss - before
    sample = payload(leased.sample_id, group.group_id, leased.index, version)
    completed = pb.CompletedSample(sample_id=leased.sample_id, lease_id=leased.lease_id, sample=sample)
    asked = sum(call.done() for call in waiting)
    await first.complete(sample_pb2.STAGE_GENERATE, "r", [completed])
    await asyncio.sleep(1.0)
    woken = sum(call.done() for call in waiting) - asked
    for call in waiting:
        call.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    for client in clients:
        await client.close()
    return {
        "waiting_leases": WAITING - asked,
        "waiting_leases_core_pct": round(100 * share, 2),
        "waiting_leases_mb": round(memory / 2**20),
        "answered_per_arrival": woken,
    }


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system
