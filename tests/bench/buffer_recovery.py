"""With ten thousand live samples of 8k tokens in the store: a restart of the buffer, another trainer, and memory."""

from __future__ import annotations

import asyncio
import time

from polyhead.v1 import sample_pb2
from services.buffer.redis_store import RedisStore
from services.common.buffer_client import BufferClient
from services.common.versions import Version
from tests.bench.buffer_flow import STEP_SAMPLES, ThroughGrpc, payload
from tests.bench.buffer_scene import Scene, scene

LIVE_STEPS = 157
"""Of samples: 10,048."""
UNDONE_STEPS = 4
"""Steps that the first trainer commits after the checkpoint that the second one comes back to."""
_MEMORY_MB = 3072
_FREED_S = 2.0
"""The store frees in the background."""


async def measure_recovery() -> dict[str, float]:
    """`recovery_s`, `takeover_s`, `bytes_per_payload_byte`, and what is left in memory when all has been retired."""
    with scene(max_staleness=LIVE_STEPS + UNDONE_STEPS, max_memory_mb=_MEMORY_MB, appendfsync="always") as place:
        store = RedisStore(place.server.url, run_name="bench")
        client = ThroughGrpc(place.address)
        version = await client.begin()
        empty, samples = await store.used_memory(), 0
        while samples < LIVE_STEPS * STEP_SAMPLES:
            if samples:  # the last ones stay to be scored
                await client.score()
            samples += await client.generate(version)
        payload_bytes = samples * len(payload("g00000000-000", "g00000000", 0, version))
        held = await store.used_memory() - empty
        await client.close()
        recovery_s = await _restart(place)
        takeover_s = await _take_over_and_train(place, version)
        await asyncio.sleep(_FREED_S)
        left = await store.used_memory() - empty
        await store.close()
    return {
        "live_samples": samples,
        "recovery_s": round(recovery_s, 2),
        "takeover_s": round(takeover_s, 3),
        "bytes_per_payload_byte": round(held / payload_bytes, 3),
        "bytes_per_payload_byte_retired": round(left / payload_bytes, 4),
    }


async def _restart(place: Scene) -> float:
    """From the start of a buffer whose predecessor was killed until it has answered a lease with samples."""
    place.kill_buffer()
    began = time.monotonic()
    place.start_buffer()
    await asyncio.to_thread(place.wait_until_up)
    client = ThroughGrpc(place.address)
    assert await client.score()
    answered, _ = client.leases[0]
    await client.close()
    return answered - began


async def _take_over_and_train(place: Scene, first: Version) -> float:
    """A trainer dies in the middle of a step; from AcquireEpoch of the next one until its first batch has come."""
    async with BufferClient(place.address) as client:
        for step in range(1, UNDONE_STEPS + 1):
            await _step(client, Version(first.epoch, step))
        await _lease(client, Version(first.epoch, UNDONE_STEPS + 1))
        began = time.monotonic()
        epoch = (await client.acquire_epoch("second", known_epoch=first.epoch)).epoch
        await client.recover(epoch, 0)
        await client.publish_version(Version(epoch, 0))
        await _lease(client, Version(epoch, 1))
        took = time.monotonic() - began
        for step in range(1, LIVE_STEPS + 1):
            await _step(client, Version(epoch, step))
        await client.confirm_checkpoint(epoch, LIVE_STEPS)
    return took


async def _lease(client: BufferClient, version: Version) -> int:
    lease = await client.lease(sample_pb2.STAGE_TRAIN, "t", epoch=version.epoch, step=version.step)
    assert sum(bool(each.sample) for group in lease.groups for each in group.samples) == STEP_SAMPLES
    return int(lease.batch_lease_id)


async def _step(client: BufferClient, version: Version) -> None:
    await client.commit_step(*version, await _lease(client, version))
    await client.publish_version(version)
