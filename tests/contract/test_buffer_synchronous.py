"""max_staleness = 0: which groups a step is trained on depends on the filter and the order of the prompts alone.

The definition: a step goes through the prompts in their order, from where the last one ended, until as many groups as
a batch has have passed the filter. With over-sampling further groups are begun ahead; that costs work and changes
nothing. Verdicts here depend on the weights, as real ones do, so that a group judged too early is told apart.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from polyhead.v1 import buffer_pb2 as pb
from services.buffer.memory_store import MemoryStore
from services.buffer.records import Lease, LeasedGroup, RunParams, Scored, WatermarkRecord
from services.buffer.redis_store import RedisStore
from services.buffer.store import Store
from services.common.versions import Version
from tests.contract.conftest import Start
from tests.kit.buffer_driver import Driver, outcomes, params, refs
from tests.kit.valkey import Valkey

STEPS = 8
_stores = itertools.count()
SYNCHRONOUS = {"max_staleness": 0, "batch_groups": 2, "surplus_groups": 2}


def ordinals(lease: Lease) -> list[int]:
    return [group.ordinal for group in lease.groups]


async def score(driver: Driver, *rejected: int) -> None:
    """Those of these ordinals get equal rewards."""
    lease = await driver.store.lease_score("reward", 1024, payload=False)
    equal = {group.order for group in lease.groups if group.ordinal in rejected}
    rows = [
        Scored(ref, lease_id, 0.0 if ref.order in equal else float(ref.index), b"") for ref, lease_id in refs(lease)
    ]
    assert set(outcomes(await driver.store.complete_score(rows))) <= {"OK"}


async def test_a_group_rejected_behind_the_last_survivor_comes_again(start: Start, store: Store) -> None:
    driver = await start(drop_zero_variance=True, **SYNCHRONOUS)
    await driver.generate()
    await score(driver, 0, 3)
    assert (await driver.counts())["SCORED"] == 4, "whether their turn comes is not known yet"
    assert ordinals(await driver.generate_lease()) == [4, 5], "each makes room for one"
    assert ordinals(await driver.train(1)) == [1, 2]
    assert (await driver.counts())["DROPPED(ZERO_VARIANCE)"] == 2, "the step came to the first one"
    await driver.publish(1)
    counts = await driver.counts()
    assert (counts["DROPPED(ZERO_VARIANCE)"], counts["DROPPED(SURPLUS)"]) == (2, 6)
    assert ordinals(await driver.generate_lease()) == [3, 4, 5, 6]


async def test_a_verdict_counts_when_its_turn_has_come(start: Start, store: Store) -> None:
    driver = await start(judged=True, **SYNCHRONOUS)
    await driver.generate(4)
    await score(driver)
    lease = await store.lease_score("judge", 9, payload=False)
    verdicts = {0: pb.GROUP_VERDICT_DROP, 1: pb.GROUP_VERDICT_KEEP}
    rows = [Scored(ref, lease_id, 0.0, b"", verdicts[ref.order], "dull") for ref, lease_id in refs(lease)]
    report = await store.complete_score(rows)
    assert (outcomes(report), report.closed_groups) == (["OK", "DUPLICATE"] * 2, 1)
    assert "filter.drop_dull" not in (await store.ledger(admit=True)).counters
    assert (await store.lease_score("judge", 9, payload=False)).groups == [], "it is judged once"
    await driver.generate(2)
    await score(driver)
    lease = await store.lease_score("judge", 9, payload=False)
    await store.complete_score([Scored(ref, i, 0.0, b"", pb.GROUP_VERDICT_KEEP) for ref, i in refs(lease)])
    assert ordinals(await driver.train(1)) == [1, 2]
    assert (await store.ledger(admit=True)).counters["filter.drop_dull"] == 1
    assert (await driver.counts())["DROPPED(FILTERED)"] == 2


async def test_surplus_is_issued_again_before_a_replica_can_be_given_new_prompts(start: Start, store: Store) -> None:
    driver = await start(**SYNCHRONOUS)
    await driver.generate()
    await driver.score()
    await driver.train(1)
    await driver.publish(1)
    assert ordinals(await driver.generate_lease()) == [2, 3, 4, 5]


async def test_what_is_issued_again_is_trained_in_its_place(start: Start, store: Store) -> None:
    """Not after a group that was issued before that, and has waited for its first lease since."""
    driver = await start(max_staleness=0, batch_groups=2, surplus_groups=1)
    first, second = await driver.generate_lease(2), await driver.generate_lease(4)
    assert (ordinals(first), ordinals(second)) == ([0], [1, 2])
    assert (await driver.counts())["PENDING"] == 2, "the next one is issued, and waits"
    await store.complete_generate(driver.generated(first) + driver.generated(second))
    await driver.score()
    assert ordinals(await driver.train(1)) == [0, 1]
    await driver.publish(1)
    assert ordinals(await driver.step(2)) == [2, 3]


@pytest.mark.parametrize("judged", [False, True])
@pytest.mark.parametrize("seed", range(4))
async def test_batches_are_those_of_the_definition_whatever_comes_first(
    store: Store, server: Valkey, seed: int, judged: bool
) -> None:
    rng = random.Random(seed)
    chosen = params(
        max_staleness=0,
        batch_groups=rng.choice((1, 2, 3)),
        surplus_groups=rng.choice((0, 1, 3, 5)),
        drop_zero_variance=not judged,
        judged=judged,
    )
    await store.open(chosen)
    system = System(store, chosen, rng, lambda ordinal, step: hash((seed, ordinal, step)) % 5 > 1)
    expected = definition(chosen.batch_groups, system.passes)
    system.another = lambda: another(store, server)
    await system.new_trainer()
    while len(system.trained) < STEPS:
        await system.act()
    assert [system.trained[step] for step in range(1, STEPS + 1)] == expected[:STEPS]


def another(store: Store, server: Valkey) -> Store:
    """An empty one of the same kind."""
    return MemoryStore() if isinstance(store, MemoryStore) else RedisStore(server.url, run_name=f"s{next(_stores)}")


def definition(size: int, passes: Callable[[int, int], bool]) -> list[list[int]]:
    batches, ordinal = [], 0
    for step in range(1, STEPS + 1):
        batch: list[int] = []
        while len(batch) < size:
            if passes(ordinal, step):
                batch.append(ordinal)
            ordinal += 1
        batches.append(batch)
    return batches


class System:
    """Rollout, reward and trainer, each doing something whenever chance has it; the trainer may be killed, and the
    store may lose everything.
    """

    another: Callable[[], Store]

    def __init__(self, store: Store, params: RunParams, rng: random.Random, passes: Callable[[int, int], bool]) -> None:
        self.driver = Driver(store)
        self.rng = rng
        self.params = params
        self.passes = passes
        self.trained: dict[int, list[int]] = {}
        self._ordinals: dict[int, int] = {}
        self._held: list[tuple[LeasedGroup, Version]] = []
        self._made_by: dict[int, int] = {}
        self._scoring: list[LeasedGroup] = []
        self._batch: Lease | None = None
        self._step = self._published = self._saved = 0
        self._mark: WatermarkRecord | None = None

    async def act(self) -> None:
        often = (self.lease, self.complete, self.score, self.finish_score, self.train, self.publish)
        seldom = (self.save, self.save, self.new_trainer, self.lose_store)
        await self.rng.choice(seldom if self.rng.random() < 0.08 else often)()

    async def lease(self) -> None:
        version = self.driver.version
        lease = await self.driver.generate_lease(self.rng.randint(1, 9))
        self._held += [(group, version) for group in lease.groups]
        self._ordinals |= {group.order: group.ordinal for group in lease.groups}

    async def complete(self) -> None:
        self.rng.shuffle(self._held)
        for group, version in [self._held.pop() for _ in range(min(len(self._held), self.rng.randint(1, 4)))]:
            self._made_by[group.order] = version.step
            await self.driver.store.complete_generate(self.driver.generated(Lease([group]), version))

    async def score(self) -> None:
        lease = await self.driver.store.lease_score("reward", self.rng.randint(1, 9), payload=False)
        self._scoring += lease.groups

    async def finish_score(self) -> None:
        self.rng.shuffle(self._scoring)
        for group in [self._scoring.pop() for _ in range(min(len(self._scoring), self.rng.randint(1, 4)))]:
            # A sample's tokens, and so its reward, are made by the weights of the step before the one it is for.
            passes = self.passes(self._ordinals[group.order], self._made_by[group.order] + 1)
            verdict = (pb.GROUP_VERDICT_KEEP if passes else pb.GROUP_VERDICT_DROP) if group.judge else 0
            varied = self.params.judged or passes
            rows = [
                Scored(ref, lease_id, float(varied and ref.index % 2), b"", verdict)
                for ref, lease_id in refs(Lease([group]))
            ]
            await self.driver.store.complete_score(rows)

    async def train(self) -> None:
        if self._batch is None:
            lease = await self.driver.store.lease_train(self.driver.epoch, self._step + 1, payload=False)
            self._batch = lease if lease.groups else None
            return
        self._step += 1
        await self.driver.store.commit_step(self.driver.epoch, self._step, self._batch.batch_lease_id, trained=True)
        batch = ordinals(self._batch)
        assert self.trained.setdefault(self._step, batch) == batch, "a step that is trained again has the same batch"
        self._batch = None

    async def publish(self) -> None:
        if self._published < self._step:
            self._published = self._step
            await self.driver.publish(self._step)

    async def save(self) -> None:
        self._saved = self._step
        self._mark = await self.driver.store.watermark(self.driver.epoch, self._saved)
        if self.rng.random() < 0.5:
            await self.driver.store.confirm_checkpoint(self.driver.epoch, self._saved)

    async def new_trainer(self) -> None:
        self._batch = None
        self._step = self._published = self._saved
        await self.driver.start(self._saved)

    async def lose_store(self) -> None:
        """A trainer that is ahead of an empty store continues from its checkpoint."""
        if self._mark is None:
            return
        epoch, before = self.driver.epoch, self.driver.store
        self.driver = Driver(self.another())
        await self.driver.store.open(self.params)
        self._held, self._scoring, self._batch = [], [], None
        self._step = self._published = self._saved
        self.driver.epoch, _ = await self.driver.store.acquire_epoch(epoch)
        await self.driver.store.recover(self.driver.epoch, self._saved, self._mark)
        await self.driver.publish(self._saved)
        await before.close()
