"""Waiting partial groups: who sees them, and whose word on their order counts."""

from __future__ import annotations

from polyhead.v1 import buffer_pb2 as pb
from services.buffer import partials
from services.buffer.records import Extension, Lease
from services.buffer.store import Store
from tests.contract.conftest import Start
from tests.kit.buffer_driver import Driver, orders, refs, released


async def given_back(driver: Driver, tokens: int = 3) -> Lease:
    """Leases all there is, saves tokens of each group's first sample and gives everything back."""
    lease = await driver.generate_lease()
    delta = partials.frame(b"t")
    rows = [Extension(ref, lease_id, 0, tokens, delta) for ref, lease_id in refs(lease) if ref.index == 0]
    await driver.store.extend(rows)
    await driver.store.release(1, released(lease, pb.RELEASE_REASON_DRAIN))
    return lease


async def test_waiting_groups_with_tokens_are_listed_oldest_first(start: Start, store: Store) -> None:
    driver = await start()
    assert await store.partials(9) == []
    await given_back(driver)
    listed = await store.partials(3)
    assert [group.order for group in listed] == [0, 1, 2]
    first, second = listed[0].samples
    assert (first.facts.completion_tokens, first.facts.oldest) == (3, driver.version)
    assert (second.facts.completion_tokens, second.facts.oldest.epoch) == (0, 0)
    assert (first.partial, first.payload, first.lease_id) == (b"", b"", 0)
    assert listed[0].prompt == b"prompt 0"


async def test_finished_siblings_come_with_their_rewards(start: Start, store: Store) -> None:
    driver = await start(batch_groups=1, max_staleness=0)
    lease = await driver.generate_lease(2)
    await store.complete_generate(driver.generated(lease)[:1])
    await driver.score(reward=0.75)
    await store.release(1, released(lease, pb.RELEASE_REASON_DRAIN)[1:])
    [group] = await store.partials(9)
    assert [(each.facts.completion_tokens, each.facts.reward) for each in group.samples] == [(4, 0.75), (0, 0.0)]


async def test_preferred_groups_are_leased_first_and_the_rest_keeps_its_order(start: Start, store: Store) -> None:
    driver = await start()
    await given_back(driver)
    await store.prefer([2, 99, 1, 2])
    assert orders(await driver.generate_lease(3)) == [2, 1]
    assert orders(await driver.generate_lease(9)) == [1, 0, 3]


async def test_the_newest_word_counts_and_none_means_oldest_first(start: Start, store: Store) -> None:
    driver = await start()
    await given_back(driver)
    await store.prefer([3])
    await store.prefer([])
    assert orders(await driver.generate_lease(2)) == [0]
