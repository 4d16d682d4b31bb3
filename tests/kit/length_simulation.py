"""A run over the reference store with long-tailed completion lengths, in simulated time: what each `on_stale` costs.

One token takes one tick in each of SLOTS slots, a training step STEP_TICKS: generation could feed a step about every
35 ticks, so that the trainer is the slower side as long as nothing waits.
``python -m tests.kit.length_simulation`` prints the table of docs/buffer_policies.md.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import random
from dataclasses import dataclass, field

from services.buffer import partials, policy
from services.buffer.ids import SampleRef
from services.buffer.memory_store import MemoryStore
from services.buffer.records import Extension, Generated, Scored
from services.common.versions import Version
from tests.kit.buffer_driver import Driver, params, refs

GROUP, BATCH, SLOTS, STEP_TICKS = 4, 8, 96, 50
LONGEST = 500
TABLE_STEPS = 60


def length_of(seed: int, ordinal: int, index: int) -> int:
    """Tokens: log-normal by prompt and by sample, median 80, cut at LONGEST: ten steps."""
    prompt = random.Random(f"{seed} {ordinal}")
    sample = random.Random(f"{seed} {ordinal} {index}")
    return min(LONGEST, 1 + int(80 * math.exp(prompt.gauss(0, 0.6) + sample.gauss(0, 0.5))))


@dataclass(order=True)
class Running:
    ends: int
    ref: SampleRef
    lease_id: int = field(compare=False)
    began: int = field(compare=False)
    length: int = field(compare=False)
    version: Version = field(compare=False)


@dataclass
class Outcome:
    ticks: int
    trained: dict[int, int]
    """Ordinal of each trained group to the step that trained it."""
    births: dict[int, int]
    """Ordinal to the step published when the group was first admitted."""
    trained_tokens: int
    masked_tokens: int
    lost_samples: int
    lost_tokens: int
    length_bias: float
    """Of STALE, as the ledger says; 0 without any."""
    own_length_bias: float
    """The same from this simulation's own notes."""


