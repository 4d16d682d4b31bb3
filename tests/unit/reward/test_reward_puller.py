"""The puller against a buffer over real gRPC: what it sends for each way a score can end, and how it leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.common.config.models import RewardConfig
from services.common.errors import PolyheadError
from services.reward import outbox, worker
from services.reward.stats import Stats
from services.reward.worker import Puller
from tests.kit.reward_fake_buffer import FakeBuffer, generated
from tests.kit.reward_items import BY_ORDER, running_pool


@pytest.fixture
async def buffer() -> AsyncIterator[FakeBuffer]:
    fake = FakeBuffer()
    await fake.start()
    yield fake
    await fake.stop()


@asynccontextmanager
async def pulling(
    buffer: FakeBuffer,
    scorer: str = BY_ORDER,
    *,
    max_inflight: int = 64,
    timeout_s: float = 10.0,
    retry_for_s: float = 60.0,
    paths: Sequence[str] = (),
) -> AsyncIterator[tuple[asyncio.Event, asyncio.Task[None], Stats]]:
    """A puller at work. Leaving the block stops it and waits for its end."""
    config = Config(reward=RewardConfig(max_inflight=max_inflight))
    stop, stats = asyncio.Event(), Stats(1)
    async with (
        running_pool(scorer, timeout_s=timeout_s, paths=paths) as pool,
        BufferClient(buffer.address, retry_for_s=retry_for_s) as client,
    ):
        task = asyncio.create_task(Puller(client, pool, "reward-0.test", config, stats).run(stop))
        try:
            yield stop, task, stats
        finally:
            stop.set()
            with suppress(PolyheadError):
                await task


async def test_samples_are_scored_and_completed_in_batches(buffer: FakeBuffer) -> None:
    buffer.add(*(generated(number, str(number), "7") for number in range(64)))
    async with pulling(buffer, "exact") as (_, _, stats):
        await buffer.until(lambda: len(buffer.scores) == 64)
        assert {name: score.reward for name, score in buffer.scores.items() if score.reward} == {"g00000001-007": 1.0}
        assert {score.scorer for score in buffer.scores.values()} == {"exact"}
        assert buffer.calls.count("Lease") <= 3
        assert buffer.calls.count("Complete") < 16
        assert stats.as_dict()["samples_scored"] == 64


async def test_parts_come_along(buffer: FakeBuffer) -> None:
    buffer.add(generated(0, "dict"))
    async with pulling(buffer):
        await buffer.until(lambda: buffer.scores)
    [score] = buffer.scores.values()
    assert (score.reward, dict(score.parts)) == (0.5, {"acc": 1.0, "length": 3.0})


async def test_failures_are_released_with_their_reason_and_no_score(buffer: FakeBuffer) -> None:
    buffer.add(*(generated(number, word) for number, word in enumerate(["raise it", "ok", "hang", "nan", "die", "ok"])))
    buffer.add(b"\xff\xff\xff")
    async with pulling(buffer, timeout_s=0.5) as (_, _, stats):
        await buffer.until(lambda: len(buffer.scores) == 2 and len(buffer.released) == 5)
        counted = stats.as_dict()
    by_id = {sample.sample_id: sample for sample in buffer.released}
    assert by_id.pop("broken-7").reason == pb.RELEASE_REASON_FATAL
    assert {sample.reason for sample in by_id.values()} == {pb.RELEASE_REASON_SAMPLE_ERROR}
    assert by_id["g00000001-000"].error.startswith("ValueError: cannot score it")
    assert by_id["g00000001-002"].error == "timed out after 0.5 s"
    assert by_id["g00000001-003"].error == "the returned reward is nan, not a finite number"
    assert by_id["g00000001-004"].error == "the scorer's process ended with status 7"
    assert [counted[name] for name in ("samples_scored", "failures", "timeouts", "deaths")] == [2, 4, 1, 1]


async def test_no_more_is_leased_than_max_inflight(buffer: FakeBuffer) -> None:
    buffer.add(*(generated(number, "sleep 0.02") for number in range(30)))
    most = 0
    async with pulling(buffer, max_inflight=8):
        while len(buffer.scores) < 30:
            most = max(most, len(buffer.leased))
            await asyncio.sleep(0.005)
    assert most == 8


async def test_samples_of_a_scorer_that_hangs_leave_room_for_the_others(buffer: FakeBuffer) -> None:
    def asks_for(scorer: str, number: int, word: str) -> sample_pb2.Sample:
        sample = generated(number, word)
        sample.prompt.metadata_json = f'{{"rm_type": "{scorer}"}}'
        return sample

    async with pulling(buffer, max_inflight=8, timeout_s=1.0):
        buffer.add(*(asks_for("bad", number, "wait") for number in range(20)))
        buffer.add(*(asks_for("good", number, "sleep 0.02") for number in range(20, 80)))
        await buffer.until(lambda: len(buffer.scores) == 60, timeout_s=60)
        assert len(buffer.released) < 20
    assert {sample.error for sample in buffer.released[:1]} == {"timed out after 1 s"}


async def test_leases_are_kept_alive_while_a_score_is_slow(buffer: FakeBuffer) -> None:
    buffer.lease_ttl_s = 0.3
    async with pulling(buffer):
        buffer.add(generated(0, "sleep 1"))
        await buffer.until(lambda: buffer.scores)
    assert 2 <= buffer.extended.count("g00000001-000") <= 12


async def test_a_lost_lease_is_let_go(buffer: FakeBuffer) -> None:
    buffer.lease_ttl_s = 0.3
    buffer.lost = {"g00000001-000"}
    async with pulling(buffer, max_inflight=1) as (_, _, stats):
        buffer.add(generated(0, "sleep 0.6"), generated(1, "ok"))
        await buffer.until(lambda: "g00000001-001" in buffer.scores)
        assert stats.as_dict()["samples_scored"] == 1
    assert set(buffer.scores) == {"g00000001-001"}


async def test_a_verdict_the_buffer_refuses_blocks_no_other(buffer: FakeBuffer) -> None:
    buffer.refuse = {"g00000001-005"}
    buffer.add(*(generated(number, "ok") for number in range(20)))
    async with pulling(buffer):
        await buffer.until(lambda: len(buffer.scores) == 19 and buffer.released)
    [released] = buffer.released
    assert (released.sample_id, released.reason) == ("g00000001-005", pb.RELEASE_REASON_SAMPLE_ERROR)
    assert "refused by the test" in released.error


async def test_a_buffer_that_fails_on_one_sample_does_not_end_the_puller(
    buffer: FakeBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks_on_five(verb: str) -> None:
        inner = getattr(buffer, verb)

        async def breaking(request: Any, context: Any) -> Any:
            if any(sample.sample_id == "g00000001-005" for sample in request.samples):
                raise KeyError("a bug")
            return await inner(request, context)

        monkeypatch.setattr(buffer, verb, breaking)

    for verb in ("Complete", "Release", "Extend"):
        breaks_on_five(verb)
    buffer.lease_ttl_s = 0.3
    await buffer.stop()
    await buffer.start()
    buffer.add(*(generated(number, "sleep 0.3") for number in range(12)))
    async with pulling(buffer) as (_, task, _):
        await buffer.until(lambda: len(buffer.scores) == 11)
        buffer.add(generated(12, "ok"))
        await buffer.until(lambda: len(buffer.scores) == 12)
        assert not task.done()
    assert "g00000001-005" not in buffer.scores


async def test_an_answer_that_is_too_big_does_not_end_the_puller(
    buffer: FakeBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "RETRY_S", 0.05)
    buffer.add(generated(0, "x" * (65 << 20)))
    async with pulling(buffer) as (_, task, _):
        await buffer.until(lambda: buffer.leased)
        buffer.add(generated(1, "ok"))
        await buffer.until(lambda: buffer.scores)
        assert not task.done()


async def test_an_outage_of_the_buffer_loses_nothing(buffer: FakeBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (outbox, worker):
        monkeypatch.setattr(module, "RETRY_S", 0.05)
    async with pulling(buffer, retry_for_s=0.3):
        buffer.add(*(generated(number, "sleep 0.05") for number in range(10)))
        await buffer.until(lambda: buffer.scores)
        await buffer.stop()
        await asyncio.sleep(1.5)  # longer than the client's own patience, longer than the scores take
        assert len(buffer.scores) < 10
        await buffer.start()
        buffer.add(generated(10, "ok"))
        await buffer.until(lambda: len(buffer.scores) == 11)


async def test_stop_finishes_what_is_quick_and_gives_back_the_rest(
    buffer: FakeBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "DRAIN_S", 0.5)
    buffer.add(*(generated(number, "ok") for number in range(5)), generated(5, "hang"), generated(6, "hang"))
    async with pulling(buffer) as (stop, task, _):
        await buffer.until(lambda: len(buffer.leased) == 2 and len(buffer.scores) == 5)
        stop.set()
        await task
    assert {(sample.sample_id, sample.reason) for sample in buffer.released} == {
        ("g00000001-005", pb.RELEASE_REASON_DRAIN),
        ("g00000001-006", pb.RELEASE_REASON_DRAIN),
    }
    assert buffer.leased == {}


async def test_what_is_being_fetched_keeps_its_lease_and_is_given_back_on_stop(
    buffer: FakeBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = asyncio.Event()
    monkeypatch.setattr(buffer, "Fetch", lambda request, context: never.wait())
    buffer.lease_ttl_s = 0.3
    await buffer.stop()
    await buffer.start()
    buffer.add(*(generated(number, "ok") for number in range(5)))
    async with pulling(buffer) as (stop, task, _):
        await buffer.until(lambda: len(buffer.extended) >= 10)
        stop.set()
        await task
    assert buffer.leased == {}
    assert {sample.reason for sample in buffer.released} == {pb.RELEASE_REASON_DRAIN}
    assert len(buffer.released) == 5
    never.set()


async def test_stop_ends_also_when_the_buffer_is_gone(buffer: FakeBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "DRAIN_S", 0.2)
    buffer.add(generated(0, "hang"))
    async with pulling(buffer) as (stop, task, _):
        await buffer.until(lambda: buffer.leased)
        await buffer.stop()
        stop.set()
        async with asyncio.timeout(5):
            await task


async def test_without_a_scorer_samples_are_given_back_uncounted(buffer: FakeBuffer, tmp_path: Path) -> None:
    module = tmp_path / "breaks_later.py"
    good = "import os\ndef fn(args, sample):\n    os._exit(1) if sample.response == 'die' else None\n    return 1\n"
    module.write_text(good)
    async with pulling(buffer, "breaks_later:fn", paths=[str(tmp_path)]) as (_, _, stats):
        module.write_text("raise RuntimeError('broken by a deployment')\n")
        buffer.add(generated(0, "die"), generated(1, "ok"))
        await buffer.until(lambda: len(buffer.released) >= 2)
        reasons = {sample.sample_id: sample.reason for sample in buffer.released}
        assert reasons == {
            "g00000001-000": pb.RELEASE_REASON_SAMPLE_ERROR,
            "g00000001-001": pb.RELEASE_REASON_UNAVAILABLE,
        }
        assert "broken by a deployment" in buffer.released[1].error
        module.write_text(good)
        await buffer.until(lambda: "g00000001-001" in buffer.scores)
        assert stats.as_dict()["failures"] == 1


async def test_a_refused_lease_ends_the_puller(buffer: FakeBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(request: object, context: object) -> None:
        raise PolyheadError("no such run", field="run")

    monkeypatch.setattr(buffer, "Lease", refuse)
    await buffer.stop()
    await buffer.start()
    async with pulling(buffer) as (_, task, _):
        with pytest.raises(PolyheadError, match="no such run"):
            await task
