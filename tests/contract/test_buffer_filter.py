"""Dynamic sampling: scored groups wait for a verdict, are kept or dropped by it, and are refilled one for one."""

from __future__ import annotations

import pytest

from polyhead.v1 import buffer_pb2 as pb
from services.buffer.ids import SampleRef
from services.buffer.policy import KEPT_REASONS, describe
from services.buffer.records import Lease, Report, Scored
from services.buffer.store import Store
from tests.contract.conftest import Start
from tests.kit.buffer_driver import Driver, orders, outcomes, params, refs, released

KEEP, DROP = pb.GROUP_VERDICT_KEEP, pb.GROUP_VERDICT_DROP
KEEP_IF_INSUFFICIENT, FAILED = pb.GROUP_VERDICT_KEEP_IF_INSUFFICIENT, pb.GROUP_VERDICT_FILTER_FAILED


@pytest.fixture
def start(start: Start) -> Start:
    """The shared one, with a filter that has to judge each group unless told otherwise."""

    async def started(**changes: object) -> Driver:
        return await start(**{"judged": True, **changes})

    return started


async def judged(driver: Driver, verdict: int, reason: str = "why", count: int = 1024) -> Report:
    lease = await driver.store.lease_score("judge", count, payload=True)
    assert all(group.judge for group in lease.groups)
    return await driver.store.complete_score(verdicts(lease, verdict, reason))


def verdicts(lease: Lease, verdict: int, reason: str = "why") -> list[Scored]:
    return [Scored(ref, lease_id, 0.0, b"", verdict, reason) for ref, lease_id in refs(lease)]


async def test_a_scored_group_is_leased_whole_with_its_scores(start: Start, store: Store) -> None:
    driver = await start()
    await driver.generate(4)
    report = await driver.score(reward=0.5)
    assert (report.ready_groups, await driver.counts()) == (0, {"SCORED": 4})
    lease = await store.lease_score("judge", 1, payload=True)
    assert [(group.judge, len(group.samples)) for group in lease.groups] == [(True, 2)]
    assert [each.facts.reward for each in lease.groups[0].samples] == [0.5, 0.5]
    assert [each.payload for each in lease.groups[0].samples] == [b"payload 0 0", b"payload 0 1"]
    assert orders(await store.lease_score("other", 9, payload=False)) == [1]


async def test_keep_makes_ready_and_drop_frees_room_for_one_group_each(start: Start, store: Store) -> None:
    driver = await start(batch_groups=1, max_staleness=1)
    await driver.generate()
    await driver.score()
    lease = await store.lease_score("judge", 9, payload=False)
    first, second = verdicts(lease, KEEP)[:2], verdicts(lease, DROP, "too_easy")[2:]
    report = await store.complete_score(first + second)
    assert outcomes(report) == ["OK", "DUPLICATE", "OK", "DUPLICATE"]
    assert (report.ready_groups, report.closed_groups) == (1, 1)
    assert await driver.counts() == {"READY": 2, "DROPPED(FILTERED)": 2}
    counters = (await store.ledger(admit=True)).counters
    assert (counters["filter.kept"], counters["filter.drop_too_easy"]) == (1, 1)
    assert await driver.generate() == [2]


async def test_a_filter_that_fails_keeps_the_group_and_is_counted(start: Start, store: Store) -> None:
    driver = await start()
    await driver.generate(2)
    await driver.score(reward=1.0)
    assert (await judged(driver, FAILED)).ready_groups == 1
    assert (await store.ledger(admit=True)).counters["filter.failed"] == 1


async def test_what_is_given_back_is_judged_later_and_not_scored_again(start: Start, store: Store) -> None:
    driver = await start()
    await driver.generate(2)
    await driver.score()
    lease = await store.lease_score("judge", 9, payload=False)
    await store.release(2, released(lease, pb.RELEASE_REASON_DRAIN))
    assert (await driver.counts())["SCORED"] == 2
    assert outcomes(await store.complete_score(verdicts(lease, DROP))) == ["LEASE_LOST"] * 2
    assert (await judged(driver, KEEP)).ready_groups == 1


