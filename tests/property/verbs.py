"""The peers of a run as one hand: makes every call of the store, mostly sensible, sometimes late, twice or wrong."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.buffer import partials
from services.buffer.ids import SampleRef
from services.buffer.records import (
    Extension,
    Generated,
    ImportedGroup,
    ImportedSample,
    IssuedPrompt,
    Lease,
    Page,
    Released,
    RunParams,
    Scored,
    WatermarkRecord,
)
from services.buffer.store import UNBOUNDED, Store
from services.common.versions import Version
from tests.kit.buffer_driver import refs
from tests.property.bookkeeping import Bookkeeping
from tests.property.pair import Call, Pair, failed

VERBS = (
    ["round"] * 6
    + ["generate", "extend", "complete_generate", "score", "complete_score", "release", "work", "train"] * 2
    + ["generate", "extend", "score"] * 2
    + ["submit", "prefer", "lease_train", "publish", "restart_trainer", "checkpoint", "expire", "fetch", "list_samples"]
    + ["store_falls_behind", "requeue", "requeue", "import_groups", "replicas", "repeat", "repeat", "old_epoch"]
    + ["kill_store", "restart_buffer"]
)
REWARDS = (0.0, 1.0, 0.1)
VERDICTS = (0, 0, 0, *pb.GroupVerdict.values())
DROPS = (sample_pb2.DROP_REASON_FILTERED, sample_pb2.DROP_REASON_STALE)
REASONS = (
    pb.RELEASE_REASON_DRAIN,
    pb.RELEASE_REASON_SAMPLE_ERROR,
    pb.RELEASE_REASON_SAMPLE_ERROR,
    pb.RELEASE_REASON_FATAL,
    pb.RELEASE_REASON_DROP,
)
_REPEATED_LATER = 12
Held = list[tuple[SampleRef, int]]
Done = Callable[[], Awaitable[Any]]


class Peers:
    """`fault` strikes the next call, once."""

    def __init__(self, pair: Pair, params: RunParams) -> None:
        self.pair = pair
        self.params = params
        self.books = Bookkeeping(params)
        self.rng = random.Random(0)
        self.fault = ""
        self.leases: dict[int, Held] = {1: [], 2: []}
        self.recent: deque[Done] = deque(maxlen=_REPEATED_LATER)
        self.mark: WatermarkRecord | None = None

    async def act(self, verb: str, rng: random.Random, fault: str) -> None:
        self.rng, self.fault = rng, fault
        await getattr(self, verb)()

    async def ask(self, call: Call) -> Any:
        fault, self.fault = self.fault, ""
        return await self.pair.ask(call, self.rng, fault)

    async def do(self, done: Done, again: float = 0.1) -> Any:
        """Does it, and perhaps again at once or later."""
        self.recent.append(done)
        answer = await done()
        if self.rng.random() < again:
            await done()
        return answer

    async def repeat(self) -> None:
        if self.recent:
            await self.rng.choice(self.recent)()

    async def kill_store(self) -> None:
        self.pair.restart_store()

    async def restart_buffer(self) -> None:
        await self.pair.restart_buffer(self.rng.randrange(len(self.pair.redis)))

    def some(self, stage: int, most: int = 6) -> Held:
        """Some leases of the stage: those that hold, or recent ones, ended ones among them."""
        known = self.leases[stage][-12:]
        held = self.held(stage)
        if held and self.rng.random() < 0.7:
            known = held
        return self.rng.sample(known, self.rng.randint(1, min(most, len(known)))) if known else []

    def held(self, stage: int) -> Held:
        known = dict.fromkeys(self.leases[stage])
        return [(ref, lease) for ref, lease in known if lease in self.books.sample(ref).held.values()]

    # Rollout

    async def generate(self) -> None:
        rng = self.rng
        await self.lease(
            rng.randint(1, 9),
            admit=rng.random() < 0.75,
            behind=rng.choice((0, 0, 0, 1)),
            more=rng.random() < 0.33,
            **self.asked(),
        )

    def asked(self) -> dict[str, Any]:
        """A request that is often the one before, and bounds that prompts and payloads of a few bytes reach."""
        return {
            "request_id": self.rng.choice(("", "a", "b")),
            "max_bytes": self.rng.choice((UNBOUNDED, UNBOUNDED, 1, 6, 12)),
        }

    async def lease(self, count: int, *, admit: bool = True, behind: int = 0, **asked: Any) -> None:
        version = Version(self.books.epoch, max(0, self.books.published.step - behind))

        async def done() -> Lease:
            lease = await self.ask(lambda store: store.lease_generate("r", count, version, admit=admit, **asked))
            self.books.on_lease(1, lease)
            self.leases[1] += refs(lease)
            return lease

        lease = await self.do(done)
        if lease.wanted:
            prompts = [IssuedPrompt(ordinal, b"p%d" % ordinal) for ordinal in lease.wanted]
            await self.do(lambda: self.ask(lambda store: store.issue(lease.cursor, prompts)))

    async def extend(self) -> None:
        if not self.held(1):
            await self.lease(self.rng.randint(1, 4))
            await self.lease(self.rng.randint(1, 4))
        for ref, lease_id in self.some(1) + self.some(1):
            saved = self.books.sample(ref).saved
            at = max(0, saved.count(b"t") + self.rng.choice((0, 0, 0, -1, 1)))
            tokens = self.rng.randint(0, 3)
            each = Extension(ref, lease_id, at, tokens, partials.frame(b"t" * tokens) if tokens else b"")
            await self.do(self._extended(each), again=0.3)

    def _extended(self, each: Extension) -> Done:
        async def done() -> None:
            self.books.on_extended([each], await self.ask(lambda store: store.extend([each])))

        return done

    async def complete_generate(self) -> None:
        low = max(0, self.books.published.step - self.rng.choice((0, 0, 0, 1, 2)))
        versions = ((self.books.epoch, low, low + self.rng.randint(0, 2)),)
        tokens = self.rng.randint(0, 5)
        blobs = self.rng.choice(((), ("a",), ("a", "b")))
        await self.generated(self.some(1), versions, tokens, blobs)

    async def generated(
        self, held: Held, versions: tuple[tuple[int, int, int], ...], tokens: int, blobs: tuple[str, ...] = ()
    ) -> None:
        rows = [Generated(ref, lease, 3, tokens, 1, versions, b"s%d" % lease, blobs) for ref, lease in held]

        async def done() -> None:
            self.books.on_generated(rows, await self.ask(lambda store: store.complete_generate(rows)))

        await self.do(done)

    async def release(self) -> None:
        stage, reason = self.rng.choice((1, 2)), self.rng.choice(REASONS)
        drop = self.rng.choice(DROPS) if reason == pb.RELEASE_REASON_DROP else 0
        rows = [Released(ref, lease, reason, drop, "error", 2) for ref, lease in self.some(stage, 2)]

        async def done() -> None:
            self.books.on_released(rows, await self.ask(lambda store: store.release(stage, rows)))

        if drop == sample_pb2.DROP_REASON_STALE:
            self.books.in_time = False
        await self.do(done)

    async def prefer(self) -> None:
        waiting = await self.ask(lambda store: store.partials(3))
        chosen = self.rng.choices([99, *(group.order for group in waiting)], k=self.rng.randint(0, 4))
        await self.do(lambda: self.ask(lambda store: store.prefer(chosen)))

    async def expire(self) -> None:
        self.pair.expire()
        self.books.on_expiry()

    # Reward

    async def score(self) -> None:
        await self.score_lease(self.rng.randint(1, 9), payload=self.rng.random() < 0.5, **self.asked())

    async def score_lease(self, count: int, *, payload: bool = False, **asked: Any) -> None:
        async def done() -> None:
            lease = await self.ask(lambda store: store.lease_score("s", count, payload=payload, **asked))
            self.books.on_lease(2, lease, payload=payload)
            self.leases[2] += refs(lease)

        await self.do(done)

    async def complete_score(self) -> None:
        choice = self.rng.choice
        await self.scored(
            [Scored(ref, lease, choice(REWARDS), b"v%d" % lease, choice(VERDICTS), "r") for ref, lease in self.some(2)]
        )

    async def scored(self, rows: list[Scored]) -> None:
        async def done() -> None:
            self.books.on_scored(rows, await self.ask(lambda store: store.complete_score(rows)))

        await self.do(done)

    # Trainer

    async def work(self) -> None:
        """Completes all there is, so that histories get as far as training."""
        at = ((self.books.epoch, self.books.published.step, self.books.published.step),)
        await self.lease(9)
        await self.lease(9)  # what the first one made room for
        await self.generated(self.leases[1][-24:], at, self.rng.randint(1, 3))
        for verdict in (0, pb.GROUP_VERDICT_KEEP) if self.params.judged else (0,):
            await self.score_lease(24)
            held = self.leases[2][-24:]
            await self.scored([Scored(ref, lease, float(ref.index), b"v", verdict) for ref, lease in held])

    async def train(self) -> None:
        rng = self.rng
        step = self.books.step + rng.choice((1, 1, 1, 1, 1, 0, 2))
        await self.step(self.books.epoch, step, rng.random() < 0.75, rng.choice((UNBOUNDED, 4, 8)))

    async def old_epoch(self) -> None:
        """A trainer that was frozen goes on."""
        if (old := self.books.epoch - 1) > 0:
            await self.step(old, self.books.step + 1, True, UNBOUNDED)
            for call in (
                lambda store: store.publish_version(Version(old, self.books.step)),
                lambda store: store.confirm_checkpoint(old, self.books.step),
                lambda store: store.recover(old, 0, None),
            ):
                answer = await self.ask(call)
                assert answer[0] == "FencedError", answer

    async def step(self, epoch: int, step: int, trained: bool, bound: int) -> None:
        fenced = epoch < self.books.epoch
        lease = await self.ask(lambda store: store.lease_train(epoch, step, payload=True, max_bytes=bound))
        if isinstance(lease, Lease):
            self.books.on_batch(epoch, step, lease, payload=bound == UNBOUNDED)
        lease_id = lease.batch_lease_id if isinstance(lease, Lease) else 1

        async def done() -> None:
            answer = await self.ask(lambda store: store.commit_step(epoch, step, lease_id, trained=trained))
            if answer in (True, False):
                self.books.on_commit(step, lease_id, trained=trained)
            elif fenced:
                assert lease[0] == answer[0] == "FencedError", (lease, answer)

        await self.do(done)

    async def lease_train(self) -> None:
        epoch, step = self.books.epoch, self.books.step + 1
        lease = await self.ask(lambda store: store.lease_train(epoch, step, payload=False))
        self.books.on_batch(epoch, step, lease, payload=False)

    async def publish(self) -> None:
        await self.publish_step(max(0, self.books.step - self.rng.choice((0, 0, 0, 0, 1, -1))))

    async def publish_step(self, step: int) -> None:
        version = Version(self.books.epoch, step)

        async def done() -> None:
            if await self.ask(lambda store: store.publish_version(version)) is None:
                self.books.published = version

        await self.do(done)

    async def round(self) -> None:
        await self.work()
        await self.train()
        await self.publish()

    async def restart_trainer(self) -> None:
        await self.new_trainer(self.rng.randint(0, 4))
        if self.rng.random() < 0.5:
            await self.publish_step(self.books.step)

    async def new_trainer(self, back: int) -> None:
        """Comes up from a checkpoint `back` steps ago, or from the last step when that one is retired."""
        await self.acquire(0)
        step = self.books.step
        target = max(0, step - back)
        mark = self.mark if self.mark and self.mark.step == target else None
        if not await self.recover(target, mark):
            await self.recover(step, None)

    async def acquire(self, known: int) -> None:
        self.books.on_epoch(*await self.ask(lambda store: store.acquire_epoch(known)))

    async def recover(self, step: int, mark: WatermarkRecord | None) -> bool:
        epoch, adopts = self.books.epoch, step > self.books.step
        done: Done = lambda: self.ask(lambda store: store.recover(epoch, step, mark))  # noqa: E731
        answer = await done()
        if failed(answer):
            return False
        self.books.on_recover(step, answer, adopts=adopts)
        if self.rng.random() < 0.3:
            assert await done() == answer
        ledger = await self.ask(lambda store: store.ledger(admit=True))
        self.books.published = ledger.published or Version(epoch, step)
        return True

    async def store_falls_behind(self) -> None:
        """A checkpoint of a later step than the store knows, as after a store that lost its last seconds."""
        rng = self.rng
        if rng.random() < 0.5:
            return
        await self.acquire(self.books.epoch + rng.randint(-1, 2))
        cursor = (await self.ask(lambda store: store.ledger(admit=True))).cursor
        low = rng.randint(0, cursor + 2)
        closed = tuple(sorted(set(rng.choices(range(low + 1, low + 7), k=rng.randint(0, 4)))))
        mark = WatermarkRecord(self.books.step + rng.randint(1, 2), low, closed, "d0", 7)
        await self.recover(mark.step, mark)
        await self.publish_step(self.books.step)

    async def checkpoint(self) -> None:
        epoch, step = self.books.epoch, max(0, self.books.step - self.rng.randint(0, 3))
        mark = await self.ask(lambda store: store.watermark(epoch, step))
        if isinstance(mark, WatermarkRecord):
            self.mark = mark
        if self.rng.random() < 0.5:
            await self.do(lambda: self.ask(lambda store: store.confirm_checkpoint(epoch, step)))

    # Operators and clients

    async def submit(self) -> None:
        name, prompts = f"s{self.rng.randrange(20)}", [b"submitted"] * self.rng.randint(1, 2)
        await self.do(lambda: self.ask(lambda store: store.submit(name, prompts)))

    async def fetch(self) -> None:
        wanted, prompts = [ref for ref, _ in self.leases[1][-12:]], self.rng.random() < 0.5
        await self.ask(lambda store: store.fetch(wanted, prompts=prompts))
        await self.ask(lambda store: store.referenced_blobs(["a", "b", "c"]))

    async def list_samples(self) -> None:
        state, limit, start = self.rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 11)), self.rng.choice((1, 3, 100)), 0
        while True:
            page = await self.page(state, start, limit)
            if not page.following:
                return
            start = page.following

    async def page(self, state: int, start: int, limit: int) -> Page:
        return await self.ask(lambda store: _undated(store, state, start, limit))

    async def requeue(self) -> None:
        dead = [each.ref for each in (await self.page(11, 0, 100)).samples]
        known = [*dead[-6:], *(ref for ref, _ in self.leases[1][-4:]), SampleRef(0, 9), SampleRef(10**6, 0)]
        wanted = self.rng.choices(known, k=self.rng.randint(1, 4))

        async def done() -> None:
            before = {each.ref for each in (await self.page(11, 0, 1000)).samples}
            self.books.on_requeued(wanted, await self.ask(lambda store: store.requeue(wanted)), before)

        await self.do(done)

    async def import_groups(self) -> None:
        rng, books = self.rng, self.books
        epoch = max(1, books.epoch - rng.choice((0, 0, 0, 1, -1)))
        low = max(0, books.published.step - rng.choice((0, 0, 0, 1, 3)))
        versions = ((epoch, low, low + rng.randint(0, 1)),)
        rewards = [rng.choice((None, *REWARDS)) for _ in range(self.params.group_size)]
        samples = [ImportedSample(4, 2, 1, versions, b"i", reward, b"w", ("b", "c")) for reward in rewards]
        groups = [ImportedGroup(b"imported", samples)] * rng.choice((1, 1, 2))
        name = f"i{rng.randrange(20)}"

        async def done() -> None:
            answer = await self.ask(lambda store: store.import_groups(name, groups))
            if not failed(answer):
                books.on_imported(groups, answer[0])

        await self.do(done)

    async def replicas(self) -> None:
        name = self.rng.choice(("r", "s"))
        await self.do(lambda: self.ask(lambda store: store.register_replica(name, b"replica", 10**12)))
        await self.ask(lambda store: store.list_replicas())


async def _undated(store: Store, state: int, start: int, limit: int) -> Page:
    """A page without the times of death: the two stores have clocks of their own."""
    page = await store.list_samples(state, start, limit)
    samples = [
        replace(each, letter=replace(each.letter, died_ms=0)) if each.letter is not None else each
        for each in page.samples
    ]
    return replace(page, samples=samples)
