"""One pool, several scorers: one that is slow, hangs or spins leaves the others what is theirs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from services.reward import pool as pool_module
from services.reward.filters import GroupItem, ScoredItem
from services.reward.jobs import FailureKind, Job, Result
from services.reward.lanes import MAX_WINDOW, Lanes, lane_of
from services.reward.pool import ScorerPool
from services.reward.scorers.base import Item
from tests.kit.reward_items import BY_ORDER, item, running_pool

PATIENCE_S = 60
FOR_EVER_S = 1000.0


def named(word: str, scorer: str) -> Item:
    return item(word, metadata_json=f'{{"rm_type": "{scorer}"}}')


async def test_others_go_on_although_every_process_hangs() -> None:
    async with running_pool(BY_ORDER, processes=2, timeout_s=FOR_EVER_S) as pool:
        hanging = [asyncio.create_task(pool.score([named("wait", "bad")])) for _ in range(20)]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(PATIENCE_S):
            results = await pool.score([named("ok", "good")] * 2000)
        assert not any(task.done() for task in hanging)
        assert len(pool.pids()) <= 4
        for task in hanging:
            task.cancel()
    assert all(result.verdict == (1.0, {}, ()) for result in results)


async def test_others_of_the_same_scorer_go_on_when_a_sample_hangs() -> None:
    async with running_pool(BY_ORDER, timeout_s=FOR_EVER_S) as pool:
        await pool.score([item("ok")] * 300)  # cheap so far: there are others in its window
        hanging = asyncio.create_task(pool.score([item("wait")]))
        async with asyncio.timeout(PATIENCE_S):
            results = await pool.score([item("ok")] * 500)
        assert not hanging.done()
        hanging.cancel()
    assert all(result.verdict == (1.0, {}, ()) for result in results)


async def test_a_score_that_is_set_aside_is_a_score(tmp_path: Path) -> None:
    async with running_pool(BY_ORDER, timeout_s=FOR_EVER_S) as pool:
        slow = asyncio.create_task(pool.score([named(f"until {tmp_path / 'now'}", "slow")]))
        await asyncio.sleep(0.1)
        await pool.score([named("ok", "good")])
        assert not slow.done()
        (tmp_path / "now").touch()
        [result] = await slow
        assert result.verdict == (1.0, {}, ())


async def test_a_suspect_scorer_gets_a_process_beside_the_pool_and_no_other() -> None:
    async with running_pool(BY_ORDER, processes=2, timeout_s=0.5) as pool:
        bad = asyncio.create_task(pool.score([named("wait", "bad")] * 8))
        async with asyncio.timeout(PATIENCE_S):
            while not bad.done():
                results = await pool.score([named("sleep 0.005", "good")] * 20)
                assert all(result.verdict == (1.0, {}, ()) for result in results)
                assert len(pool.pids()) <= 4
        assert [result.failure for result in bad.result()] == [FailureKind.TIMED_OUT] * 8


async def test_a_scorer_is_trusted_again_after_a_score() -> None:
    async with running_pool(BY_ORDER, processes=1, timeout_s=0.5) as pool:
        await pool.score([named("wait", "odd")])
        other = asyncio.create_task(pool.score([named("sleep 0.01", "good")] * 300))
        async with asyncio.timeout(PATIENCE_S):
            results = await pool.score([named("ok", "odd")] * 50)
        assert all(result.verdict == (1.0, {}, ()) for result in results)
        await other


async def test_what_hangs_again_gives_way_on_the_cores() -> None:
    async with running_pool(BY_ORDER, processes=1, timeout_s=2.0) as pool:
        spinning = asyncio.create_task(pool.score([named("hang", "bad")] * 2))
        seen: set[int] = set()
        async with asyncio.timeout(PATIENCE_S):
            while not spinning.done():
                await pool.score([named("sleep 0.01", "good")] * 5)
                seen |= set(map(_nice, pool.pids()))
                assert min(map(_nice, pool.pids())) == _nice(os.getpid())
        assert max(seen) == 19
        assert all(result.failure is FailureKind.TIMED_OUT for result in spinning.result())


def _nice(pid: int) -> int:
    try:
        return os.getpriority(os.PRIO_PROCESS, pid)
    except ProcessLookupError:
        return 0


async def test_processes_that_stood_in_end_when_they_are_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "SPARE_S", 0.2)
    async with running_pool(BY_ORDER, timeout_s=FOR_EVER_S) as pool:
        slow = asyncio.create_task(pool.score([named(f"until {tmp_path / 'now'}", "slow")]))
        await asyncio.sleep(0.05)
        await pool.score([named("ok", "good")])
        assert len(pool.pids()) == 2
        (tmp_path / "now").touch()
        await slow
        async with asyncio.timeout(PATIENCE_S):
            while len(pool.pids()) > 1:
                await asyncio.sleep(0.05)
        [result] = await pool.score([item("pid")])
        assert [result.verdict.reward] == pool.pids()


async def test_a_filter_that_hangs_does_not_hold_up_scores() -> None:
    async with running_pool(BY_ORDER, timeout_s=FOR_EVER_S, judge="reward_functions:keeps_by_label") as pool:
        judged: list[Result] = []
        pool.submit([Job(GroupItem("g", [ScoredItem(item("hang"), 1.0, {})]), judged.append)])
        async with asyncio.timeout(PATIENCE_S):
            results = await pool.score([item("ok")] * 10)
        assert all(result.verdict == (1.0, {}, ()) for result in results)
        assert judged == []


async def test_close_ends_what_is_set_aside() -> None:
    async with running_pool(BY_ORDER, timeout_s=FOR_EVER_S) as pool:
        hanging = asyncio.create_task(pool.score([named("wait", "bad")] * 2))
        await asyncio.sleep(0.1)
        await pool.score([named("ok", "good")])
        processes = [psutil.Process(pid) for pid in pool.pids()]
        hanging.cancel()
    assert [process for process in processes if process.is_running()] == []


async def test_a_slow_scorer_has_its_share_of_the_time_and_no_more() -> None:
    order: list[str] = []

    def jobs(word: str, scorer: str, count: int) -> list[Job]:
        def report(result: Result) -> None:
            assert result.verdict == (1.0, {}, ())
            order.append(scorer)

        return [Job(named(word, scorer), report) for _ in range(count)]

    async with running_pool(BY_ORDER) as pool:
        pool.submit(jobs("sleep 0.02", "slow", 100) + jobs("ok", "cheap", 500))
        await _all(pool, order, 600)
    # 500 cheap ones are a few hundredths of a second, so a few slow ones.
    assert order[:500].count("slow") < 50


async def _all(pool: ScorerPool, order: Sequence[str], count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while len(order) < count:
            await asyncio.sleep(0.01)


def test_lanes_are_named_by_what_samples_ask_for() -> None:
    assert lane_of(named("", "math")) == "math"
    assert lane_of(item("")) == lane_of(item("", metadata_json='{"rm_type": null}')) == ""
    assert lane_of(item("", metadata_json='{"rm_type": [1]}')) == "[1]"
    assert lane_of(item("", metadata_json='{"rm_type"')) == ""
    assert lane_of(GroupItem("g", [])) == "GroupItem"


def test_names_from_data_make_no_endless_number_of_lanes() -> None:
    lanes = Lanes(1)
    jobs = [Job(named("", str(number)), lambda _: None) for number in range(1000)]
    lanes.add(jobs)
    taken: list[Job] = []
    while (lane := lanes.next(place=True, spare=False)) is not None:
        taken += lane.take(MAX_WINDOW)
    assert set(taken) == set(jobs)
    assert len(lanes._lanes) <= 65


def test_a_lane_that_was_idle_has_saved_up_nothing() -> None:
    lanes = Lanes(1)

    def add(scorer: str) -> None:
        lanes.add([Job(named("", scorer), lambda _: None) for _ in range(100)])

    add("busy")
    busy = lanes.next(place=True, spare=False)
    assert busy is not None
    for _ in range(50):
        busy.take(1)
        busy.answered(1.0)
    add("late")
    turns = []
    for _ in range(20):
        lane = lanes.next(place=True, spare=False)
        assert lane is not None
        lane.take(1)
        lane.answered(1.0)
        turns.append(lane is busy)
    assert turns.count(True) == 10
