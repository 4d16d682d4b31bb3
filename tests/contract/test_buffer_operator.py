"""What operators may do to a store, on the reference and on a real Valkey: list, requeue, import."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.buffer import partials, policy
from services.buffer.ids import SampleRef
from services.buffer.records import (
    Extension,
    ImportedGroup,
    ImportedSample,
    ListedSample,
    Page,
    Requeued,
)
from services.buffer.store import Store
from services.common.errors import PreconditionError
from tests.contract.conftest import Start
from tests.kit.buffer_driver import Driver, outcomes, refs, released

PENDING, GENERATED, SCORED, READY, CONSUMED, DEAD = 1, 3, 5, 6, 8, 11


async def listed(store: Store, state: int) -> list[ListedSample]:
    return list((await store.list_samples(state, 0, 100)).samples)


async def kill(driver: Driver, count: int = 1, error: str = "boom") -> list[SampleRef]:
    lease = await driver.generate_lease(count)
    await driver.store.release(1, released(lease, pb.RELEASE_REASON_FATAL, error=error))
    return [ref for ref, _ in refs(lease)]


def imported(driver: Driver, *rewards: float | None, **changes: object) -> ImportedGroup:
    at = (driver.version.epoch, driver.version.step, driver.version.step)
    samples = [ImportedSample(5, 2, 1, (at,), b"payload", reward, b"score") for reward in rewards]
    return ImportedGroup(b"p", [replace(each, **changes) for each in samples])  # type: ignore[arg-type]


# Listing


async def test_listing_pages_through_a_state_in_order_of_ids(start: Start, store: Store) -> None:
    driver = await start(max_staleness=3)
    await driver.fill()
    seen, at = [], 0
    while True:
        page = await store.list_samples(READY, at, 3)
        seen += [each.ref for each in page.samples]
        at = page.following
        if not at:
            break
        assert len(page.samples) == 3
    assert seen == [SampleRef(order, index) for order in range(8) for index in range(2)]
    assert await store.list_samples(GENERATED, 0, 3) == Page([], 0)


async def test_listing_shows_what_planning_knows(start: Start, store: Store) -> None:
    driver = await start()
    (ref, lease_id), *_ = refs(await driver.generate_lease(1))
    await store.extend([Extension(ref, lease_id, 0, 7, partials.frame(b"t"))])
    (generating,) = await listed(store, 2)
    assert (generating.ref, generating.facts.completion_tokens) == (ref, 7)
    await driver.step(1)
    assert len(await listed(store, CONSUMED)) == 4
    await store.confirm_checkpoint(driver.epoch, 1)
    assert await listed(store, CONSUMED) == []


async def test_fetch_gives_prompts_of_what_has_no_payload(start: Start, store: Store) -> None:
    driver = await start()
    await driver.generate(2)
    await driver.generate_lease(1)
    one, other = [SampleRef(0, 0), SampleRef(1, 0)]
    assert [each.prompt for each in await store.fetch([one, other], prompts=True)] == [b"", b"prompt 1"]
    assert [each.prompt for each in await store.fetch([one, other])] == [b"", b""]


# Dead letters


async def test_a_dead_letter_keeps_its_error(start: Start, store: Store) -> None:
    driver = await start(max_attempts=2)
    for _ in range(2):
        lease = await driver.generate_lease(1)
        await store.release(1, released(lease, pb.RELEASE_REASON_SAMPLE_ERROR, error="out of range"))
    (dead,) = await listed(store, DEAD)
    assert dead.letter is not None
    assert (dead.ref, dead.attempt) == (SampleRef(0, 0), 2)
    assert (dead.letter.error, dead.letter.requeue) == ("out of range", pb.REQUEUE_OUTCOME_REISSUED)
    assert dead.letter.died_ms > 0


async def test_a_dropped_group_comes_back_as_a_new_one_of_its_prompt(start: Start, store: Store) -> None:
    driver = await start()
    (ref,) = await kill(driver)
    assert [each.prompt for each in await store.fetch([ref], prompts=True)] == [b"prompt 0"]
    before = (await store.ledger(admit=True)).accepted
    (result,) = await store.requeue([ref])
    assert result.outcome == pb.REQUEUE_OUTCOME_REISSUED
    assert (await store.ledger(admit=True)).accepted == before + 2
    again = Requeued(pb.REQUEUE_OUTCOME_DUPLICATE, result.order)
    assert await store.requeue([ref, SampleRef(0, 1)]) == [again, Requeued(pb.REQUEUE_OUTCOME_GONE, -1)]
    (dead,) = await listed(store, DEAD)
    assert dead.letter is not None
    assert dead.letter.requeue == pb.REQUEUE_OUTCOME_DUPLICATE
    assert await driver.counts() == {"DEAD": 1, "DROPPED(GROUP_DEAD)": 1, "PENDING": 4}
    groups = (await driver.generate_lease(4)).groups
    assert [(group.order, group.ordinal, group.prompt) for group in groups] == [
        (1, 1, b"prompt 1"),
        (result.order, -1, b"prompt 0"),
    ]


async def test_two_dead_siblings_bring_one_group_back(start: Start, store: Store) -> None:
    driver = await start(group_size=3, min_group_size=2)
    dead = await kill(driver, 2)
    first, second = await store.requeue(dead)
    assert (first.outcome, second.outcome) == (pb.REQUEUE_OUTCOME_REISSUED, pb.REQUEUE_OUTCOME_DUPLICATE)
    assert first.order == second.order
    await driver.counts()


async def test_a_sample_returns_to_a_group_that_still_waits(start: Start, store: Store) -> None:
    driver = await start(group_size=3, min_group_size=2)
    dead, *_ = await kill(driver)
    await driver.generate(1)
    assert await store.requeue([dead, dead]) == [
        Requeued(pb.REQUEUE_OUTCOME_REQUEUED, 0),
        Requeued(pb.REQUEUE_OUTCOME_DUPLICATE, 0),
    ]
    assert await listed(store, DEAD) == []
    await driver.generate(2)
    assert (await driver.score(3)).ready_groups == 1
    assert [each.ref.index for each in await listed(store, READY)] == [0, 1, 2]


async def test_a_requeued_sample_may_die_again(start: Start, store: Store) -> None:
    driver = await start(group_size=3, min_group_size=2)
    dead, *_ = await kill(driver)
    await store.requeue([dead])
    assert await kill(driver, error="again") == [dead]
    (letter,) = [each.letter for each in await listed(store, DEAD)]
    assert letter is not None
    assert (letter.error, letter.requeue) == ("again", pb.REQUEUE_OUTCOME_REQUEUED)
    await driver.counts()


async def test_a_group_that_went_on_is_left_alone(start: Start, store: Store) -> None:
    driver = await start(group_size=3, min_group_size=2)
    dead, *_ = await kill(driver)
    await driver.fill()
    went_on = [Requeued(pb.REQUEUE_OUTCOME_GROUP_WENT_ON, -1)]
    assert await store.requeue([dead]) == went_on
    await driver.train(1)
    assert await store.requeue([dead]) == went_on
    await store.confirm_checkpoint(driver.epoch, 1)
    assert await store.requeue([dead]) == went_on
    assert [each.ref for each in await listed(store, DEAD)] == [dead]


async def test_what_is_no_dead_letter_is_gone(start: Start, store: Store) -> None:
    driver = await start()
    await driver.generate_lease(1)
    gone = Requeued(pb.REQUEUE_OUTCOME_GONE, -1)
    assert await store.requeue([SampleRef(0, 0), SampleRef(0, 9), SampleRef(99, 0)]) == [gone] * 3


async def test_only_the_newest_dead_letters_are_kept(start: Start, store: Store) -> None:
    over, most = 3, policy.KEPT_DEAD
    driver = await start(group_size=1, max_staleness=2, batch_groups=(most + over) // 2)
    dead = await kill(driver, most + over)
    assert len(dead) == most + over
    page = await store.list_samples(DEAD, 0, most + over)
    assert (len(page.samples), page.samples[0].ref, page.following) == (most, dead[over], 0)
    results = await store.requeue(dead[over - 1 : over + 1])
    assert [each.outcome for each in results] == [pb.REQUEUE_OUTCOME_GONE, pb.REQUEUE_OUTCOME_REISSUED]
    assert [each.prompt for each in await store.fetch(dead[over - 1 : over], prompts=True)] == [b""]
    assert (await driver.counts())["DEAD"] == most + over


# Import


async def test_scored_groups_are_trained_like_any_other(start: Start, store: Store) -> None:
    driver = await start()
    groups = [imported(driver, 0.0, 1.0), imported(driver, 1.0, None)]
    assert await store.import_groups("a", groups) == ([0, 1], 1)
    assert await store.import_groups("a", groups) == ([0, 1], 0)
    assert await driver.counts() == {"READY": 2, "SCORED": 1, "GENERATED": 1}
    await driver.score()
    lease = await driver.train(1)
    assert [group.ordinal for group in lease.groups] == [-1, -1]
    payload = sample_pb2.Sample.FromString(lease.groups[1].samples[1].payload[len(b"payload") :])
    assert (payload.sample_id, payload.group_id) == ("g00000001-001", "g00000001")
    assert [each.score for each in lease.groups[0].samples] == [b"score", b"score"]
    assert await driver.counts() == {"CONSUMED": 4}


async def test_the_filter_holds_for_imports_too(start: Start, store: Store) -> None:
    driver = await start(drop_zero_variance=True)
    assert await store.import_groups("a", [imported(driver, 1.0, 1.0)]) == ([0], 0)
    assert await driver.counts() == {"DROPPED(ZERO_VARIANCE)": 2}


async def test_imports_keep_to_the_bound_and_to_history(start: Start, store: Store) -> None:
    driver = await start()
    for versions, words in [
        (((9, 0, 0),), "e9.s0 is no version of this run's history"),
        (((1, 0, 3),), "e1.s3 is no version of this run's history"),
    ]:
        with pytest.raises(PreconditionError, match=words) as refused:
            await store.import_groups("v", [imported(driver, 1.0, 0.0, versions=versions)])
        assert refused.value.field == "groups[0].samples[0].sample.segments"
    with pytest.raises(PreconditionError, match="groups: staleness bound: 0 of 4 groups live, 5 more came"):
        await store.import_groups("b", [imported(driver, 1.0, 0.0)] * 5)
    old = imported(driver, 1.0, 0.0)
    for step in (1, 2):
        await driver.step(step)
    with pytest.raises(PreconditionError, match=r"e1\.s0 is older than max_staleness = 1 allows"):
        await store.import_groups("o", [old])
    assert (await driver.counts()).keys() <= {"CONSUMED", "READY"}


async def test_nothing_is_imported_while_no_version_is_published(start: Start, store: Store) -> None:
    driver = await start()
    group = imported(driver, 1.0, 0.0)
    for step in (1, 2):
        await driver.step(step)
    epoch, _ = await store.acquire_epoch()
    await store.recover(epoch, 0, None)
    with pytest.raises(PreconditionError, match="no version published yet"):
        await store.import_groups("a", [group])


async def test_a_late_writer_of_the_first_life_does_not_reach_the_second(start: Start, store: Store) -> None:
    driver = await start(group_size=3, min_group_size=2)
    lease = await driver.generate_lease(1)
    await store.release(1, released(lease, pb.RELEASE_REASON_FATAL, error="x"))
    await store.requeue([SampleRef(0, 0)])
    second = await driver.generate_lease(1)
    assert refs(second)[0][0] == SampleRef(0, 0)
    assert outcomes(await store.complete_generate(driver.generated(lease))) == ["LEASE_LOST"]
    assert outcomes(await store.complete_generate(driver.generated(second))) == ["OK"]
