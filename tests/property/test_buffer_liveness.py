"""I12: roles crash and stay away at random, all at once too. Whenever all are there and the store has room, something
moves; at the end of the data the answers name what is waited for."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from polyhead.v1 import buffer_pb2 as pb
from services.buffer.ids import SampleRef
from services.buffer.memory_store import MemoryStore
from services.buffer.records import Generated, Released, RunParams, Scored
from services.buffer.redis_store import RedisStore
from services.buffer.store import Store
from tests.kit import valkey
from tests.kit.buffer_driver import Driver, params, refs

STEPS, TICKS = 12, 6000
# Ticks with all roles there in which nothing may stand still.
STALL = 60
LEASE_MS = 1000
LEASE_TICKS = 25
Restart = Callable[[], Awaitable[Store]]


class Clock:
    """Of the reference store. The leases of the other one end by its own clock, which is moved for them."""

    ms = 0


@pytest.fixture(params=["memory", "redis"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Store, Clock, Restart]]:
    """A store, its clock, and what comes back after its server and its process were killed."""
    clock = Clock()
    if request.param == "memory":
        store: Store = MemoryStore(lambda: clock.ms)

        async def same() -> Store:
            return store

        yield store, clock, same
        return
    with valkey.running(appendfsync="always", directory=tmp_path) as server:
        opened = [RedisStore(server.url, run_name="live")]

        async def restarted() -> Store:
            await opened[-1].close()
            server.kill()
            server.start()
            opened.append(RedisStore(server.url, run_name="live"))
            return opened[-1]

        yield opened[0], clock, restarted
        await opened[-1].close()


class World:
    """Rollout, reward and trainer, each there or away. What a crashed one held is given back when its leases end."""

    def __init__(self, settings: RunParams, clock: Clock, restart: Restart, rng: random.Random) -> None:
        self.settings = settings
        self.rng = rng
        self.clock = clock
        self.restart = restart
        self.away: dict[str, int] = {}
        self.running: list[tuple[SampleRef, int]] = []
        self.step = self.published = self.checkpoint = 0
        self.fatal = 0.0
        self.rewards: tuple[float, ...] = (0.0, 1.0)
        self.room = True
        self.submitted = 0
        self.driver: Driver

    async def begin(self, store: Store) -> None:
        await store.open(self.settings)
        self.driver = Driver(store)
        await self.driver.start()

    async def run(self, *, done: Callable[[], bool]) -> None:
        before: object = None
        still = 0
        for tick in range(TICKS):
            self.disturb(tick)
            await self.act(tick)
            now = await self.look()
            still = 0 if now != before or self.away or not self.room else still + 1
            before = now
            if done():
                return
            if still > STALL:
                ledger = await self.driver.store.ledger(admit=self.room)
                reasons = {stage: each.code for stage, each in ledger.waiting.items()}
                assert reasons, "stands still and names nothing"
                raise AssertionError(f"stands still at step {self.step}: {reasons}")
        raise AssertionError(f"not done after {TICKS} ticks, step {self.step}")

    def disturb(self, tick: int) -> None:
        self.clock.ms += 50
        self.away = {role: until for role, until in self.away.items() if until > tick}
        roles = ("rollout", "reward", "trainer", "store")
        if self.rng.random() < 0.03:
            crashed = roles if self.rng.random() < 0.2 else [self.rng.choice(roles)]
            for role in crashed:
                self.away[role] = tick + self.rng.randint(1, 40)
        if "rollout" in self.away:
            self.running.clear()
        if self.rng.random() < 0.02:
            self.room = not self.room

    async def act(self, tick: int) -> None:
        if "store" in self.away:
            self.driver.store = await self.restart()
            await self.driver.store.open(self.settings)
            del self.away["store"]
        if tick % LEASE_TICKS == 0:
            await self.end_leases()
        for role in ("rollout", "reward", "trainer"):
            if role not in self.away:
                await getattr(self, role)()
            elif role == "trainer" and self.away[role] > 0:
                await self.take_over()

    async def end_leases(self) -> None:
        """Of those who do not extend them: the ones that crashed."""
        self.clock.ms += LEASE_MS
        self.running.clear()
        if isinstance(store := self.driver.store, RedisStore):
            client, prefix = store._scripts._redis, store._scripts._prefix
            for key in (f"{prefix}lease:1", f"{prefix}lease:2"):
                for at, member in enumerate(await client.zrange(key, 0, -1)):
                    await client.zadd(key, {member: at})

    async def rollout(self) -> None:
        if self.submitted:
            version = self.driver.version
            lease = await self.driver.store.lease_generate("rollout", self.rng.randint(1, 6), version, admit=self.room)
        else:
            lease = await self.driver.generate_lease(self.rng.randint(1, 6), admit=self.room)
        self.running += refs(lease)
        self.rng.shuffle(self.running)
        for _ in range(min(len(self.running), self.rng.randint(0, 4))):
            ref, lease_id = self.running.pop()
            if self.rng.random() < self.fatal:
                await self.driver.store.release(1, [Released(ref, lease_id, pb.RELEASE_REASON_FATAL, 0, "e", 0)])
                continue
            version = self.driver.version
            spans = ((version.epoch, version.step, version.step),)
            await self.driver.store.complete_generate([Generated(ref, lease_id, 5, 2, 1, spans, b"s")])

    async def reward(self) -> None:
        lease = await self.driver.store.lease_score("reward", self.rng.randint(1, 8), payload=False)
        if self.rng.random() < 0.05:
            return  # it crashed with what it had leased
        rows = [Scored(ref, lease_id, self.rng.choice(self.rewards), b"") for ref, lease_id in refs(lease)]
        await self.driver.store.complete_score(rows)

    async def trainer(self) -> None:
        if self.published < self.step:
            await self.driver.publish(self.step)
            self.published = self.step
        lease = await self.driver.store.lease_train(self.driver.epoch, self.step + 1, payload=False)
        if not lease.groups or self.rng.random() < 0.1:
            return
        epoch, step = self.driver.epoch, self.step + 1
        assert await self.driver.store.commit_step(epoch, step, lease.batch_lease_id, trained=True)
        self.step = step
        if self.rng.random() < 0.3:
            await self.driver.store.confirm_checkpoint(epoch, step)
            self.checkpoint = step

    async def take_over(self) -> None:
        """The next trainer comes up from the last checkpoint; it does so once for an absence."""
        self.away["trainer"] = -1
        await self.driver.start(self.checkpoint)
        self.step = self.published = self.checkpoint

    async def look(self) -> object:
        ledger = await self.driver.store.ledger(admit=self.room)
        assert ledger.accepted == sum(each.samples for each in ledger.counts)
        return sorted((each.state, each.drop_reason, each.samples) for each in ledger.counts), self.step


SETTINGS = {
    "plain": {},
    "dead siblings": {"min_group_size": 2},
    "all filtered": {"drop_zero_variance": True},
    "over-sampling": {"surplus_groups": 2, "drop_zero_variance": True},
    "synchronous": {"max_staleness": 0},
    "drop": {"on_stale": "drop"},
    "whole groups": {"scored_whole": True, "min_group_size": 2},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", list(SETTINGS))
async def test_something_moves_whenever_all_are_there(
    world: tuple[Store, Clock, Restart], case: str, seed: int
) -> None:
    store, clock, restart = world
    changes = {"max_staleness": 2, "batch_groups": 2, "group_size": 3, "lease_ttl_ms": LEASE_MS, **SETTINGS[case]}
    played = World(params(**changes), clock, restart, random.Random(seed))
    played.fatal = 0.1 if case == "dead siblings" else 0.0
    await played.begin(store)
    if case != "all filtered":
        await played.run(done=lambda: played.step >= STEPS)
        return
    played.rewards = (1.0,)
    dropped = 0

    def enough() -> bool:
        return dropped >= 60

    original = played.look

    async def counting() -> object:
        nonlocal dropped
        seen = await original()
        ledger = await played.driver.store.ledger(admit=True)
        dropped = sum(each.samples for each in ledger.counts if each.drop_reason) // 3
        return seen

    played.look = counting  # type: ignore[method-assign]
    await played.run(done=enough)
    assert played.step == 0


@pytest.mark.parametrize("seed", range(2))
async def test_at_the_end_of_the_data_the_run_says_so(world: tuple[Store, Clock, Restart], seed: int) -> None:
    """Seven groups submitted, two to a step: three steps, and a group that has no second."""
    store, clock, restart = world
    changes = {"max_staleness": 2, "batch_groups": 2, "group_size": 3, "lease_ttl_ms": LEASE_MS}
    played = World(params(**changes), clock, restart, random.Random(seed))
    await played.begin(store)
    played.submitted = 7
    await store.submit("all", [b"prompt"] * played.submitted)
    await played.run(done=lambda: played.step >= 3)
    played.away = {}
    while not (await played.driver.store.ledger(admit=True)).waiting.keys() >= {1, 2, 3}:
        await played.end_leases()
        await played.rollout()
        await played.reward()
        if played.published < played.step:
            await played.trainer()
    waiting = (await played.driver.store.ledger(admit=True)).waiting
    assert waiting[1].code == "prompts"
    assert waiting[3].code == "groups"
