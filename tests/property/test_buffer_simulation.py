"""A run simulated with random durations and failures. What must hold is kept outside the store, by this file alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest

from polyhead.v1 import buffer_pb2 as pb
from services.buffer.ids import SampleRef
from services.buffer.memory_store import MemoryStore
from services.buffer.records import Generated, Lease, Released, Scored
from services.buffer.redis_store import RedisStore
from services.buffer.store import Store
from services.common.versions import Version, steps_between
from tests.kit import valkey
from tests.kit.buffer_driver import Driver, outcomes, params, refs

STEPS, TICKS = 18, 4000
_runs = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[valkey.Valkey]:
    with valkey.running() as started:
        yield started


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
        return
    opened = RedisStore(request.getfixturevalue("server").url, run_name=f"sim-{next(_runs)}")
    yield opened
    await opened.close()


@dataclass
class Running:
    """A sample in generation: ticks to go, and the versions its tokens were made by."""

    ref: SampleRef
    lease_id: int
    ticks: int
    versions: set[Version]


@dataclass
class Simulation:
    """Rollouts, scorers and a trainer that take random times and fail at random."""

    driver: Driver
    rng: random.Random
    max_staleness: int
    batch_groups: int
    limit: int
    on_stale: str
    rewards: tuple[float, ...] = (0.0, 1.0)
    verdicts: tuple[int, ...] = (pb.GROUP_VERDICT_KEEP,)
    forks: dict[int, int] = field(default_factory=dict)
    running: list[Running] = field(default_factory=list)
    tokens: dict[SampleRef, set[Version]] = field(default_factory=dict)
    trained: dict[int, list[SampleRef]] = field(default_factory=dict)
    checkpoint: int = 0
    step: int = 0
    published: int = 0

    async def run(self) -> None:
        for _ in range(TICKS):
            await self.rollout()
            await self.score()
            if self.rng.random() < 0.5:
                await self.train()
            if self.rng.random() < 0.01:
                await self.restart_trainer()
            if self.step >= STEPS:
                return
        raise AssertionError(f"stuck at step {self.step}: {(await self.driver.store.ledger(admit=True)).waiting}")

    async def rollout(self) -> None:
        lease = await self.driver.generate_lease(self.rng.randint(1, 6))
        await self.check_admission()
        for ref, lease_id in refs(lease):
            ticks = 1 + int(self.rng.paretovariate(1.2))
            self.running.append(Running(ref, lease_id, min(ticks, 40), {self.driver.version}))
        for each in list(self.running):
            each.ticks -= 1
            each.versions.add(self.driver.version)
            if self.rng.random() < 0.02:
                self.running.remove(each)
                reason = self.rng.choice([pb.RELEASE_REASON_DRAIN, pb.RELEASE_REASON_SAMPLE_ERROR])
                await self.driver.store.release(1, [Released(each.ref, each.lease_id, reason, 0, "e", 1)])
            elif each.ticks <= 0:
                self.running.remove(each)
                await self.complete(each)

    async def complete(self, each: Running) -> None:
        spans = tuple((version.epoch, version.step, version.step) for version in sorted(each.versions))
        report = await self.driver.store.complete_generate([Generated(each.ref, each.lease_id, 9, 5, 1, spans, b"")])
        if outcomes(report) == ["OK"]:
            self.tokens[each.ref] = each.versions

    async def score(self) -> None:
        lease = await self.driver.store.lease_score("s", self.rng.randint(1, 8), payload=False)
        scores = [
            Scored(SampleRef(group.order, each.index), each.lease_id, self.rng.choice(self.rewards), b"", verdict)
            for group in lease.groups
            for verdict in [self.rng.choice(self.verdicts) if group.judge else 0]
            for each in group.samples
        ]
        await self.driver.store.complete_score(scores)

    async def train(self) -> None:
        lease = await self.driver.store.lease_train(self.driver.epoch, self.step + 1, payload=False)
        if not lease.groups:
            if self.published < self.step:  # a push that was late
                await self.driver.publish(self.step)
                self.published = self.step
            return
        self.step += 1
        self.check_batch(lease)
        await self.driver.store.commit_step(self.driver.epoch, self.step, lease.batch_lease_id, trained=True)
        self.trained[self.step] = [ref for ref, _ in refs(lease)]
        if self.rng.random() < 0.7:
            await self.driver.publish(self.step)
            self.published = self.step
        if self.rng.random() < 0.15:
            self.checkpoint = self.step
            await self.driver.store.confirm_checkpoint(self.driver.epoch, self.step)

    async def restart_trainer(self) -> None:
        """From the last checkpoint: what later steps trained no longer counts."""
        self.driver.epoch, _ = await self.driver.store.acquire_epoch()
        await self.driver.store.recover(self.driver.epoch, self.checkpoint, None)
        self.forks[self.driver.epoch] = self.checkpoint
        self.step = self.published = self.checkpoint
        self.trained = {step: batch for step, batch in self.trained.items() if step <= self.step}
        await self.driver.publish(self.step)

    async def check_admission(self) -> None:
        """Right after an epoch began, groups admitted under the old history may still be over the limit."""
        ledger = await self.driver.store.ledger(admit=True)
        assert ledger.accepted == sum(each.samples for each in ledger.counts)
        if not self.forks:
            unpublished = (self.step - self.published) * self.batch_groups
            assert ledger.live_groups - unpublished >= 0
            assert ledger.live_groups <= self.limit

    def check_batch(self, lease: Lease) -> None:
        assert len(lease.groups) == self.batch_groups
        now = Version(self.driver.epoch, self.step - 1)
        earlier = {ref for batch in self.trained.values() for ref in batch}
        for group in lease.groups:
            members = {SampleRef(group.order, sample.index) for sample in group.samples}
            assert not members & earlier
            made_by = set().union(*(self.tokens[ref] for ref in members))
            staleness = max(steps_between(version, now, self.forks) for version in made_by)
            assert group.staleness == staleness
            if self.on_stale != "mask":
                assert staleness <= self.max_staleness


@pytest.mark.parametrize("on_stale", ["wait", "drop", "mask"])
@pytest.mark.parametrize(("max_staleness", "seed"), [(0, 1), (1, 2), (3, 3)])
async def test_bounds_hold_and_the_run_ends(store: Store, on_stale: str, max_staleness: int, seed: int) -> None:
    settings = params(on_stale=on_stale, max_staleness=max_staleness, batch_groups=3, group_size=3, min_group_size=2)
    await store.open(settings)
    driver = Driver(store)
    await driver.start()
    limit = (max_staleness + 1) * 3
    await Simulation(driver, random.Random(seed), max_staleness, 3, limit, on_stale).run()


async def test_the_bound_alone_holds_over_many_seeds() -> None:
    for seed in range(20):
        memory = MemoryStore()
        await memory.open(params(max_staleness=2, batch_groups=2, drop_zero_variance=True))
        driver = Driver(memory)
        await driver.start()
        await Simulation(driver, random.Random(seed), 2, 2, 6, "wait").run()


REJECTED = (pb.GROUP_VERDICT_KEEP_IF_INSUFFICIENT, pb.GROUP_VERDICT_DROP)


@pytest.mark.parametrize(
    ("rewards", "verdicts", "settings"),
    [
        ((0.0, 1.0), (), {"drop_zero_variance": True}),
        ((0.0, 1.0), (pb.GROUP_VERDICT_KEEP, *REJECTED), {"judged": True}),
        ((1.0,), REJECTED, {"judged": True, "refill_groups": 6}),
        ((1.0,), (), {"drop_zero_variance": True, "zero_variance_fallback": True, "refill_groups": 6}),
    ],
    ids=["nonzero_std", "filter", "all_rejected", "all_without_variance"],
)
@pytest.mark.parametrize("max_staleness", [0, 2])
async def test_over_sampling_with_a_filter_moves(
    store: Store, max_staleness: int, rewards: tuple[float, ...], verdicts: tuple[int, ...], settings: dict[str, object]
) -> None:
    await store.open(params(max_staleness=max_staleness, batch_groups=2, surplus_groups=2, **settings))
    driver = Driver(store)
    await driver.start()
    limit = (max_staleness + 1) * 2 + 2
    await Simulation(driver, random.Random(5), max_staleness, 2, limit, "wait", rewards, verdicts).run()