async def test_scores_and_verdicts_are_not_taken_for_each_other(start: Start, store: Store) -> None:
    driver = await start()
    await driver.generate(2)
    lease = await store.lease_score("s", 9, payload=False)
    assert outcomes(await store.complete_score(verdicts(lease, KEEP))) == ["LEASE_LOST"] * 2
    scores = [Scored(ref, lease_id, 1.0, b"") for ref, lease_id in refs(lease)]
    assert outcomes(await store.complete_score(scores)) == ["OK"] * 2
    lease = await store.lease_score("judge", 9, payload=False)
    scores = [Scored(ref, lease_id, 0.0, b"") for ref, lease_id in refs(lease)]
    assert outcomes(await store.complete_score(scores)) == ["LEASE_LOST"] * 2


async def test_a_repeated_request_gets_the_same_groups_to_judge(start: Start, store: Store) -> None:
    driver = await start()
    await driver.generate(4)
    await driver.score()
    first = await store.lease_score("judge", 9, payload=False, request_id="a")
    again = await store.lease_score("judge", 9, payload=False, request_id="a")
    assert refs(first) == refs(again)
    assert all(group.judge for group in again.groups)


async def test_payloads_over_the_limit_are_left_out_of_the_first_group(start: Start, store: Store) -> None:
    driver = await start()
    await driver.generate(4)
    await driver.score()
    lease = await store.lease_score("judge", 9, payload=True, max_bytes=4)
    assert [(group.order, [each.payload for each in group.samples]) for group in lease.groups] == [(0, [b"", b""])]


async def test_a_group_shrunk_by_a_dead_sample_is_judged_with_the_rest(start: Start, store: Store) -> None:
    driver = await start(min_group_size=1)
    await driver.generate(2)
    lease = await store.lease_score("s", 9, payload=False)
    (first, first_lease), second = refs(lease)
    await store.complete_score([Scored(first, first_lease, 1.0, b"")])
    await store.release(2, [released(lease, pb.RELEASE_REASON_FATAL, error="e")[1]])
    assert second[0] == SampleRef(0, 1)
    lease = await store.lease_score("judge", 9, payload=False)
    assert [(group.judge, len(group.samples)) for group in lease.groups] == [(True, 1)]
    assert (await store.complete_score(verdicts(lease, KEEP))).ready_groups == 1


async def test_groups_waiting_for_a_verdict_are_named_by_a_waiting_trainer(start: Start, store: Store) -> None:
    driver = await start()
    await driver.generate(2)
    await driver.score()
    lease = await store.lease_train(driver.epoch, 1, payload=False)
    assert lease.waiting is not None
    assert describe(lease.waiting)[0] == "0 of 2 groups ready: 0 samples in generation, 2 to be scored"


async def test_a_run_that_goes_on_without_the_filter_still_gets_to_its_groups(start: Start, store: Store) -> None:
    driver = await start()
    await driver.generate(2)
    await driver.score()
    await store.open(params(judged=False))
    assert (await judged(driver, KEEP)).ready_groups == 1


async def test_reasons_without_end_are_counted_together(start: Start, store: Store) -> None:
    driver = await start(batch_groups=KEPT_REASONS + 6, max_staleness=0)
    await driver.generate()
    await driver.score()
    lease = await store.lease_score("judge", 1024, payload=False)
    rows = [Scored(ref, lease_id, 0.0, b"", DROP, f"r{ref.order}") for ref, lease_id in refs(lease)]
    await store.complete_score(rows)
    drops = {name: n for name, n in (await store.ledger(admit=True)).counters.items() if name.startswith("filter.d")}
    assert (len(drops), drops["filter.drop_other"]) == (KEPT_REASONS + 1, 6)


# When too few groups pass


async def test_rejected_groups_are_kept_after_the_last_refill_round(start: Start, store: Store) -> None:
    driver = await start(batch_groups=2, max_staleness=0, refill_groups=4)
    for _ in range(2):
        await driver.generate()
        await driver.score()
        assert (await judged(driver, KEEP_IF_INSUFFICIENT)).closed_groups == 2
    await driver.generate()
    await driver.score()
    assert (await judged(driver, KEEP_IF_INSUFFICIENT)).ready_groups == 2
    await driver.train(1)
    await driver.publish(1)
    await driver.generate()
    await driver.score()
    assert (await judged(driver, KEEP_IF_INSUFFICIENT)).closed_groups == 2


