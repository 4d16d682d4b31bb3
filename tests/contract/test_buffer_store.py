"""What every store promises, on the reference and on a real Valkey."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.buffer import partials, policy, redis_store
from services.buffer.ids import SampleRef
from services.buffer.records import (
    Extension,
    Generated,
    IssuedPrompt,
    Lease,
    RunParams,
    Scored,
    Waiting,
    WatermarkRecord,
)
from services.buffer.store import Store
from services.common.errors import ConfigError, FencedError, PreconditionError
from services.common.versions import Version
from tests.kit.buffer_driver import Driver, orders, outcomes, params, refs, released

Start = Callable[..., Awaitable[Driver]]
TTL_MS = 30


# The run


async def test_open_names_both_values_of_what_cannot_change(store: Store) -> None:
    await store.open(params())
    await store.issue(0, [IssuedPrompt(0, b"p")])
    for change, words in [
        ({"group_size": 4}, "n_samples_per_prompt: is 4, but the run was begun with 2"),
        ({"dataset_digest": "d1"}, "the data set is d1, but the run was begun with d0"),
        ({"seed": 8}, "data.seed: is 8, but the run was begun with 7"),
    ]:
        with pytest.raises(ConfigError, match=words):
            await store.open(params(**change))
    assert (await store.ledger(admit=True)).accepted == 2


async def test_open_takes_over_what_may_change(start: Start, store: Store) -> None:
    driver = await start()
    await driver.fill()
    assert (await store.ledger(admit=True)).live_groups_limit == 4
    await store.open(params(max_staleness=3))
    ledger = await store.ledger(admit=True)
    assert (ledger.live_groups, ledger.live_groups_limit) == (4, 8)


async def test_an_unused_run_may_be_opened_with_other_values(store: Store) -> None:
    await store.open(params())
    await store.open(params(group_size=3, dataset_digest="d1"))
    assert await store.issue(0, [IssuedPrompt(0, b"p")]) == 1
    assert (await store.ledger(admit=True)).accepted == 3


# Issue and submit


async def test_issue_is_a_compare_and_set_on_the_cursor(store: Store) -> None:
    await store.open(params())
    prompts = [IssuedPrompt(0, b"a"), IssuedPrompt(1, b"b")]
    assert await store.issue(0, prompts) == 2
    assert await store.issue(0, prompts) == 0
    assert await store.issue(2, [IssuedPrompt(2, b"c")]) == 1
    ledger = await store.ledger(admit=True)
    assert (ledger.cursor, ledger.accepted) == (3, 6)


async def test_submit_is_idempotent_and_leased_like_any_group(start: Start, store: Store) -> None:
    driver = await start()
    assert await store.submit("r1", [b"x", b"y"]) == [0, 1]
    assert await store.submit("r1", [b"x", b"y"]) == [0, 1]
    assert await store.submit("r2", [b"z"]) == [2]
    assert await store.submit("r1", [b"x", b"y"]) == [0, 1]
    lease = await driver.generate_lease(2)
    assert [(group.order, group.ordinal, group.prompt) for group in lease.groups] == [(0, -1, b"x")]
    assert await driver.counts() == {"PENDING": 4, "GENERATING": 2}


async def test_the_newest_submits_are_remembered(start: Start, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (policy, redis_store):
        monkeypatch.setattr(module, "KEPT_SUBMITS", 3)
    await start()
    for number in range(5):
        assert await store.submit(f"r{number}", [b"x"]) == [number]
    assert [await store.submit(f"r{number}", [b"x"]) for number in (2, 3, 4)] == [[2], [3], [4]]
    assert await store.submit("r0", [b"x"]) == [5]


# Leases for generation


async def test_nothing_is_leased_before_a_version_is_published(store: Store) -> None:
    await store.open(params())
    lease = await store.lease_generate("r", 8, Version(1, 0), admit=True)
    assert (list(lease.groups), lease.wanted, lease.waiting) == ([], (), Waiting("unpublished"))


async def test_a_replica_below_the_published_version_gets_nothing(start: Start) -> None:
    driver = await start()
    await driver.step(1)
    assert (await driver.generate_lease(version=Version(1, 0))).waiting == Waiting("below", (1, 1))
    assert (await driver.generate_lease(version=Version(1, 2))).groups


async def test_admission_stops_at_the_bound_and_counts_unpublished_steps(start: Start, store: Store) -> None:
    driver = await start()  # (1 + 1) × 2 groups
    await driver.fill()
    lease = await driver.generate_lease()
    assert lease.waiting == Waiting("bound", (4, 4))
    await driver.train(1)
    assert (await driver.generate_lease()).waiting == Waiting("bound", (4, 4))
    await driver.publish(1)
    assert len((await driver.generate_lease()).groups) == 2


async def test_over_sampling_raises_the_limit(start: Start) -> None:
    driver = await start(surplus_groups=3)
    assert len((await driver.generate_lease()).groups) == 7


async def test_siblings_and_partials_go_before_new_groups(start: Start, store: Store) -> None:
    driver = await start()
    first = await driver.generate_lease(1)
    second = await driver.generate_lease(3)
    assert refs(first)[0][0] == SampleRef(0, 0)
    assert [ref for ref, _ in refs(second)] == [SampleRef(0, 1), SampleRef(1, 0), SampleRef(1, 1)]
    await store.release(1, released(first, pb.RELEASE_REASON_DRAIN))
    third = await driver.generate_lease(2)
    assert [ref for ref, _ in refs(third)] == [SampleRef(0, 0), SampleRef(2, 0)]


async def test_a_full_store_admits_no_group_but_lets_admitted_ones_finish(start: Start) -> None:
    driver = await start()
    await driver.generate_lease(1)
    lease = await driver.generate_lease(admit=False)
    assert [ref for ref, _ in refs(lease)] == [SampleRef(0, 1)]
    assert (await driver.generate_lease(admit=False)).waiting == Waiting("memory")


async def test_lease_ids_are_never_used_twice(start: Start, store: Store) -> None:
    driver = await start()
    seen: list[int] = []
    for _ in range(3):
        lease = await driver.generate_lease()
        seen += [lease_id for _, lease_id in refs(lease)]
        await store.release(1, released(lease, pb.RELEASE_REASON_DRAIN))
    assert len(set(seen)) == len(seen) == 24


# Repeated and bounded leases


async def issue_four_groups(driver: Driver) -> None:
    """As many as the bound lets; all samples wait."""
    await driver.store.release(1, released(await driver.generate_lease(), pb.RELEASE_REASON_DRAIN))


async def test_a_repeated_request_gets_what_the_lost_answer_had_leased(start: Start, store: Store) -> None:
    driver = await start()
    await issue_four_groups(driver)
    first = await store.lease_generate("r", 3, driver.version, admit=True, request_id="a")
    assert [ref for ref, _ in refs(first)] == [SampleRef(0, 0), SampleRef(0, 1), SampleRef(1, 0)]
    again = await store.lease_generate("r", 3, driver.version, admit=True, request_id="a")
    assert again.groups == first.groups
    await store.release(1, released(first, pb.RELEASE_REASON_DRAIN)[:2])
    rest = await store.lease_generate("r", 3, driver.version, admit=True, request_id="a")
    assert refs(rest) == refs(first)[2:]
    assert (await store.lease_generate("other", 1, driver.version, admit=True, request_id="a")).groups
    taken = await store.lease_generate("r", 1, driver.version, admit=True, request_id="b")
    assert [ref for ref, _ in refs(taken)] == [SampleRef(0, 1)]
    fresh = await store.lease_generate("r", 1, driver.version, admit=True, request_id="a")
    assert [ref for ref, _ in refs(fresh)] == [SampleRef(1, 1)]


async def test_a_repeated_request_gets_all_its_turns(start: Start, store: Store) -> None:
    driver = await start()
    await issue_four_groups(driver)
    turns: list[tuple[SampleRef, int]] = []
    for more in (False, True):
        turns += refs(await store.lease_generate("r", 2, driver.version, admit=True, request_id="a", more=more))
    assert len(turns) == 4
    again = await store.lease_generate("r", 4, Version(0, 0), admit=True, request_id="a")
    assert refs(again) == turns


async def test_a_repeated_score_request_brings_its_payloads_and_new_time(start: Start, store: Store) -> None:
    driver = await start(lease_ttl_ms=900)
    await driver.generate(2)
    first = await store.lease_score("s", 2, payload=True, request_id="a")
    for _ in range(3):
        await asyncio.sleep(0.35)
        assert await store.lease_score("s", 2, payload=True, request_id="a") == first
    await store.complete_score([Scored(ref, lease_id, float(ref.index), b"") for ref, lease_id in refs(first)])
    assert not (await store.lease_score("s", 2, payload=True, request_id="a")).groups


async def test_what_was_granted_is_forgotten_with_the_replica(start: Start, store: Store) -> None:
    driver = await start()
    await store.register_replica("r", b"", TTL_MS)
    await driver.generate_lease(1)
    first = await store.lease_generate("r", 1, driver.version, admit=True, request_id="a")
    await asyncio.sleep(2 * TTL_MS / 1000)
    await store.list_replicas()
    second = await store.lease_generate("r", 1, driver.version, admit=True, request_id="a")
    assert refs(second)[0][0] != refs(first)[0][0]


async def test_answers_are_bounded_but_never_empty(start: Start, store: Store) -> None:
    driver = await start()
    await issue_four_groups(driver)
    lease = await driver.generate_lease(2)
    await store.extend([Extension(ref, lease_id, 0, 9, b"t" * 100) for ref, lease_id in refs(lease)])
    await store.release(1, released(lease, pb.RELEASE_REASON_DRAIN))
    for bound, count in [(1, 1), (207, 1), (208, 2), (220, 4), (1000, 8)]:
        lease = await store.lease_generate("r", 8, driver.version, admit=True, max_bytes=bound)
        assert (len(refs(lease)), bool(lease.wanted)) == (count, False), bound
        await store.release(1, released(lease, pb.RELEASE_REASON_DRAIN))
    await driver.generate()
    for bound, count in [(1, 1), (49, 3), (79, 5), (1000, 8)]:  # groups of 8 + 2 × 11 bytes
        lease = await store.lease_score("s", 8, payload=True, max_bytes=bound)
        assert len(refs(lease)) == count, bound
        await store.release(2, released(lease, pb.RELEASE_REASON_DRAIN))
    assert len(refs(await store.lease_score("s", 8, payload=False, max_bytes=32))) == 8


async def test_a_batch_that_is_too_big_comes_without_payloads(start: Start, store: Store) -> None:
    driver = await start()
    await driver.fill()  # payloads of 11 bytes, no scores
    for bound, payload in [(44, b"payload 0 0"), (43, b""), (1, b"")]:
        lease = await store.lease_train(driver.epoch, 1, payload=True, max_bytes=bound)
        assert {bool(sample.payload) for group in lease.groups for sample in group.samples} == {bool(payload)}
        assert lease.groups[0].samples[0].payload == payload
        assert lease.groups[1].samples[1].facts.completion_tokens == 4


# Partial samples


async def test_deltas_are_appended_and_come_back_with_the_next_lease(start: Start, store: Store) -> None:
    driver = await start()
    lease = await driver.generate_lease(1)
    (ref, lease_id), *_ = refs(lease)
    one, two = partials.frame(b"one"), partials.frame(b"two")
    report = await store.extend([Extension(ref, lease_id, 0, 3, one)])
    assert (outcomes(report), report.results[0].saved_tokens) == (["OK"], 3)
    assert outcomes(await store.extend([Extension(ref, lease_id, 3, 2, two)])) == ["OK"]
    await store.release(1, released(lease, pb.RELEASE_REASON_DRAIN, tokens_discarded=4))
    again = (await driver.generate_lease(1)).groups[0].samples[0]
    assert partials.split(again.partial) == [b"one", b"two"]
    assert (again.facts.completion_tokens, again.attempt) == (5, 0)
    counters = (await store.ledger(admit=True)).counters
    assert counters == {"tokens_generated": 5, "tokens_discarded": 4, "tokens_discarded.drain": 4}


async def test_a_delta_from_the_wrong_token_conflicts(start: Start, store: Store) -> None:
    driver = await start()
    (ref, lease_id), *_ = refs(await driver.generate_lease(1))
    await store.extend([Extension(ref, lease_id, 0, 3, partials.frame(b"abc"))])
    report = await store.extend([Extension(ref, lease_id, 2, 3, partials.frame(b"cde"))])
    assert (outcomes(report), report.results[0].saved_tokens) == (["CONFLICT"], 3)
    report = await store.extend([Extension(ref, lease_id, 0, 3, partials.frame(b"abc"))])
    assert outcomes(report) == ["DUPLICATE"]
    (fetched,) = await store.fetch([ref])
    assert partials.split(fetched.partial) == [b"abc"]


async def test_a_late_writer_is_refused(start: Start, store: Store) -> None:
    driver = await start()
    lease = await driver.generate_lease(1)
    (ref, old), *_ = refs(lease)
    await store.release(1, released(lease, pb.RELEASE_REASON_DRAIN))
    (_, new), *_ = refs(await driver.generate_lease(1))
    assert outcomes(await store.extend([Extension(ref, old, 0, 1, partials.frame(b"x"))])) == ["LEASE_LOST"]
    assert outcomes(await store.complete_generate([Generated(ref, old, 5, 4, 1, ((1, 0, 0),), b"late")])) == [
        "LEASE_LOST"
    ]
    assert outcomes(await store.complete_generate([Generated(ref, new, 5, 4, 1, ((1, 0, 0),), b"good")])) == ["OK"]
    (fetched,) = await store.fetch([ref])
    assert fetched.payload == b"good"
    assert (await store.ledger(admit=True)).counters == {
        "tokens_generated": 4,
        "tokens_discarded": 4,
        "tokens_discarded.completed_late": 4,
    }


async def test_unknown_samples_are_gone(start: Start, store: Store) -> None:
    await start()
    nowhere = SampleRef(99, 0)
    assert outcomes(await store.extend([Extension(nowhere, 1)])) == ["GONE"]
    assert outcomes(await store.complete_score([Scored(SampleRef(0, 9), 1, 0.0, b"")])) == ["GONE"]
    assert [each.state for each in await store.fetch([nowhere])] == [0]


# Completion, filter, groups


async def test_generation_ends_in_a_stored_payload(start: Start, store: Store) -> None:
    driver = await start()
    lease = await driver.generate_lease(1)
    (ref, lease_id), *_ = refs(lease)
    await store.extend([Extension(ref, lease_id, 0, 2, partials.frame(b"part"))])
    completed = driver.generated(lease)
    assert outcomes(await store.complete_generate(completed)) == ["OK"]
    assert outcomes(await store.complete_generate(completed)) == ["DUPLICATE"]
    (fetched,) = await store.fetch([ref])
    assert (fetched.state, fetched.payload, fetched.partial) == (
        sample_pb2.SAMPLE_STATE_GENERATED,
        b"payload 0 0",
        b"",
    )
    assert (await store.ledger(admit=True)).counters == {"tokens_generated": 4}


async def test_a_group_is_leased_to_be_scored_together_when_all_of_it_is_generated(start: Start, store: Store) -> None:
    driver = await start(scored_whole=True, group_size=3, min_group_size=2)
    samples = driver.generated(await driver.generate_lease(), driver.version)
    first, rest = [each for each in samples if each.ref.order == 0], [each for each in samples if each.ref.order]
    await store.complete_generate([*first[:2], *rest])
    early = await store.lease_score("s", 4, payload=True)
    assert refs(early)[0][0].order == 1
    assert len(refs(early)) == 3
    assert not any(each.payload for each in early.groups[0].samples)
    await store.complete_generate(first[2:])
    late = await store.lease_score("s", 1, payload=False)
    assert [ref for ref, _ in refs(late)] == [SampleRef(0, index) for index in range(3)]


async def test_a_sample_given_back_is_scored_when_the_others_of_its_group_are_settled(
    start: Start, store: Store
) -> None:
    driver = await start(scored_whole=True)
    await store.complete_generate(driver.generated(await driver.generate_lease(2), driver.version))
    lease = await store.lease_score("s", 2, payload=False)
    returned, kept = released(lease, pb.RELEASE_REASON_SAMPLE_ERROR, error="odd")
    await store.release(sample_pb2.STAGE_SCORE, [returned])
    assert not (await store.lease_score("s", 2, payload=False)).groups
    await store.complete_score([Scored(kept.ref, kept.lease_id, 1.0, b"")])
    again = await store.lease_score("s", 2, payload=False)
    assert [ref for ref, _ in refs(again)] == [returned.ref]


async def test_a_group_becomes_ready_as_a_whole(start: Start, store: Store) -> None:
    driver = await start()
    await driver.generate(2)
    assert (await driver.score(1)).ready_groups == 0
    assert await driver.counts() == {"PENDING": 2, "SCORED": 1, "GENERATED": 1}
    assert (await driver.score(1)).ready_groups == 1
    assert (await driver.counts())["READY"] == 2


async def test_scoring_leases_carry_prompt_and_payload(start: Start, store: Store) -> None:
    driver = await start()
    await driver.generate(4)
    lease = await store.lease_score("s", 3, payload=True)
    assert [(group.order, group.prompt, len(group.samples)) for group in lease.groups] == [
        (0, b"prompt 0", 2),
        (1, b"prompt 1", 1),
    ]
    assert lease.groups[0].samples[1].payload == b"payload 0 1"
    assert lease.groups[0].samples[1].facts.oldest == Version(1, 0)
    assert (await store.lease_score("s", 3, payload=False)).groups[0].samples[0].payload == b""


async def test_a_lease_tells_whether_another_would_get_something(start: Start, store: Store) -> None:
    driver = await start()
    lease = await driver.generate_lease(3)
    assert lease.left_over
    rest = await driver.generate_lease(5)
    assert (len(refs(rest)), rest.left_over) == (5, False)
    await store.complete_generate(driver.generated(lease))
    assert (await store.lease_score("s", 2, payload=False, request_id="a")).left_over
    assert (await store.lease_score("s", 2, payload=False, request_id="a")).left_over
    assert not (await store.lease_score("s", 2, payload=False, request_id="b")).left_over
    small = await store.lease_generate("r", 1, driver.version, admit=False)
    assert not small.left_over


async def test_scores_are_idempotent_and_late_ones_refused(start: Start, store: Store) -> None:
    driver = await start()
    await driver.generate(2)
    lease = await store.lease_score("s", 2, payload=False)
    (first, lease_id), _ = refs(lease)
    score = Scored(first, lease_id, 1.0, b"score")
    assert outcomes(await store.complete_score([score, score])) == ["OK", "DUPLICATE"]
    assert outcomes(await store.complete_score([Scored(first, lease_id + 99, 0.0, b"")])) == ["LEASE_LOST"]


async def test_zero_variance_is_dropped_and_frees_room(start: Start, store: Store) -> None:
    driver = await start(drop_zero_variance=True)
    await driver.generate(4)
    report = await driver.score(reward=0.25)
    assert (report.ready_groups, report.closed_groups) == (0, 2)
    assert await driver.counts() == {"DROPPED(ZERO_VARIANCE)": 4}
    ledger = await store.ledger(admit=True)
    assert ledger.live_groups == 0
    assert [each.payload for each in await store.fetch([SampleRef(0, 0)])] == [b""]
    await driver.generate(2)
    assert (await driver.score()).ready_groups == 1


async def test_completing_again_after_the_group_closed_is_still_a_duplicate(start: Start, store: Store) -> None:
    driver = await start(drop_zero_variance=True)
    lease = await driver.generate_lease(2)
    generated = driver.generated(lease)
    await store.complete_generate(generated)
    scores = [Scored(ref, lease_id, 1.0, b"") for ref, lease_id in refs(await store.lease_score("s", 2, payload=False))]
    await store.complete_score(scores)
    assert outcomes(await store.complete_generate(generated)) == ["DUPLICATE"] * 2
    assert outcomes(await store.complete_score(scores)) == ["DUPLICATE"] * 2
    assert outcomes(await store.extend([Extension(*refs(lease)[0])])) == ["GONE"]


# Release and attempts


async def test_drains_and_unreachable_scorers_never_count(start: Start, store: Store) -> None:
    driver = await start(max_attempts=1)
    for reason in (pb.RELEASE_REASON_DRAIN, pb.RELEASE_REASON_UNAVAILABLE):
        lease = await driver.generate_lease(2)
        back = released(lease, reason)
        assert outcomes(await store.release(1, back)) == ["OK", "OK"]
        assert outcomes(await store.release(1, back)) == ["DUPLICATE", "DUPLICATE"]
    assert (await driver.generate_lease(1)).groups[0].samples[0].attempt == 0


async def test_a_sample_that_fails_too_often_takes_its_group_along(start: Start, store: Store) -> None:
    driver = await start()
    for attempt in range(3):
        lease = await driver.generate_lease(1)
        assert lease.groups[0].samples[0].attempt == attempt
        report = await store.release(1, released(lease, pb.RELEASE_REASON_SAMPLE_ERROR, error="boom"))
    assert report.closed_groups == 1
    assert await driver.counts() == {"DEAD": 1, "DROPPED(GROUP_DEAD)": 1, "PENDING": 2}


async def test_attempts_start_again_when_tokens_were_saved(start: Start, store: Store) -> None:
    driver = await start(max_attempts=2)
    for saved in range(4):
        lease = await driver.generate_lease(1)
        (ref, lease_id), *_ = refs(lease)
        await store.extend([Extension(ref, lease_id, saved, 1, partials.frame(b"t"))])
        await store.release(1, released(lease, pb.RELEASE_REASON_SAMPLE_ERROR, error="boom"))
    assert (await driver.generate_lease(1)).groups[0].samples[0].attempt == 1


async def test_a_group_shrinks_to_what_is_enough(start: Start, store: Store) -> None:
    driver = await start(group_size=3, min_group_size=2)
    await driver.generate(2)
    dead = await driver.generate_lease(1)
    report = await store.release(1, released(dead, pb.RELEASE_REASON_FATAL, error="never"))
    assert report.closed_groups == 0
    assert (await driver.score(2)).ready_groups == 1
    await driver.generate(3)
    await driver.score(3)
    batch = await driver.train(1)
    assert [len(group.samples) for group in batch.groups] == [2, 3]
    assert await driver.counts() == {"CONSUMED": 5, "DEAD": 1}


async def test_the_last_death_completes_a_group_whose_others_are_scored(start: Start, store: Store) -> None:
    driver = await start(group_size=3, min_group_size=2)
    await driver.generate(3)
    await driver.score(2)
    last = await store.lease_score("s", 1, payload=False)
    report = await store.release(2, released(last, pb.RELEASE_REASON_FATAL, error="never"))
    assert (report.ready_groups, report.closed_groups) == (1, 0)


async def test_drop_closes_the_whole_group(start: Start, store: Store) -> None:
    driver = await start()
    lease = await driver.generate_lease(2)
    (first, second) = released(lease, pb.RELEASE_REASON_DROP, drop_reason=sample_pb2.DROP_REASON_OVERSIZE)
    assert outcomes(await store.release(1, [first, second])) == ["OK", "GONE"]
    assert outcomes(await store.complete_generate(driver.generated(lease))) == ["GONE", "GONE"]
    assert (await driver.counts())["DROPPED(OVERSIZE)"] == 2


# Expiry


async def test_expired_work_returns_and_counts_without_progress(start: Start, store: Store) -> None:
    driver = await start(lease_ttl_ms=TTL_MS)
    lease = await driver.generate_lease(2)
    (ref, lease_id), other = refs(lease)
    await store.extend([Extension(ref, lease_id, 0, 1, partials.frame(b"t")), Extension(*other)])
    await asyncio.sleep(2 * TTL_MS / 1000)
    again = await driver.generate_lease(2)
    assert [(sample.index, sample.attempt) for sample in again.groups[0].samples] == [(0, 0), (1, 1)]
    assert outcomes(await store.complete_generate(driver.generated(lease))) == ["LEASE_LOST"] * 2
    assert (await store.ledger(admit=True)).counters["leases_expired"] == 2


async def test_scoring_leases_expire_too_and_dead_ones_block_nobody(start: Start, store: Store) -> None:
    driver = await start(lease_ttl_ms=TTL_MS, max_attempts=2)
    await driver.generate(2)
    for _ in range(2):
        await store.extend([Extension(*each) for each in refs(await store.lease_score("s", 1, payload=False))])
        await asyncio.sleep(2 * TTL_MS / 1000)
    lease = await store.lease_score("s", 2, payload=False)
    assert not lease.groups
    assert lease.closed_groups == 1
    assert await driver.counts() == {"DEAD": 1, "DROPPED(GROUP_DEAD)": 1, "PENDING": 2}


async def test_leases_that_nobody_heard_of_count_only_when_they_go_on(start: Start, store: Store) -> None:
    driver = await start(lease_ttl_ms=TTL_MS, max_attempts=3)
    attempts = []
    for _ in range(5):
        attempts.append((await driver.generate_lease(1)).groups[0].samples[0].attempt)
        await asyncio.sleep(2 * TTL_MS / 1000)
    assert attempts == [0, 0, 0, 1, 2]
    assert (await driver.generate_lease(1)).groups[0].order == 1
    assert (await driver.counts())["DEAD"] == 1


async def test_a_heartbeat_between_ends_the_row_of_lost_leases(start: Start, store: Store) -> None:
    driver = await start(lease_ttl_ms=TTL_MS, max_attempts=2)
    for _ in range(3):
        for _ in range(2):
            assert (await driver.generate_lease(1)).groups[0].samples[0].attempt == 0
            await asyncio.sleep(2 * TTL_MS / 1000)
        lease = await driver.generate_lease(1)
        await store.extend([Extension(*refs(lease)[0])])
        await store.release(1, released(lease, pb.RELEASE_REASON_DRAIN))
    assert (await driver.counts()).get("DEAD") is None


async def test_a_heartbeat_keeps_a_lease(start: Start, store: Store) -> None:
    driver = await start(lease_ttl_ms=200)
    lease = await driver.generate_lease(2)
    for _ in range(4):
        await asyncio.sleep(0.1)
        assert outcomes(await store.extend([Extension(*each) for each in refs(lease)])) == ["OK", "OK"]
        await driver.generate_lease(1)
    assert outcomes(await store.complete_generate(driver.generated(lease))) == ["OK", "OK"]


# Training


async def test_a_batch_is_whole_groups_in_order_and_the_same_when_asked_again(start: Start, store: Store) -> None:
    driver = await start()
    await driver.fill()
    lease = await store.lease_train(driver.epoch, 1, payload=True)
    assert orders(lease) == [0, 1]
    assert [sample.payload for sample in lease.groups[1].samples] == [b"payload 1 0", b"payload 1 1"]
    assert await store.lease_train(driver.epoch, 1, payload=True) == lease
    assert await driver.counts() == {"TRAINING": 4, "READY": 4}
    assert await store.commit_step(driver.epoch, 1, lease.batch_lease_id, trained=True)
    assert not await store.commit_step(driver.epoch, 1, lease.batch_lease_id, trained=True)
    assert await driver.counts() == {"CONSUMED": 4, "READY": 4}


async def test_commits_are_refused_with_a_gap_or_without_a_lease(start: Start, store: Store) -> None:
    driver = await start()
    await driver.fill()
    with pytest.raises(PreconditionError, match="step: 2 does not follow the last committed step 0"):
        await store.lease_train(driver.epoch, 2, payload=False)
    with pytest.raises(PreconditionError, match="no batch of step 1"):
        await store.commit_step(driver.epoch, 1, 1, trained=True)
    lease = await store.lease_train(driver.epoch, 1, payload=False)
    with pytest.raises(PreconditionError, match="step: 2 does not follow"):
        await store.commit_step(driver.epoch, 2, lease.batch_lease_id, trained=True)
    with pytest.raises(PreconditionError, match="batch_lease_id: no batch of step 1"):
        await store.commit_step(driver.epoch, 1, lease.batch_lease_id + 1, trained=True)
    assert (await driver.counts())["TRAINING"] == 4


async def test_training_waits_for_groups_and_says_so(start: Start, store: Store) -> None:
    driver = await start()
    await driver.generate(2)
    await driver.score(2)
    await driver.generate_lease(1)
    lease = await store.lease_train(driver.epoch, 1, payload=False)
    assert lease.waiting == Waiting("groups", (1, 2, 1, 0))


async def test_a_skipped_step_drops_its_batch(start: Start, store: Store) -> None:
    driver = await start()
    await driver.fill()
    await driver.train(1, trained=False)
    assert await driver.counts() == {"DROPPED(INVALID)": 4, "READY": 4}
    ledger = await store.ledger(admit=True)
    assert (ledger.step, ledger.live_groups) == (1, 4)  # its place among the steps is gone


# Staleness


async def held_back(driver: Driver) -> Lease:
    """Group 0 stays in generation while groups 1 to 3 become READY."""
    slow = await driver.generate_lease(2)
    await driver.generate()
    await driver.score()
    return slow


async def test_wait_leaves_a_slow_group_behind_only_until_its_deadline(start: Start, store: Store) -> None:
    driver = await start()
    slow = await held_back(driver)
    assert orders(await driver.train(1)) == [1, 2]
    await driver.publish(1)
    await driver.generate()
    await driver.score()
    # Groups 0 and 3 were born at step 0: step 2 is the last one that may train them.
    waiting = (await store.lease_train(driver.epoch, 2, payload=False)).waiting
    assert waiting == Waiting("deadline", (0,))
    assert (await store.ledger(admit=True)).waiting[3] == waiting
    await store.complete_generate(driver.generated(slow, Version(1, 0)))
    await driver.score()
    batch = await driver.train(2)
    assert [(group.order, group.staleness) for group in batch.groups] == [(0, 1), (3, 1)]


async def test_drop_closes_what_is_over_the_bound_and_issues_it_again_first(start: Start, store: Store) -> None:
    driver = await start(on_stale="drop")
    slow = await held_back(driver)
    for step in (1, 2):
        await driver.generate(6)
        await driver.score(6)
        assert 0 not in orders(await driver.train(step))
        await driver.publish(step)
    assert (await driver.counts())["DROPPED(STALE)"] == 2
    assert outcomes(await store.complete_generate(driver.generated(slow))) == ["GONE", "GONE"]
    again = await driver.generate_lease(2)
    assert [(group.ordinal, group.prompt) for group in again.groups] == [(0, b"prompt 0")]
    assert again.groups[0].order > 0


async def test_mask_trains_what_is_over_the_bound(start: Start, store: Store) -> None:
    driver = await start(on_stale="mask", batch_groups=1)
    slow = await driver.generate_lease(2)
    for step in (1, 2, 3):
        await driver.generate(2)
        await driver.score(2)
        await driver.train(step)
        await driver.publish(step)
    await store.complete_generate(driver.generated(slow, Version(1, 0)))
    await driver.score()
    batch = await driver.train(4)
    assert [(group.order, group.staleness) for group in batch.groups] == [(0, 3)]


async def test_tokens_older_than_the_birth_bring_the_deadline_forward(start: Start, store: Store) -> None:
    driver = await start(max_staleness=2, batch_groups=1)
    await driver.step(1)
    await driver.step(2)
    fresh = await driver.generate_lease(2)  # born at step 2, due at 5
    await store.complete_generate(driver.generated(fresh, Version(1, 0)))
    await driver.score()
    # Step 3 is now the last one for it, as for group 2, which was there before.
    assert orders(await driver.train(3)) == [2]
    assert orders(await driver.train(4)) == [3]
    assert (await driver.counts())["DROPPED(STALE)"] == 2


# Fencing and recovery


async def test_an_older_epoch_is_fenced_everywhere(start: Start, store: Store) -> None:
    driver = await start()
    await driver.fill()
    lease = await store.lease_train(1, 1, payload=False)
    assert await store.acquire_epoch() == (2, 0)
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: store.lease_train(1, 1, payload=False),
        lambda: store.commit_step(1, 1, lease.batch_lease_id, trained=True),
        lambda: store.publish_version(Version(1, 1)),
        lambda: store.confirm_checkpoint(1, 0),
        lambda: store.watermark(1, 0),
        lambda: store.recover(1, 0, None),
    ]
    for call in calls:
        with pytest.raises(FencedError, match="epoch: 1 was superseded by 2"):
            await call()
    with pytest.raises(PreconditionError, match="epoch: 9 was never acquired"):
        await store.lease_train(9, 1, payload=False)
    with pytest.raises(PreconditionError, match="epoch 2 has to Recover first"):
        await store.lease_train(2, 1, payload=False)


async def test_an_epoch_that_a_checkpoint_knows_is_not_used_again(start: Start, store: Store) -> None:
    await start()
    assert await store.acquire_epoch(1) == (2, 0)
    assert await store.acquire_epoch(7) == (8, 0)
    assert await store.acquire_epoch(3) == (9, 0)
    await store.recover(9, 0, None)
    await store.publish_version(Version(9, 0))
    with pytest.raises(FencedError):
        await store.publish_version(Version(8, 0))


async def test_a_new_trainer_gets_the_batch_of_the_old_one(start: Start, store: Store) -> None:
    driver = await start()
    await driver.fill()
    first = await store.lease_train(1, 1, payload=False)
    epoch, step = await store.acquire_epoch()
    recovered = await store.recover(epoch, step, None)
    assert (recovered.returned_groups, recovered.replayed_steps) == (2, ())
    second = await store.lease_train(epoch, 1, payload=False)
    assert orders(second) == orders(first)
    assert second.batch_lease_id != first.batch_lease_id


async def test_steps_above_the_checkpoint_are_replayed_with_their_batches(start: Start, store: Store) -> None:
    driver = await start(max_staleness=2)
    await driver.fill()
    batches = [orders(await driver.train(1)), orders(await driver.train(2))]
    cursor = (await store.ledger(admit=True)).cursor
    epoch, _ = await store.acquire_epoch()
    recovered = await store.recover(epoch, 0, None)
    assert (recovered.returned_groups, recovered.replayed_steps) == (4, (1, 2))
    assert await store.recover(epoch, 0, None) == recovered
    assert await driver.counts() == {"READY": 12}
    driver.epoch = epoch
    await driver.publish(0)
    assert [orders(await driver.train(1)), orders(await driver.train(2))] == batches
    assert (await store.ledger(admit=True)).cursor == cursor
    with pytest.raises(PreconditionError, match="has recovered step 0 already"):
        await store.recover(epoch, 0, None)


async def test_replays_that_would_be_too_stale_are_generated_anew(start: Start, store: Store) -> None:
    driver = await start()  # S = 1
    for step in (1, 2, 3, 4):
        await driver.step(step)
    epoch, step = await store.acquire_epoch()
    assert step == 4
    recovered = await store.recover(epoch, 1, None)
    # Step 2 trained tokens of versions 0 or 1. Those of later steps are up to 2 × (4 - 1) steps away by now.
    assert recovered.returned_groups == 6
    assert set(recovered.replayed_steps) <= {2, 3}
    driver.epoch = epoch
    await driver.publish(1)
    for step in (2, 3, 4, 5):
        await driver.fill()
        lease = await driver.train(step)
        assert all(group.staleness <= 1 for group in lease.groups)
        await driver.publish(step)
    counts = await driver.counts()
    assert counts["CONSUMED"] == 20


async def test_a_recovery_unpublishes_what_it_undid(start: Start, store: Store) -> None:
    driver = await start()
    await driver.step(1)
    await driver.step(2)
    epoch, _ = await store.acquire_epoch()
    await store.recover(epoch, 1, None)
    assert (await driver.generate_lease()).waiting == Waiting("unpublished")
    assert await store.register_replica("r", b"", 1000) == Version(2, 1)
    driver.epoch = epoch
    await driver.publish(1)
    assert (await driver.generate_lease(version=Version(1, 2))).waiting == Waiting("below", (2, 1))


async def test_a_version_that_survives_stays_published(start: Start, store: Store) -> None:
    driver = await start()
    await driver.step(1)
    epoch, _ = await store.acquire_epoch()
    await store.recover(epoch, 1, None)
    assert (await store.ledger(admit=True)).published == Version(1, 1)
    assert (await driver.generate_lease(2, version=Version(1, 1))).groups
    assert (await driver.generate_lease(2, version=Version(1, 2))).waiting == Waiting("abandoned")


async def test_publishing_is_monotonic_and_of_committed_steps(start: Start, store: Store) -> None:
    driver = await start()
    await driver.step(1)
    await store.publish_version(Version(1, 1))
    with pytest.raises(PreconditionError, match=r"version: e1.s0 is older than the published e1.s1"):
        await store.publish_version(Version(1, 0))
    with pytest.raises(PreconditionError, match=r"version.step: step 2 is no step"):
        await store.publish_version(Version(1, 2))


# Checkpoints


async def test_confirmed_steps_are_retired_and_their_payloads_deleted(start: Start, store: Store) -> None:
    driver = await start()
    for step in (1, 2, 3):
        await driver.step(step)
    assert await store.confirm_checkpoint(1, 2) == 8
    assert await store.confirm_checkpoint(1, 2) == 0
    counts = await driver.counts()
    assert (counts["RETIRED"], counts["CONSUMED"]) == (8, 4)
    assert [each.state for each in await store.fetch([SampleRef(0, 0)])] == [0]
    with pytest.raises(PreconditionError, match="4 is above the last committed step 3"):
        await store.confirm_checkpoint(1, 4)
    epoch, _ = await store.acquire_epoch()
    with pytest.raises(PreconditionError, match="1 is below the retired step 2"):
        await store.recover(epoch, 1, None)


async def test_a_watermark_names_what_was_closed_at_its_step(start: Start, store: Store) -> None:
    driver = await start()
    slow = await held_back(driver)
    await driver.train(1)
    mark = await store.watermark(1, 1)
    assert mark == WatermarkRecord(1, 0, (1, 2), "d0", 7)
    await store.complete_generate(driver.generated(slow))
    await driver.score()
    await driver.train(2)
    assert (await store.watermark(1, 2)).low_water == 4
    assert await store.watermark(1, 1) == mark
    await store.confirm_checkpoint(1, 1)
    assert await store.watermark(1, 1) == mark
    with pytest.raises(PreconditionError, match="3 is not between"):
        await store.watermark(1, 3)


async def test_an_empty_store_goes_on_at_the_watermark(store: Store) -> None:
    await store.open(params())
    epoch, _ = await store.acquire_epoch()
    with pytest.raises(PreconditionError, match="5 is above the store's last step 0"):
        await store.recover(epoch, 5, None)
    await store.recover(epoch, 5, WatermarkRecord(5, 10, (11, 13), "d0", 7))
    driver = Driver(store, epoch)
    await driver.publish(5)
    lease = await driver.generate_lease()
    assert [group.ordinal for group in lease.groups] == [10, 12, 14, 15]
    await store.complete_generate(driver.generated(lease))
    await driver.score()
    await driver.train(6)
    assert await store.watermark(epoch, 6) == WatermarkRecord(6, 14, (), "d0", 7)


async def test_figures_far_beyond_any_run_cost_no_time(start: Start, store: Store) -> None:
    driver = await start()
    await driver.step(1)
    epoch, _ = await store.acquire_epoch(1_000_000)
    await store.recover(epoch, 1 << 32, WatermarkRecord(1 << 32, 1 << 48, (), "d0", 7))
    after = Driver(store, epoch)
    await after.publish(1 << 32)
    assert [group.ordinal for group in (await after.generate_lease(2)).groups] == [1 << 48]
    assert (await after.counts())["RETIRED"] == 8  # what was trained, and what the watermark says was


async def test_an_older_store_retires_what_the_watermark_closed(start: Start, store: Store) -> None:
    driver = await start()
    await driver.fill()
    await driver.train(1)
    leased = await driver.generate_lease()
    assert not leased.groups
    epoch, _ = await store.acquire_epoch()
    await store.recover(epoch, 3, WatermarkRecord(3, 3, (4,), "d0", 7))
    counts = await driver.counts()
    assert counts == {"RETIRED": 6, "READY": 2}
    driver.epoch = epoch
    await driver.publish(3)
    lease = await driver.generate_lease()
    assert [group.ordinal for group in lease.groups] == [3, 5, 6, 7], "the one that is kept has become too old"


@pytest.mark.parametrize(
    ("digest", "seed", "words"), [("d1", 7, "data set d1, this one is d0"), ("d0", 8, "seed 8, not 7")]
)
async def test_another_data_set_refuses_to_resume(store: Store, digest: str, seed: int, words: str) -> None:
    await store.open(params())
    epoch, _ = await store.acquire_epoch()
    with pytest.raises(ConfigError, match=words):
        await store.recover(epoch, 5, WatermarkRecord(5, 10, (), digest, seed))
    await store.recover(epoch, 0, None)


# Replicas and ledger


async def test_replicas_are_listed_until_their_time_runs_out(store: Store) -> None:
    await store.open(params())
    assert await store.register_replica("b", b"B", 60_000) is None
    await store.register_replica("a", b"A", 60_000)
    await store.register_replica("b", b"B2", 60_000)
    assert await store.list_replicas() == [b"A", b"B2"]
    await store.register_replica("a", b"A", TTL_MS)
    await asyncio.sleep(2 * TTL_MS / 1000)
    assert await store.list_replicas() == [b"B2"]


async def test_the_ledger_says_what_each_stage_waits_for(start: Start, store: Store) -> None:
    driver = await start()
    await driver.generate_lease(3)
    assert (await store.ledger(admit=True)).waiting == {
        2: Waiting("generating", (3,)),
        3: Waiting("groups", (0, 2, 3, 0)),
    }
    await driver.fill()
    waiting = (await store.ledger(admit=True)).waiting
    assert waiting[1] == Waiting("bound", (4, 4))


async def test_nobody_waits_for_a_group_that_a_recovery_made_too_old(start: Start, store: Store) -> None:
    driver = await start()
    for step in (1, 2, 3):
        await driver.generate(4)
        await driver.score()
        await driver.train(step, trained=False)
        await driver.publish(step)
    await driver.fill()
    epoch, _ = await store.acquire_epoch()
    await store.recover(epoch, 0, None)
    # All that is left over from the undone steps is past every deadline: the next lease closes it.
    assert 3 not in (await store.ledger(admit=True)).waiting


async def test_lengths_are_summed_by_state(start: Start, store: Store) -> None:
    driver = await start(drop_zero_variance=True, batch_groups=1)
    await store.complete_generate(driver.generated(await driver.generate_lease(2), tokens=10))
    await driver.score(reward=1.0)
    await store.complete_generate(driver.generated(await driver.generate_lease(2), tokens=4))
    await driver.score()
    await driver.train(1)
    rows = {each.state: each for each in (await store.ledger(admit=True)).counts}
    dropped, consumed = rows[sample_pb2.SAMPLE_STATE_DROPPED], rows[sample_pb2.SAMPLE_STATE_CONSUMED]
    assert (dropped.completion_tokens, dropped.lengths) == (20, 2)
    assert (consumed.completion_tokens, consumed.lengths) == (8, 2)


async def test_a_run_record_holds_every_parameter(store: Store) -> None:
    changed = RunParams(3, 2, 5, 1, 4, "drop", True, True, True, 6, 9, 1234, "d9", 3)
    await store.open(changed)
    assert (await store.ledger(admit=True)).live_groups_limit == 26
