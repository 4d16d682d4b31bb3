"""The buffer's client and the heartbeat: what they do while the buffer is away, and when it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.buffer_client import BufferClient
from services.common.errors import FencedError, InvalidArgumentError, LimitError, PolyheadError, UnavailableError
from services.common.process import free_port
from services.common.registration import keep_registered
from services.common.versions import Version
from tests.kit.reward_fake_buffer import FakeBuffer, generated


@pytest.fixture
async def buffer() -> AsyncIterator[FakeBuffer]:
    fake = FakeBuffer()
    await fake.start()
    yield fake
    await fake.stop()


async def test_a_call_waits_out_a_restart_of_the_buffer(buffer: FakeBuffer) -> None:
    async with BufferClient(buffer.address) as client:
        await client.register_replica(pb.Replica(replica_id="before"))
        await buffer.stop()
        waiting = asyncio.create_task(client.register_replica(pb.Replica(replica_id="during")))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        await buffer.start()
        await waiting
    assert [replica.replica_id for replica in buffer.replicas] == ["before", "during"]


async def test_a_long_poll_goes_on_after_a_restart(buffer: FakeBuffer) -> None:
    async with BufferClient(buffer.address) as client:
        waiting = asyncio.create_task(client.lease(sample_pb2.STAGE_SCORE, "r", max_samples=4, wait_s=20))
        await buffer.until(lambda: buffer.calls == ["Lease"])
        await buffer.stop()
        await buffer.start()
        buffer.add(generated(0, "42"))
        response = await waiting
    assert [sample.sample_id for group in response.groups for sample in group.samples] == ["g00000001-000"]


async def test_a_long_poll_that_finds_nothing_says_what_it_waits_for(buffer: FakeBuffer) -> None:
    async with BufferClient(buffer.address) as client:
        response = await client.lease(sample_pb2.STAGE_SCORE, "r", max_samples=4, wait_s=0.05)
    assert response.waiting_for.reason == "generation"


async def test_a_buffer_that_stays_away_is_unavailable() -> None:
    address = f"127.0.0.1:{free_port()}"
    async with BufferClient(address, retry_for_s=0.3) as client:
        with pytest.raises(UnavailableError, match="buffer GetLedger failed: UNAVAILABLE") as caught:
            await client.get_ledger()
    assert caught.value.field == address


@pytest.mark.parametrize(
    "refusal", [InvalidArgumentError("no", field="samples[0]"), FencedError("epoch 3 came", field="epoch")]
)
async def test_a_refusal_is_raised_at_once(buffer: FakeBuffer, refusal: Exception) -> None:
    calls = 0

    async def refuse(request: Any, context: Any) -> None:
        nonlocal calls
        calls += 1
        raise refusal

    buffer.CommitStep = refuse  # type: ignore[attr-defined]
    await buffer.stop()
    await buffer.start()
    async with BufferClient(buffer.address) as client:
        with pytest.raises(type(refusal), match=str(refusal).replace("[", r"\[")):
            await client.commit_step(1, 2, 3)
    assert calls == 1


async def test_a_busy_store_is_asked_again(buffer: FakeBuffer) -> None:
    answers = iter([UnavailableError("the store does not answer"), None])

    async def flaky(request: Any, context: Any) -> pb.PublishVersionResponse:
        if (error := next(answers)) is not None:
            raise error
        assert Version.from_proto(request.version) == Version(2, 57)
        return pb.PublishVersionResponse()

    buffer.PublishVersion = flaky  # type: ignore[attr-defined]
    await buffer.stop()
    await buffer.start()
    async with BufferClient(buffer.address) as client:
        assert await client.publish_version(Version(2, 57)) == pb.PublishVersionResponse()


async def test_a_verb_the_server_does_not_know_is_not_asked_again(buffer: FakeBuffer) -> None:
    async with BufferClient(buffer.address) as client:
        async with asyncio.timeout(10):
            with pytest.raises(PolyheadError, match=grpc.StatusCode.UNIMPLEMENTED.name) as caught:
                await client.acquire_epoch("me")
    assert type(caught.value) is PolyheadError


async def test_a_bug_of_the_buffer_is_no_outage(buffer: FakeBuffer) -> None:
    async def breaks(request: Any, context: Any) -> None:
        raise KeyError("a bug")

    buffer.Extend = breaks  # type: ignore[method-assign]
    await buffer.stop()
    await buffer.start()
    async with BufferClient(buffer.address) as client:
        with pytest.raises(PolyheadError, match="buffer Extend failed: UNKNOWN") as caught:
            await client.extend("r", [])
    assert type(caught.value) is PolyheadError


async def test_a_message_that_is_too_big_is_over_a_limit(buffer: FakeBuffer) -> None:
    buffer.add(generated(0, "x" * (1 << 21)))
    async with BufferClient(buffer.address, message_mb=1) as client:
        with pytest.raises(LimitError, match="buffer Lease failed: RESOURCE_EXHAUSTED"):
            await client.lease(sample_pb2.STAGE_SCORE, "r", max_samples=1)


async def test_a_lease_keeps_its_request_id_when_repeated_and_only_then(buffer: FakeBuffer) -> None:
    seen: list[str] = []

    async def flaky(request: Any, context: Any) -> pb.LeaseResponse:
        seen.append(request.request_id)
        if len(seen) == 1:
            raise UnavailableError("the store does not answer")
        return pb.LeaseResponse()

    buffer.Lease = flaky  # type: ignore[method-assign]
    await buffer.stop()
    await buffer.start()
    async with BufferClient(buffer.address) as client:
        for _ in range(2):
            await client.lease(sample_pb2.STAGE_SCORE, "r", max_samples=1)
        await client.lease(sample_pb2.STAGE_TRAIN, "t", epoch=1, step=1)
    assert seen[0] == seen[1] != seen[2]
    assert all(seen[:3])
    assert seen[3] == ""


class Heart:
    """A running heartbeat whose state the test changes."""

    def __init__(self, client: BufferClient, interval_s: float) -> None:
        self.state = pb.REPLICA_STATE_JOINING
        self.changed = asyncio.Event()
        self.task = asyncio.create_task(keep_registered(client, self._describe, self.changed, interval_s))

    def _describe(self) -> pb.Replica:
        return pb.Replica(replica_id="r", state=self.state)


async def test_the_heartbeat_repeats(buffer: FakeBuffer) -> None:
    async with BufferClient(buffer.address) as client:
        heart = Heart(client, 0.02)
        await buffer.until(lambda: len(buffer.replicas) >= 4)
        heart.task.cancel()


async def test_the_heartbeat_tells_a_change_at_once(buffer: FakeBuffer) -> None:
    async with BufferClient(buffer.address) as client:
        heart = Heart(client, 1000)
        await buffer.until(lambda: buffer.replicas)
        heart.state = pb.REPLICA_STATE_SERVING
        heart.changed.set()
        await buffer.until(lambda: buffer.replicas[-1].state == pb.REPLICA_STATE_SERVING)
        assert len(buffer.replicas) == 2
        heart.task.cancel()


async def test_after_an_outage_the_heartbeat_tells_the_present(buffer: FakeBuffer) -> None:
    async with BufferClient(buffer.address, retry_for_s=0.2) as client:
        heart = Heart(client, 0.05)
        await buffer.until(lambda: buffer.replicas)
        await buffer.stop()
        await asyncio.sleep(0.5)
        heart.state = pb.REPLICA_STATE_QUARANTINED
        buffer.replicas.clear()
        await buffer.start()
        await buffer.until(lambda: buffer.replicas)
        await asyncio.sleep(0.2)
        assert not heart.task.done()
        assert buffer.replicas[-1].state == pb.REPLICA_STATE_QUARANTINED
        heart.task.cancel()


async def test_a_refused_registration_is_raised(buffer: FakeBuffer) -> None:
    async def refuse(request: Any, context: Any) -> None:
        raise InvalidArgumentError("is empty", field="replica.replica_id")

    buffer.RegisterReplica = refuse  # type: ignore[method-assign]
    await buffer.stop()
    await buffer.start()
    async with BufferClient(buffer.address) as client:
        with pytest.raises(InvalidArgumentError, match="replica_id: is empty"):
            await Heart(client, 1).task
