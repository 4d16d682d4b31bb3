"""Random histories: the Redis store on a real Valkey must answer exactly what the reference store answers, whatever is
killed between a call and its answer. The reference store is never killed, so nothing acknowledged may be missing.

``python -m tests.property.test_buffer_stores_agree --histories 5000 --commands 100`` runs many (make property).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.buffer import partials
from services.buffer.ids import SampleRef
from services.buffer.memory_store import MemoryStore
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
from services.buffer.redis_store import RedisStore
from services.buffer.store import UNBOUNDED, Store
from services.common.errors import PolyheadError, UnavailableError
from services.common.versions import Version
from tests.kit import valkey
from tests.kit.buffer_driver import PARAMS, refs

Call = Callable[[Store], Awaitable[Any]]
Draw = Callable[[st.SearchStrategy[Any]], Any]
WEIGHTED = (
    ["round"] * 10
    + ["generate", "extend", "complete_generate", "score", "complete_score", "release", "work", "train"] * 2
    + ["submit", "prefer", "lease_train", "publish", "restart_trainer", "store_falls_behind", "checkpoint"]
    + ["expire", "fetch", "list_samples", "requeue", "requeue", "import_groups"]
)
REWARDS = st.sampled_from([0.0, 1.0, 0.1])
# A request that is often the one before, and bounds that prompts, partials and payloads of a few bytes reach.
ASKS = st.fixed_dictionaries(
    {"request_id": st.sampled_from(["", "a", "b"]), "max_bytes": st.sampled_from([UNBOUNDED, UNBOUNDED, 1, 6, 12])}
)
VERDICTS = st.sampled_from([0, 0, 0, *pb.GroupVerdict.values()])
DROPS = st.sampled_from([sample_pb2.DROP_REASON_FILTERED, sample_pb2.DROP_REASON_STALE])
REASONS = st.sampled_from(
    [pb.RELEASE_REASON_DRAIN, pb.RELEASE_REASON_SAMPLE_ERROR, pb.RELEASE_REASON_FATAL, pb.RELEASE_REASON_DROP]
)
# What happens around the first call of a command. "again": its answer was lost, and the caller repeats it.
TROUBLES = st.sampled_from(
    [""] * 24
    + ["again"] * 4
    + ["store killed", "store killed, again", "other buffer", "other buffer, again", "new buffer"]
)
# A killed server loses no page of a file, wherever that is; a disk would only make it slow.
_MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
# Histories and commands in `make test`.
SHORT, PARTS = (200, 80), 4
# Histories between two lines of progress.
PROGRESS = 50
_runs = itertools.count()


class TwoStores(RuleBasedStateMachine):
    """Makes every call on both stores and compares the answers, errors included."""

    server: valkey.Valkey

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.now_ms = 0
        self.memory = MemoryStore(lambda: self.now_ms)
        self.name = f"r{next(_runs)}"
        self.params: RunParams | None = None
        # Two buffer processes.
        self.redis, self.other = self.buffer(), self.buffer()
        self.trouble = ""
        self.leases: dict[int, list[tuple[SampleRef, int]]] = {1: [], 2: []}
        self.saved: dict[SampleRef, int] = {}
        self.epoch = self.step = self.published = 0
        self.mark: WatermarkRecord | None = None

    def buffer(self) -> RedisStore:
        """A buffer process that starts: it opens the run first."""
        store = RedisStore(self.server.url, run_name=self.name)
        if self.params is not None:
            self.loop.run_until_complete(_outcome(lambda each: each.open(self.params), store))
        return store

    def teardown(self) -> None:
        for store in (self.redis, self.other):
            self.loop.run_until_complete(store.close())
        self.loop.close()

    def both(self, call: Call) -> Any:
        trouble, self.trouble = self.trouble, ""
        if trouble.endswith("again"):
            answers = self.answers(call)
        if trouble.startswith("store killed"):
            self.server.kill()
            self.server.start()
        if trouble.startswith("other buffer"):
            self.redis, self.other = self.other, self.redis
        if trouble == "new buffer":
            self.loop.run_until_complete(self.redis.close())
            self.redis = self.buffer()
        answers = self.answers(call)
        assert answers[0] == answers[1]
        return answers[0]

    def answers(self, call: Call) -> list[Any]:
        return [self.loop.run_until_complete(_outcome(call, store)) for store in (self.memory, self.redis)]

    def some(self, draw: Draw, stage: int) -> list[tuple[SampleRef, int]]:
        """Some leases of the stage, recent ones mostly, ended ones among them."""
        known = self.leases[stage][-12:]
        return draw(st.lists(st.sampled_from(known), min_size=1, max_size=6, unique=True)) if known else []

    @initialize(
        staleness=st.integers(0, 3),
        on_stale=st.sampled_from(["wait", "mask", "drop"]),
        zero_variance=st.booleans(),
        least=st.integers(1, 2),
        surplus=st.integers(0, 2),
        judged=st.booleans(),
        refill=st.sampled_from([0, 1, 2, 99]),
    )
    def open(
        self,
        staleness: int,
        on_stale: str,
        zero_variance: bool,
        least: int,
        surplus: int,
        judged: bool,
        refill: int,
    ) -> None:
        params = replace(
            PARAMS,
            max_staleness=staleness,
            on_stale=on_stale,
            drop_zero_variance=zero_variance,
            min_group_size=least,
            surplus_groups=surplus,
            judged=judged,
            zero_variance_fallback=judged,
            refill_groups=refill,
        )
        self.both(lambda store: store.open(params))
        self.params = params
        self.loop.run_until_complete(self.other.open(params))
        self.new_trainer(0)
        self.publish_step(0)

    @rule(verb=st.sampled_from(WEIGHTED), data=st.data())
    def act(self, verb: str, data: st.DataObject) -> None:
        """One rule for all verbs: separate ones are left out of whole histories, which then never get anywhere."""
        self.trouble = data.draw(TROUBLES)
        getattr(self, verb)(data.draw)
        self.trouble = ""

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        ledger = self.both(lambda store: store.ledger(admit=True))
        if not isinstance(ledger, tuple):
            assert ledger.accepted == sum(each.samples for each in ledger.counts)
        self.both(lambda store: store.referenced_blobs(["a", "b", "c"]))

    # Verbs

    def generate(self, draw: Draw) -> None:
        count, admit = draw(st.integers(1, 9)), draw(st.sampled_from([True, True, True, False]))
        behind, ask = draw(st.sampled_from([0, 0, 0, 1])), draw(ASKS)
        self.lease(count, admit=admit, behind=behind, more=draw(st.sampled_from([False, False, True])), **ask)

    def lease(self, count: int, *, admit: bool = True, behind: int = 0, **ask: Any) -> None:
        version = Version(self.epoch, max(0, self.published - behind))
        lease = self.both(lambda store: store.lease_generate("r", count, version, admit=admit, **ask))
        self.leases[1] += refs(lease)
        if lease.wanted:
            prompts = [IssuedPrompt(ordinal, b"p%d" % ordinal) for ordinal in lease.wanted]
            self.both(lambda store: store.issue(lease.cursor, prompts))

    def submit(self, draw: Draw) -> None:
        name = draw(st.sampled_from("ab"))
        self.both(lambda store: store.submit(name, [b"submitted"]))

    def score(self, draw: Draw) -> None:
        count, payload, ask = draw(st.integers(1, 9)), draw(st.booleans()), draw(ASKS)
        self.leases[2] += refs(self.both(lambda store: store.lease_score("s", count, payload=payload, **ask)))

    def extend(self, draw: Draw) -> None:
        for ref, lease_id in self.some(draw, 1):
            at = max(0, self.saved.get(ref, 0) + draw(st.sampled_from([0, 0, 0, -1, 1])))
            tokens = draw(st.integers(0, 3))
            each = Extension(ref, lease_id, at, tokens, partials.frame(b"t" * tokens) if tokens else b"")
            report = self.both(lambda store, each=each: store.extend([each]))
            self.saved[ref] = report.results[0].saved_tokens or self.saved.get(ref, 0)

    def complete_generate(self, draw: Draw) -> None:
        low = max(0, self.published - draw(st.sampled_from([0, 0, 0, 1, 2])))
        versions = ((self.epoch, low, low + draw(st.integers(0, 2))),)
        tokens = draw(st.integers(0, 5))
        blobs = draw(st.sampled_from([(), ("a",), ("a", "b")]))
        rows = [
            Generated(ref, lease, 3, tokens, 1, versions, b"s%d" % lease, blobs) for ref, lease in self.some(draw, 1)
        ]
        self.both(lambda store: store.complete_generate(rows))

    def complete_score(self, draw: Draw) -> None:
        rows = [Scored(ref, lease, draw(REWARDS), b"v", draw(VERDICTS), "r") for ref, lease in self.some(draw, 2)]
        self.both(lambda store: store.complete_score(rows))

    def prefer(self, draw: Draw) -> None:
        waiting = self.both(lambda store: store.partials(3))
        chosen = draw(st.lists(st.sampled_from([99, *(group.order for group in waiting)]), max_size=4))
        self.both(lambda store: store.prefer(chosen))

    def release(self, draw: Draw) -> None:
        stage, reason = draw(st.sampled_from([1, 2])), draw(REASONS)
        drop = draw(DROPS) if reason == pb.RELEASE_REASON_DROP else 0
        rows = [Released(ref, lease, reason, drop, "error", 2) for ref, lease in self.some(draw, stage)[:2]]
        self.both(lambda store: store.release(stage, rows))

    def work(self, draw: Draw) -> None:
        """Completes all there is, so that histories get as far as training."""
        for _ in range(2):
            self.lease(9)
            at = ((self.epoch, self.published, self.published),)
            rows = [Generated(ref, lease, 4, 1, 1, at, b"s") for ref, lease in self.leases[1]]
            self.both(lambda store, rows=rows: store.complete_generate(rows))
            self.leases[2] += refs(self.both(lambda store: store.lease_score("s", 9, payload=False)))
            for verdict in (0, pb.GROUP_VERDICT_KEEP):
                scores = [Scored(ref, lease, float(ref.index), b"v", verdict) for ref, lease in self.leases[2]]
                self.both(lambda store, scores=scores: store.complete_score(scores))
                self.leases[2] += refs(self.both(lambda store: store.lease_score("s", 9, payload=False)))

    def train(self, draw: Draw) -> None:
        step = self.step + draw(st.sampled_from([1, 1, 1, 1, 1, 0, 2]))
        epoch = self.epoch - draw(st.sampled_from([0, 0, 0, 0, 1]))
        trained = draw(st.sampled_from([True, True, True, False]))
        bound = draw(st.sampled_from([UNBOUNDED, 4, 8]))
        lease = self.both(lambda store: store.lease_train(epoch, step, payload=True, max_bytes=bound))
        lease_id = lease.batch_lease_id if isinstance(lease, Lease) else 1
        if self.both(lambda store: store.commit_step(epoch, step, lease_id, trained=trained)) is True:
            self.step = step

    def lease_train(self, draw: Draw) -> None:
        self.both(lambda store: store.lease_train(self.epoch, self.step + 1, payload=False))

    def publish(self, draw: Draw) -> None:
        self.publish_step(max(0, self.step - draw(st.sampled_from([0, 0, 0, 0, 1, -1]))))

    def publish_step(self, step: int) -> None:
        if self.both(lambda store: store.publish_version(Version(self.epoch, step))) is None:
            self.published = step

    def round(self, draw: Draw) -> None:
        self.work(draw)
        self.train(draw)
        self.publish(draw)

    def restart_trainer(self, draw: Draw) -> None:
        self.new_trainer(draw(st.integers(0, 4)))
        if draw(st.booleans()):
            self.publish_step(self.step)

    def new_trainer(self, back: int) -> None:
        """Comes up from a checkpoint `back` steps ago, or from the last step when that one is retired."""
        self.epoch, step = self.both(lambda store: store.acquire_epoch())
        target = max(0, step - back)
        mark = self.mark if self.mark and self.mark.step == target else None
        if isinstance(self.both(lambda store: store.recover(self.epoch, target, mark)), tuple):
            target = step
        self.both(lambda store: store.recover(self.epoch, target, None))
        self.look()

    def store_falls_behind(self, draw: Draw) -> None:
        """A checkpoint of a later step than the store knows, as after a store that lost its last seconds."""
        known = self.epoch + draw(st.integers(-1, 2))
        self.epoch, step = self.both(lambda store: store.acquire_epoch(known))
        cursor = self.both(lambda store: store.ledger(admit=True)).cursor
        low = draw(st.integers(0, cursor + 2))
        closed = tuple(sorted(draw(st.sets(st.integers(low + 1, low + 6), max_size=4))))
        mark = WatermarkRecord(step + draw(st.integers(1, 2)), low, closed, "d0", 7)
        self.both(lambda store: store.recover(self.epoch, mark.step, mark))
        self.look()
        self.publish_step(self.step)

    def look(self) -> None:
        ledger = self.both(lambda store: store.ledger(admit=True))
        self.step = ledger.step
        self.published = ledger.published.step if ledger.published else 0

    def checkpoint(self, draw: Draw) -> None:
        step = max(0, self.step - draw(st.integers(0, 3)))
        mark = self.both(lambda store: store.watermark(self.epoch, step))
        if isinstance(mark, WatermarkRecord):
            self.mark = mark
        if draw(st.booleans()):
            self.both(lambda store: store.confirm_checkpoint(self.epoch, step))

    def expire(self, draw: Draw) -> None:
        """The clock of the reference jumps; in Redis the deadlines are moved into the past instead."""
        self.now_ms += PARAMS.lease_ttl_ms + 1
        self.loop.run_until_complete(_expire_all(self.redis))

    def fetch(self, draw: Draw) -> None:
        wanted, prompts = [ref for ref, _ in self.leases[1][-12:]], draw(st.booleans())
        self.both(lambda store: store.fetch(wanted, prompts=prompts))

    def list_samples(self, draw: Draw) -> None:
        state, limit = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 11])), draw(st.sampled_from([1, 3, 100]))
        start = draw(st.sampled_from([0, 0, 5]))
        while True:
            page = self.both(lambda store, start=start: _undated(store, state, start, limit))
            if not page.following:
                return
            start = page.following

    def requeue(self, draw: Draw) -> None:
        dead = [each.ref for each in self.both(lambda store: _undated(store, 11, 0, 100)).samples]
        known = [*dead[-6:], *(ref for ref, _ in self.leases[1][-4:]), SampleRef(0, 9), SampleRef(10**6, 0)]
        wanted = draw(st.lists(st.sampled_from(known), min_size=1, max_size=4))
        self.both(lambda store: store.requeue(wanted))

    def import_groups(self, draw: Draw) -> None:
        epoch = max(1, self.epoch - draw(st.sampled_from([0, 0, 0, 1, -1])))
        low = max(0, self.published - draw(st.sampled_from([0, 0, 0, 1, 3])))
        versions = ((epoch, low, low + draw(st.integers(0, 1))),)
        rewards = draw(st.lists(st.one_of(st.none(), REWARDS), min_size=2, max_size=2))
        samples = [ImportedSample(4, 2, 1, versions, b"i", reward, b"w", ("b", "c")) for reward in rewards]
        groups = [ImportedGroup(b"imported", samples)] * draw(st.sampled_from([1, 1, 2]))
        name = draw(st.sampled_from("abcdefgh"))
        self.both(lambda store: store.import_groups(name, groups))


async def _outcome(call: Call, store: Store) -> Any:
    """The answer, or an error as its type and text. Connections that a kill broke are tried again, as callers do."""
    while True:
        try:
            return await call(store)
        except UnavailableError as error:
            if "does not answer" not in str(error):
                return type(error).__name__, str(error)
        except PolyheadError as error:
            return type(error).__name__, str(error)


async def _undated(store: Store, state: int, start: int, limit: int) -> Page:
    """A page without the times of death: the two stores have clocks of their own."""
    page = await store.list_samples(state, start, limit)
    samples = [
        replace(each, letter=replace(each.letter, died_ms=0)) if each.letter is not None else each
        for each in page.samples
    ]
    return replace(page, samples=samples)


async def _expire_all(store: RedisStore) -> None:
    client, prefix = store._scripts._redis, store._scripts._prefix
    for stage in (1, 2):
        key = f"{prefix}lease:{stage}"
        for at, member in enumerate(await client.zrange(key, 0, -1)):
            await client.zadd(key, {member: at})


def histories(count: int, commands: int, seed: int | None) -> None:
    """Raises what a history shows that the stores disagree on, with the commands that lead there."""
    with tempfile.TemporaryDirectory(dir=_MEMORY) as directory:
        _histories(count, commands, seed, Path(directory))


def _histories(count: int, commands: int, seed: int | None, memory: Path) -> None:
    with valkey.running(appendfsync="always", directory=memory) as server:
        TwoStores.server = server
        machine = TwoStores if seed is None else hypothesis.seed(seed)(TwoStores)
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            machine,
            settings=settings(
                max_examples=count,
                stateful_step_count=commands,
                deadline=None,
                derandomize=seed is None,
                database=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            ),
        )


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(PARTS))
def test_both_stores_answer_alike(part: int) -> None:
    """In parts, for as many workers."""
    histories(SHORT[0] // PARTS, SHORT[1], seed=part)


def _work(share: tuple[int, int, int]) -> None:
    count, commands, seed = share
    for done in range(0, count, PROGRESS):
        histories(min(PROGRESS, count - done), commands, seed + done)
        print(f"seed {seed}: {min(done + PROGRESS, count)} of {count} histories", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--histories", type=int, default=5000)
    parser.add_argument("--commands", type=int, default=100)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    began, share = time.monotonic(), -(-arguments.histories // arguments.workers)
    shares = [(share, arguments.commands, arguments.seed + 1_000_000 * worker) for worker in range(arguments.workers)]
    print(f"seed {arguments.seed}", flush=True)
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        pool.map(_work, shares, chunksize=1)
    took = time.monotonic() - began
    print(f"{share * arguments.workers} histories of up to {arguments.commands} commands agree, {took:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