@dataclass
class LengthSimulation:
    on_stale: str
    max_staleness: int
    seed: int
    steps: int
    driver: Driver = field(default_factory=lambda: Driver(MemoryStore()))
    now: int = 0
    step: int = 0
    busy_until: int = 0
    batch: tuple[int, list[int]] | None = None
    running: list[Running] = field(default_factory=list)
    ordinals: dict[int, int] = field(default_factory=dict)
    births: dict[int, int] = field(default_factory=dict)
    trained: dict[int, int] = field(default_factory=dict)
    made: dict[SampleRef, tuple[int, int]] = field(default_factory=dict)
    """Length, and when its generation began."""
    pushes: list[int] = field(default_factory=lambda: [0])
    """When each version was published."""
    saved: dict[SampleRef, int] = field(default_factory=dict)
    trained_lengths: list[int] = field(default_factory=list)
    lost_lengths: list[int] = field(default_factory=list)
    masked: int = 0

    async def run(self) -> Outcome:
        settings = {"group_size": GROUP, "batch_groups": BATCH, "max_staleness": self.max_staleness}
        await self.driver.store.open(params(on_stale=self.on_stale, **settings))
        await self.driver.start()
        while self.step < self.steps:
            await self.fill()
            await self.train()
            self.now = min([each.ends for each in self.running[:1]] + ([self.busy_until] if self.batch else []))
            while self.running and self.running[0].ends <= self.now:
                await self.complete(heapq.heappop(self.running))
            if self.batch and self.busy_until <= self.now:
                await self.commit()
        return await self.outcome()

    async def fill(self) -> None:
        while len(self.running) < SLOTS:
            lease = await self.driver.generate_lease(SLOTS - len(self.running))
            if not lease.groups:
                return
            for group in lease.groups:
                self.ordinals[group.order] = group.ordinal
                self.births.setdefault(group.ordinal, self.driver.version.step)
            for ref, lease_id in refs(lease):
                length = length_of(self.seed, self.ordinals[ref.order], ref.index)
                row = Running(self.now + length, ref, lease_id, self.now, length, self.driver.version)
                heapq.heappush(self.running, row)

    async def complete(self, each: Running) -> None:
        store, now = self.driver.store, self.driver.version
        versions = policy.merge_versions([each.version, now])
        self.made[each.ref] = (each.length, each.began)
        await store.complete_generate([Generated(each.ref, each.lease_id, each.length, each.length, 1, versions, b"")])
        lease = await store.lease_score("s", GROUP, payload=False)
        await store.complete_score([Scored(ref, lease_id, float(ref.index), b"") for ref, lease_id in refs(lease)])

    async def train(self) -> None:
        """Begins a step, if there is a batch."""
        if self.batch:
            return
        await self.save()
        lease = await self.driver.store.lease_train(self.driver.epoch, self.step + 1, payload=False)
        await self.forget_dropped()
        if lease.groups:
            self.batch = (lease.batch_lease_id, [group.order for group in lease.groups])
            self.busy_until = self.now + STEP_TICKS

    async def save(self) -> None:
        """Before anything is dropped, so that the ledger knows of its tokens."""
        deltas = []
        for each in self.running:
            done, saved = self.now - each.began, self.saved.get(each.ref, 0)
            if done > saved:
                deltas.append(Extension(each.ref, each.lease_id, saved, done - saved, partials.frame(b"t")))
                self.saved[each.ref] = done
        await self.driver.store.extend(deltas)

    async def forget_dropped(self) -> None:
        """Notes the lengths of what has been dropped, and frees its slots."""
        states = self.driver.store.state.groups  # type: ignore[attr-defined]
        gone = [order for order in self.ordinals if order in states and states[order].closed]
        gone = [order for order in gone if self.ordinals[order] not in self.trained]
        for order in gone:
            for index in range(GROUP):
                ref = SampleRef(order, index)
                known = self.made[ref][0] if ref in self.made else self.saved.get(ref, 0)
                self.lost_lengths.append(known)
            del self.ordinals[order]
        self.running = [each for each in self.running if each.ref.order in self.ordinals]
        heapq.heapify(self.running)

    async def commit(self) -> None:
        assert self.batch is not None
        lease_id, orders = self.batch
        self.step += 1
        await self.driver.store.commit_step(self.driver.epoch, self.step, lease_id, trained=True)
        for order in orders:
            self.trained[self.ordinals[order]] = self.step
            for index in range(GROUP):
                length, began = self.made[SampleRef(order, index)]
                self.trained_lengths.append(length)
                oldest_allowed = self.pushes[max(0, self.step - 1 - self.max_staleness)]
                self.masked += min(length, max(0, oldest_allowed - began))
        self.batch = None
        self.pushes.append(self.now)
        await self.save()
        await self.driver.publish(self.step)
        await self.forget_dropped()

    async def outcome(self) -> Outcome:
        ledger = await self.driver.store.ledger(admit=True)
        lost, trained = [length for length in self.lost_lengths if length], self.trained_lengths
        own = sum(lost) / len(lost) / (sum(trained) / len(trained)) if lost else 0.0
        bias = policy.length_bias(ledger.counts).get("STALE", 0.0)
        lost_samples = len(self.lost_lengths)
        tokens = sum(trained)
        return Outcome(self.now, self.trained, self.births, tokens, self.masked, lost_samples, sum(lost), bias, own)


def main() -> None:
    """Means over three seeds. Time is relative to a bound so wide that nothing waits."""
    seeds = (1, 2, 3)

    async def ticks(on_stale: str, bound: int) -> list[Outcome]:
        return [await LengthSimulation(on_stale, bound, seed, TABLE_STEPS).run() for seed in seeds]

    base = sum(each.ticks for each in asyncio.run(ticks("mask", 32))) / len(seeds)
    print("| on_stale | bound | time | samples lost | tokens lost | tokens masked | length_bias |")
    print("|---|---|---|---|---|---|---|")
    for on_stale in ("wait", "mask", "drop"):
        for bound in (1, 2, 4, 8):
            rows = asyncio.run(ticks(on_stale, bound))
            time = sum(each.ticks for each in rows) / len(rows) / base - 1
            trained = len(seeds) * TABLE_STEPS * BATCH * GROUP
            lost = sum(each.lost_samples for each in rows)
            tokens, gone = sum(each.trained_tokens for each in rows), sum(each.lost_tokens for each in rows)
            masked = sum(each.masked_tokens for each in rows)
            bias = sum(each.length_bias for each in rows) / len(rows)
            print(
                f"| {on_stale} | {bound} | {time:+.0%} | {lost / (lost + trained):.1%} "
                f"| {gone / (gone + tokens):.1%} | {masked / tokens:.1%} | {bias:.2f} |"
            )


if __name__ == "__main__":
    main()
