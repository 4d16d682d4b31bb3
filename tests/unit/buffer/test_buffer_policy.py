"""The pure decisions: staleness through forks, deadlines, lengths, ids, frames, lines of waiting leasers."""

from __future__ import annotations

import asyncio
import itertools
import random
import time

import pytest

from polyhead.v1 import sample_pb2
from services.buffer import partials, policy
from services.buffer.ids import SampleRef, parse_sample_id, sample_id
from services.buffer.memory_store import MemoryStore
from services.buffer.memory_watch import MemoryWatch
from services.buffer.records import StateCount, Waiting
from services.buffer.settings import run_params
from services.buffer.wakeups import Wakeups
from services.common.config import load
from services.common.errors import InvalidArgumentError
from services.common.versions import Version, steps_between


def test_the_effective_step_measures_like_steps_between() -> None:
    rng = random.Random(0)
    for _ in range(300):
        forks: dict[int, int] = {}
        for epoch in range(1, rng.randint(2, 5)):
            forks[epoch] = rng.randint(0, 12)
        now = Version(max(forks), forks[max(forks)] + rng.randint(0, 5))
        version = Version(rng.randint(1, now.epoch), rng.randint(0, 15))
        if version.epoch == now.epoch:
            version = Version(now.epoch, min(version.step, now.step))
        distance = now.step - policy.effective_step(version, forks, now.epoch)
        assert distance == steps_between(version, now, forks)


def feasible(step: int, size: int, dues: list[int]) -> bool:
    """Whether batches of `size` at `step`, step + 1, … can take all groups in time."""
    in_time = all(
        sum(due <= at for due in dues) <= (at - step + 1) * size for at in range(step, max([step, *dues]) + 1)
    )
    return in_time and min([step, *dues]) >= step


def test_blocking_agrees_with_trying_every_choice() -> None:
    """Waiting is right just when training now would lose a group that waiting for it could save."""
    rng = random.Random(1)
    for _ in range(2000):
        size = rng.randint(1, 3)
        groups = [(rng.randint(5, 8), rng.random() < 0.6) for _ in range(rng.randint(size, 7))]
        ready = sorted(due for due, is_ready in groups if is_ready)
        if len(ready) < size:
            continue
        chosen, kept = ready[:size], ready[size:]
        left = kept + [due for due, is_ready in groups if not is_ready]
        blocking = policy.blocking_group(5, size, chosen, [(due, n, False) for n, due in enumerate(left)])
        now_is_fine = feasible(6, size, left)
        every = [due for due, _ in groups]
        saved_by_waiting = any(
            feasible(6, size, _without(every, choice)) for choice in itertools.combinations(every, size)
        )
        if now_is_fine:
            assert blocking is None
        elif saved_by_waiting:
            assert blocking is not None


def _without(dues: list[int], taken: tuple[int, ...]) -> list[int]:
    rest = list(dues)
    for due in taken:
        rest.remove(due)
    return rest


def test_nothing_blocks_for_groups_that_only_their_own_step_may_train() -> None:
    assert policy.blocking_group(5, 1, [9], [(6, 1, True), (6, 2, True)]) is None
    assert policy.blocking_group(5, 1, [9], [(6, 1, True), (6, 2, False)]) == 2


def test_versions_are_merged_by_epoch() -> None:
    versions = [Version(2, 5), Version(1, 9), Version(2, 3), Version(1, 9)]
    assert policy.merge_versions(versions) == ((1, 9, 9), (2, 3, 5))


def test_length_bias_compares_means() -> None:
    consumed, dropped = sample_pb2.SAMPLE_STATE_CONSUMED, sample_pb2.SAMPLE_STATE_DROPPED
    counts = [
        StateCount(consumed, 0, 10, 100, 10),
        StateCount(sample_pb2.SAMPLE_STATE_RETIRED, 0, 10, 300, 10),
        StateCount(dropped, sample_pb2.DROP_REASON_STALE, 4, 90, 3),
        StateCount(dropped, sample_pb2.DROP_REASON_FILTERED, 4, 0, 0),
    ]
    assert policy.length_bias(counts) == {"STALE": pytest.approx(30 / 20)}
    assert policy.length_bias(counts[2:]) == {}