async def test_zero_variance_with_the_fallback_moves_too(start: Start, store: Store) -> None:
    changes = {"judged": False, "drop_zero_variance": True, "zero_variance_fallback": True}
    driver = await start(batch_groups=1, max_staleness=0, refill_groups=1, **changes)
    await driver.generate()
    assert (await driver.score(reward=1.0)).closed_groups == 1
    await driver.generate()
    assert (await driver.score(reward=1.0)).ready_groups == 1
    assert (await store.ledger(admit=True)).counters["filter.kept_when_insufficient"] == 1


async def test_a_run_whose_every_group_is_filtered_says_so(start: Start, store: Store) -> None:
    driver = await start(judged=False, drop_zero_variance=True, batch_groups=2, max_staleness=0, refill_groups=4)
    for _ in range(2):
        await driver.generate()
        await driver.score(reward=1.0)
    lease = await store.lease_train(driver.epoch, 1, payload=False)
    assert lease.waiting is not None
    assert describe(lease.waiting) == ("0 of 2 groups ready: the filter has dropped 4 groups since the last batch", 2)


# Over-sampling


async def test_surplus_does_not_take_the_place_of_what_was_issued_before(start: Start, store: Store) -> None:
    driver = await start(judged=False, batch_groups=2, surplus_groups=1, max_staleness=0)
    lease = await driver.generate_lease()
    assert orders(lease) == [0, 1, 2]
    generated = driver.generated(lease)
    await store.complete_generate(generated[2:])
    await driver.score()
    waiting = (await store.lease_train(driver.epoch, 1, payload=False)).waiting
    assert waiting is not None
    assert describe(waiting)[0] == "1 of 2 groups ready: 2 samples in generation, 0 to be scored"
    await store.complete_generate(generated[:2])
    await driver.score()
    assert orders(await driver.train(1)) == [0, 1]


async def test_surplus_moves_up_when_a_group_before_it_is_filtered(start: Start, store: Store) -> None:
    driver = await start(judged=False, drop_zero_variance=True, batch_groups=2, surplus_groups=1, max_staleness=0)
    await driver.generate()
    await driver.score(2, reward=1.0)
    await driver.score()
    assert await driver.generate() == [3]
    assert orders(await driver.train(1)) == [1, 2]


async def test_surplus_is_kept_while_it_is_fresh_and_trained_first(start: Start, store: Store) -> None:
    driver = await start(judged=False, batch_groups=2, surplus_groups=1, max_staleness=1)
    assert await driver.generate() == [0, 1, 2, 3, 4]
    await driver.score()
    assert orders(await driver.train(1)) == [0, 1]
    await driver.publish(1)
    await driver.fill()
    assert orders(await driver.train(2)) == [2, 3]
    assert "DROPPED(SURPLUS)" not in await driver.counts()


async def test_surplus_past_the_bound_is_dropped_by_name_and_its_prompt_comes_first(start: Start, store: Store) -> None:
    driver = await start(judged=False, batch_groups=2, surplus_groups=2, max_staleness=0)
    await driver.generate()
    await driver.score()
    await driver.train(1)
    await driver.publish(1)
    assert (await driver.counts())["DROPPED(SURPLUS)"] == 4
    again = await driver.generate_lease()
    assert [group.ordinal for group in again.groups] == [2, 3, 4, 5]


async def test_a_drop_is_refilled_by_one_group_and_not_by_a_wave(start: Start, store: Store) -> None:
    driver = await start(judged=False, drop_zero_variance=True, batch_groups=2, surplus_groups=2, max_staleness=0)
    assert len(await driver.generate()) == 4
    await driver.score(2, reward=1.0)
    assert len(await driver.generate()) == 1


async def test_over_sampling_starts_no_group_between_a_step_and_its_push(start: Start, store: Store) -> None:
    driver = await start(judged=False, batch_groups=2, surplus_groups=2, max_staleness=0)
    await driver.generate()
    await driver.score()
    await driver.train(1)
    await store.lease_train(driver.epoch, 2, payload=False)
    lease = await driver.generate_lease()
    assert lease.waiting is not None
    assert describe(lease.waiting)[0].startswith("weights of step 1 are not published")
    await driver.publish(1)
    assert len(await driver.generate()) == 4
