"""The pool: verdicts, every way a score can fail, and what becomes of the others."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import ConfigError, UnavailableError
from services.reward.jobs import FailureKind, Job, Result
from services.reward.pool import ScorerPool
from services.reward.scorers.base import Item, SampleError, to_verdict
from services.reward.settings import ScorerSettings
from tests.kit.reward_items import BY_ORDER, KIT, item, running_pool

CANNOT = [
    ("raise it", "ValueError: cannot score it (reward_functions.py:"),
    ("exit", "SystemExit: 3"),
    ("nan", "the returned reward is nan, not a finite number"),
    ("none", "the returned reward is None, not a number"),
    ("text", "the returned reward is a str, not a number"),
    ("empty", 'the returned dict has neither "score" nor "reward"'),
    ("bad_part", "the returned dict's 'kl' is inf, not a finite number"),
]


async def test_verdicts_come_in_the_order_of_the_items() -> None:
    async with running_pool("exact", processes=2) as pool:
        items = [item(str(number), str(number % 3)) for number in range(500)]
        results = await pool.score(items)
    assert [result.verdict.reward for result in results] == [float(n == n % 3) for n in range(500)]


async def test_nothing_to_score() -> None:
    async with running_pool("exact") as pool:
        assert await pool.score([]) == []


async def test_what_a_function_may_return() -> None:
    async with running_pool(BY_ORDER) as pool:
        words = ["ok", "numpy", "dict", "reward", "print", "sleep 0.01"]
        results = await pool.score([item(word) for word in words])
    assert [result.verdict for result in results] == [
        (1.0, {}, ()),
        (0.25, {}, ()),
        (0.5, {"acc": 1.0, "length": 3.0}, ()),
        (0.75, {}, ()),
        (1.0, {}, ()),
        (1.0, {}, ()),
    ]
    assert results[-1].seconds >= 0.01


async def test_a_function_without_async_and_kwargs() -> None:
    async with running_pool("reward_functions.plain") as pool:
        results = await pool.score([item("42"), item("41")])
    assert [result.verdict.reward for result in results] == [1.0, 0.0]


async def test_a_function_sees_the_sample_under_slime_names() -> None:
    whole = item(
        "...", "", prompt="", messages_json='[{"role":"user"},{"role":"user"}]', metadata_json='{"difficulty":3}'
    )
    whole = whole._replace(status="truncated", completion_tokens=17, group_index=5, sample_index=42)
    async with running_pool("reward_functions:sees") as pool:
        [result] = await pool.score([whole])
    assert result.verdict == (
        3.0,
        {
            "messages": 2.0,
            "index": 42.0,
            "group_index": 5.0,
            "response_length": 17.0,
            "truncated": 1.0,
            "no_label": 1.0,
            "group_size": 8.0,
        },
        (),
    )


async def test_what_fails_a_sample_is_named_and_costs_nothing_else() -> None:
    async with running_pool(BY_ORDER) as pool:
        before = pool.pids()
        results = await pool.score([item(word) for word, _ in CANNOT] + [item("ok")])
        assert pool.pids() == before
    *failed, good = results
    assert good.verdict == (1.0, {}, ())
    for (_, reason), result in zip(CANNOT, failed, strict=True):
        assert (result.verdict, result.failure) == (None, FailureKind.RAISED)
        assert result.reason.startswith(reason)
        assert "\n" not in result.reason


async def test_a_hang_fails_alone_and_the_others_go_on() -> None:
    async with running_pool(BY_ORDER, processes=2, timeout_s=1.0) as pool:
        before = set(pool.pids())
        hang = asyncio.create_task(pool.score([item("hang")]))
        await asyncio.sleep(0.1)
        others = await pool.score([item("ok")] * 200)
        assert not hang.done()
        [result] = await hang
        assert (result.failure, result.reason) == (FailureKind.TIMED_OUT, "timed out after 1 s")
        [again] = await pool.score([item("ok")])
        assert len(set(pool.pids()) & before) >= 1
    assert all(other.verdict == (1.0, {}, ()) for other in others)
    assert again.verdict == (1.0, {}, ())


async def test_items_behind_a_hang_are_redone_and_not_counted() -> None:
    async with running_pool(BY_ORDER, timeout_s=1.0) as pool:
        await pool.score([item("ok")] * 300)  # cheap so far: the window is wide
        results = await pool.score([item("ok")] * 5 + [item("hang")] + [item("ok")] * 40)
    failures = [number for number, result in enumerate(results) if result.failure is not None]
    assert failures == [5]
    assert results[5].failure is FailureKind.TIMED_OUT


@pytest.mark.parametrize(
    ("word", "how"),
    [("die", "ended with status 7"), ("segfault", "was ended by SIGSEGV"), ("orphan", "was ended by SIGKILL")],
)
async def test_a_process_that_dies_fails_only_the_item_it_was_on(word: str, how: str) -> None:
    async with running_pool(BY_ORDER) as pool:
        await pool.score([item("ok")] * 300)
        results = await pool.score([item("ok")] * 5 + [item(word)] + [item("ok")] * 40)
    assert [number for number, result in enumerate(results) if result.failure is not None] == [5]
    assert results[5].failure is FailureKind.DIED
    assert results[5].reason == f"the scorer's process {how}"


async def test_a_process_killed_while_idle_is_replaced_and_nothing_fails() -> None:
    async with running_pool(BY_ORDER) as pool:
        [old] = pool.pids()
        os.kill(old, signal.SIGKILL)
        while pool.pids() in ([], [old]):
            await asyncio.sleep(0.02)
        [result] = await pool.score([item("pid")])
        assert [result.verdict.reward] == pool.pids()


async def test_what_a_function_started_ends_with_its_process() -> None:
    async with running_pool(BY_ORDER) as pool:
        await pool.score([item("orphan")])
    left = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "61.25"]]
    _, alive = psutil.wait_procs([each for each in left if each.status() != psutil.STATUS_ZOMBIE], timeout=10)
    assert alive == []


async def test_close_leaves_no_process() -> None:
    async with running_pool(BY_ORDER, processes=2) as pool:
        processes = [psutil.Process(pid) for pid in pool.pids()]
        pool.submit([Job(item("hang"), lambda _: None)])
        await asyncio.sleep(0.05)
    assert [process for process in processes if process.is_running()] == []


async def test_sigint_is_not_for_them() -> None:
    async with running_pool(BY_ORDER) as pool:
        os.kill(pool.pids()[0], signal.SIGINT)
        [result] = await pool.score([item("pid")])
        assert [result.verdict.reward] == pool.pids()


async def test_cancelled_work_is_dropped_from_the_queue() -> None:
    async with running_pool(BY_ORDER) as pool:
        slow = asyncio.create_task(pool.score([item("sleep 0.2")] * 100))
        await asyncio.sleep(0.1)
        slow.cancel()
        async with asyncio.timeout(5):
            [result] = await pool.score([item("ok")])
    assert result.verdict == (1.0, {}, ())


async def test_without_a_process_items_are_unavailable_until_there_is_one(tmp_path: Path) -> None:
    module = tmp_path / "comes_and_goes.py"
    module.write_text(
        "import os\ndef fn(args, sample):\n    if sample.response == 'die':\n        os._exit(1)\n    return 1\n"
    )
    pool = ScorerPool(ScorerSettings("comes_and_goes:fn", [str(tmp_path)], {}), processes=1, timeout_s=5)
    await pool.start()
    try:
        source = module.read_text()
        module.write_text("raise RuntimeError('not now')\n")
        [died] = await pool.score([item("die")])
        assert died.failure is FailureKind.DIED
        queued = await pool.score([item("x")])
        refused = await pool.score([item("x")])
        for [result] in (queued, refused):
            assert result.failure is FailureKind.UNAVAILABLE
            assert "not now" in result.reason
        module.write_text(source)
        await pool.available.wait()
        [result] = await pool.score([item("x")])
        assert result.verdict == (1.0, {}, ())
    finally:
        await pool.close()


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("maths", "reward.scorer: unknown scorer 'maths': known are code, dapo, deepscaler"),
        ("no_such_module:fn", "reward.scorer: no_such_module does not import: ModuleNotFoundError"),
        ("reward_functions:nothing", "reward.scorer: reward_functions has no function 'nothing'"),
        ("reward_functions:not_a_function", "reward.scorer: reward_functions has no function 'not_a_function'"),
        ("reward_functions:takes_nothing", "cannot be called as fn(args, sample): too many positional arguments"),
    ],
)
async def test_a_scorer_that_cannot_be_loaded_is_a_config_error(scorer: str, message: str) -> None:
    pool = ScorerPool(ScorerSettings(scorer, [str(KIT)], {}), processes=2, timeout_s=5)
    with pytest.raises(ConfigError) as caught:
        await pool.start()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert pool.pids() == []


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("import sys; sys.exit(5)", ConfigError, "reward.scorer: SystemExit: 5"),
        ("import os; os._exit(5)", UnavailableError, "reward.scorer: its process ended with status 5 while it loaded"),
    ],
)
async def test_a_module_that_ends_its_process(tmp_path: Path, body: str, error: type[Exception], message: str) -> None:
    (tmp_path / "ends_the_process.py").write_text(body)
    pool = ScorerPool(ScorerSettings("ends_the_process:fn", [str(tmp_path)], {}), processes=1, timeout_s=5)
    with pytest.raises(error) as caught:
        await pool.start()
    assert str(caught.value).startswith(message)


async def test_big_completions_do_not_block_the_event_loop() -> None:
    async with running_pool("exact") as pool:
        items = [item("x" * 300_000, "y")] * 200
        assert [result.verdict for result in await pool.score(items)] == [(0.0, {}, ())] * 200


@given(
    st.one_of(
        st.none(), st.text(), st.floats(), st.integers(), st.lists(st.floats()), st.dictionaries(st.text(), st.floats())
    )
)
def test_whatever_is_returned_is_finite_or_refused(value: object) -> None:
    try:
        verdict = to_verdict(value)
    except SampleError:
        return
    assert all(abs(number) < float("inf") for number in (verdict.reward, *verdict.parts.values()))


def test_a_cancelled_job_reports_nothing() -> None:
    seen: list[Result] = []
    job = Job(Item("a", "", "", "", "", "", "completed", 0, 0, 0), seen.append)
    job.cancelled = True
    job.report(Result(None, 0.0, FailureKind.RAISED, "late"))
    assert seen == []


async def test_a_filter_that_does_not_import_or_fit_is_named() -> None:
    for path, words in [
        ("reward_functions:missing", "no function"),
        ("reward_functions:takes_nothing", "fn\\(args, group"),
    ]:
        with pytest.raises(ConfigError, match=f"batch.dynamic_sampling_filter.*{words}"):
            async with running_pool("exact", judge=path):
                pass
