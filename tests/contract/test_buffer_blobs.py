"""Blobs live as long as a sample refers to them, on the reference and on a real Valkey."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.buffer.blob_sweep import BlobSweep
from services.buffer.store import Store
from services.buffer.validation import generated
from services.common.blobs import Blobs
from services.common.config.models import LimitsConfig
from services.common.errors import DataLossError, InvalidArgumentError
from tests.contract.conftest import Start
from tests.kit.buffer_driver import Driver, released
from tests.unit.buffer.test_buffer_limits import sample


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path)


async def generate_with(driver: Driver, count: int, *refs: sample_pb2.BlobRef) -> None:
    lease = await driver.generate_lease(count)
    digests = tuple(ref.sha256 for ref in refs)
    await driver.store.complete_generate([replace(each, blobs=digests) for each in driver.generated(lease)])


def there(blobs: Blobs, *refs: sample_pb2.BlobRef) -> list[bool]:
    found = set(blobs.older_than(0))
    return [ref.sha256 in found for ref in refs]


async def test_a_blob_goes_when_its_last_sample_is_retired(start: Start, store: Store, blobs: Blobs) -> None:
    driver = await start()
    sweep = BlobSweep(store, blobs, asyncio.Event(), grace_s=0)
    shared, own, orphan = (blobs.put(data) for data in (b"shared", b"own", b"orphan"))
    await generate_with(driver, 2, shared, own)
    await generate_with(driver, 6, shared)
    assert await sweep.sweep() == 1
    assert there(blobs, shared, own, orphan) == [True, True, False]
    await driver.score()
    await driver.train(1)
    assert await sweep.sweep() == 0
    await driver.store.confirm_checkpoint(driver.epoch, 1)
    assert await sweep.sweep() == 1
    assert there(blobs, shared, own) == [True, False]
    await driver.publish(1)
    await driver.fill()
    await driver.train(2)
    await driver.store.confirm_checkpoint(driver.epoch, 2)
    await sweep.sweep()
    assert there(blobs, shared) == [False]


async def test_a_blob_goes_with_what_is_dropped_or_dies(start: Start, store: Store, blobs: Blobs) -> None:
    driver = await start(group_size=3, min_group_size=2)
    dead, dropped = blobs.put(b"dead"), blobs.put(b"dropped")
    await generate_with(driver, 1, dead)
    await generate_with(driver, 1, dropped)
    last = await store.lease_score("s", 1, payload=False)
    await store.release(2, released(last, pb.RELEASE_REASON_FATAL, error="x"))
    assert await store.referenced_blobs([dead.sha256, dropped.sha256]) == {dropped.sha256}
    last = await store.lease_score("s", 1, payload=False)
    drop = sample_pb2.DROP_REASON_FILTERED
    await store.release(2, released(last, pb.RELEASE_REASON_DROP, drop_reason=drop))
    assert await store.referenced_blobs([dead.sha256, dropped.sha256]) == set()


async def test_the_sweep_runs_when_it_is_wanted(start: Start, store: Store, blobs: Blobs) -> None:
    await start()
    orphan, wanted = blobs.put(b"orphan"), asyncio.Event()
    running = asyncio.create_task(BlobSweep(store, blobs, wanted, grace_s=0).run())
    wanted.set()
    async with asyncio.timeout(10):
        while there(blobs, orphan) == [True]:
            await asyncio.sleep(0.01)
    running.cancel()


def test_a_completion_whose_blob_is_not_there_is_refused(blobs: Blobs) -> None:
    message = sample()
    ref = blobs.put(b"routes")
    message.refs["router_replay"].CopyFrom(ref)

    def complete(to: Blobs | None) -> tuple[str, ...]:
        row = pb.CompletedSample(sample_id=message.sample_id, lease_id=1, sample=message.SerializeToString())
        request = pb.CompleteRequest(replica_id="r", samples=[row])
        return generated(request, LimitsConfig(), to)[0].blobs

    assert complete(blobs) == (ref.sha256,)
    with pytest.raises(InvalidArgumentError) as unknown:
        complete(None)
    assert unknown.value.field == "samples[0].sample.refs"
    assert blobs.remove(ref.sha256, 0)
    with pytest.raises(DataLossError) as missing:
        complete(blobs)
    assert missing.value.field == "samples[0].sample.refs[router_replay]"