def test_every_reason_reads_well() -> None:
    assert policy.describe(Waiting("deadline", (12,))) == ("group deadline: g00000012 must be trained first", 1)
    assert policy.describe(Waiting("below", (2, 7))) == ("replica below the published version e2.s7", 0)
    for code in policy.REASONS:
        assert policy.describe(Waiting(code, (1, 2, 3, 4)))[0]


def test_sample_ids_are_read_strictly() -> None:
    assert parse_sample_id("g00000012-003", "x") == SampleRef(12, 3)
    assert parse_sample_id(sample_id(10**9, 12345), "x") == SampleRef(10**9, 12345)
    for text in (
        "",
        "g12-3",
        "g00000012-003 ",
        "g000000012-003",
        "g00000012-0003",
        "g0000001２-003",
        "g00000012-003\n",
    ):
        with pytest.raises(InvalidArgumentError, match=r"f: .* is not a sample id"):
            parse_sample_id(text, "f")


def test_frames_come_apart_again() -> None:
    deltas = [b"", b"a", b"x" * 300]
    assert partials.split(b"".join(map(partials.frame, deltas))) == deltas


def test_settings_resolve_their_defaults() -> None:
    config = load(
        None, {"batch.rollout_batch_size": 4, "batch.n_samples_per_prompt": 3, "batch.over_sampling_batch_size": 6}
    )
    params = run_params(config, None)
    assert (params.batch_groups, params.surplus_groups, params.min_group_size) == (4, 2, 3)
    assert policy.live_limit(params) == 5 * 4 + 2


async def test_calls_go_to_one_waiter_each_in_order() -> None:
    wakeups, woken = Wakeups(), []

    async def wait(name: str) -> None:
        with wakeups.queue(1) as ticket:
            await ticket.wait(10)
            woken.append(name)

    tasks = [asyncio.create_task(wait(name)) for name in "abc"]
    await asyncio.sleep(0)
    wakeups.wake(2)
    wakeups.wake(1)
    await asyncio.sleep(0.01)
    assert woken == ["a"]
    wakeups.wake_all(1)
    await asyncio.gather(*tasks)
    assert woken == ["a", "b", "c"]


async def test_a_call_that_was_not_needed_is_passed_on() -> None:
    wakeups = Wakeups()
    with wakeups.queue(1):
        waiter = asyncio.create_task(_wait(wakeups))
        await asyncio.sleep(0)
        wakeups.wake(1)
    await asyncio.wait_for(waiter, 5)


async def test_each_kind_of_leaser_has_a_line_of_its_own() -> None:
    """Those who may not have what arrived do not keep it from those who may."""
    wakeups, woken = Wakeups(), []

    async def wait(name: str) -> None:
        with wakeups.queue(1, kind=name[0]) as ticket:
            if await ticket.wait(10):
                woken.append(name)

    tasks = [asyncio.create_task(wait(name)) for name in ("a1", "a2", "b1")]
    await asyncio.sleep(0)
    wakeups.wake(1)
    await asyncio.sleep(0.01)
    assert woken == ["a1", "b1"]
    for task in tasks:
        task.cancel()


async def test_however_many_wait_only_the_first_looks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.buffer.wakeups.RECHECK_S", 0.01)
    wakeups = Wakeups()
    looks = 0

    async def wait() -> None:
        nonlocal looks
        while True:
            with wakeups.queue(1) as ticket:
                looks += 1
                await ticket.wait(10)

    began = time.monotonic()
    tasks = [asyncio.create_task(wait()) for _ in range(1000)]
    while looks < 1000 + 10:
        await asyncio.sleep(0.01)
    assert looks <= 1000 + (time.monotonic() - began) / 0.01
    for task in tasks:
        task.cancel()


async def _wait(wakeups: Wakeups) -> None:
    with wakeups.queue(1) as ticket:
        await ticket.wait(10)


async def test_the_memory_watch_closes_and_opens() -> None:
    class Filling(MemoryStore):
        used = 0

        async def used_memory(self) -> int:
            return self.used

    store = Filling()
    watch = MemoryWatch(store, max_memory_mb=10)
    verdicts = []
    for megabytes in (7, 7.5, 8, 9, 7):
        store.used = int(megabytes * (1 << 20))
        await watch.look()
        verdicts.append((watch.admit, watch.checkpoint_wanted))
    assert verdicts == [(True, False), (True, True), (False, True), (False, True), (True, False)]
