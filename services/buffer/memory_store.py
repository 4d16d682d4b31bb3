"""The reference store: plain dicts in one process. The property tests hold the Redis store to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.buffer import memory_operator as operator
from services.buffer import memory_train as train
from services.buffer import policy
from services.buffer.ids import SampleRef
from services.buffer.memory_lease import Handout, leased_sample
from services.buffer.memory_state import (
    DEAD,
    GENERATED,
    GENERATING,
    LEASED,
    NEVER_EXTENDED,
    NOTHING_APPENDED,
    PENDING,
    SCORED,
    SCORING,
    TRAINING,
    GroupRow,
    MemoryState,
)
from services.buffer.records import (
    Extension,
    Fetched,
    Generated,
    ImportedGroup,
    IssuedPrompt,
    Lease,
    LeasedGroup,
    LeasedSample,
    LedgerRecord,
    Page,
    Recovered,
    Released,
    Report,
    Requeued,
    Result,
    RunParams,
    Scored,
    StateCount,
    Waiting,
    WatermarkRecord,
)
from services.buffer.store import UNBOUNDED, Store
from services.common.versions import Version

OK, DUPLICATE = Result(pb.OUTCOME_OK), Result(pb.OUTCOME_DUPLICATE)
LEASE_LOST, GONE = Result(pb.OUTCOME_LEASE_LOST), Result(pb.OUTCOME_GONE)


def _wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


class MemoryStore(Store):
    """`clock_ms` can be injected: leases and replicas end by it."""

    def __init__(self, clock_ms: Callable[[], int] = _wall_clock_ms) -> None:
        self._clock_ms = clock_ms
        self._state: MemoryState | None = None

    @property
    def state(self) -> MemoryState:
        assert self._state is not None, "open comes first"
        return self._state

    async def open(self, params: RunParams) -> None:
        if self._state is None or not self._state.next_order:
            self._state = self._state or self._new_state(params)
        else:
            policy.check_same_run(self._state.params, params)
        self._state.params = params

    def _new_state(self, params: RunParams) -> MemoryState:
        first = policy.LEASES_PER_MS * self._clock_ms() if params.leases_from_clock else 0
        return MemoryState(params, self._clock_ms, last_lease=first)

    async def close(self) -> None:
        """Nothing is held open."""

    async def used_memory(self) -> int:
        rows = (row for group in self.state.groups.values() for row in group.samples)
        return sum(len(row.payload) + len(row.partial) + len(row.score) for row in rows)

    async def issue(self, cursor: int, prompts: Sequence[IssuedPrompt]) -> int:
        if cursor != self.state.cursor or not prompts:
            return 0
        for each in prompts:
            self.state.new_group(each.ordinal, each.prompt)
        self.state.cursor = prompts[-1].ordinal + 1
        return len(prompts)

    async def submit(self, request_id: str, prompts: Sequence[bytes]) -> list[int]:
        if request_id not in self.state.submits:
            self._remember_submit(request_id, [self.state.new_group(-1, prompt) for prompt in prompts])
        return list(self.state.submits[request_id])

    def _remember_submit(self, request_id: str, made: list[int]) -> None:
        self.state.submits[request_id] = made
        if len(self.state.submits) > policy.KEPT_SUBMITS:
            del self.state.submits[next(iter(self.state.submits))]

    async def lease_generate(
        self,
        replica_id: str,
        max_samples: int,
        version: Version,
        *,
        admit: bool,
        request_id: str = "",
        more: bool = False,
        max_bytes: int = UNBOUNDED,
    ) -> Lease:
        state = self.state
        closed = state.take_back_expired(GENERATING)
        out = Handout(state, replica_id, GENERATING, max_samples, max_bytes)
        if not more and out.put_again(request_id):
            return Lease(out.groups, closed_groups=closed, cursor=state.cursor, left_over=True)
        if refused := state.refuses(version):
            return Lease([], refused, closed_groups=closed, cursor=state.cursor)
        last = len(state.preferred)
        for group in sorted(state.live(), key=lambda group: (state.preferred.get(group.order, last), group.place)):
            out.take(group, PENDING)
        fresh = [group for group in state.groups.values() if group.birth is None and not group.closed]
        for group in sorted(fresh, key=lambda group: group.place):
            if not admit or not state.room() or not out.take(group, PENDING):
                break
            group.birth = state.published
        may_issue = admit and not out.full
        groups_missing = min(-(-out.left // state.params.group_size), state.room()) if may_issue else 0
        out.remember(request_id, more=more)
        pending = any(row.state == PENDING for group in state.live() for row in group.samples)
        return Lease(
            out.groups,
            None if out.groups else state.why_no_generate(version, admit=admit),
            closed_groups=closed,
            cursor=state.cursor,
            wanted=self._next_ordinals(groups_missing),
            left_over=out.full or pending or (not out.left and admit and state.room() > 0),
        )

    def _next_ordinals(self, groups_missing: int) -> tuple[int, ...]:
        if groups_missing <= 0:
            return ()
        ordinals: list[int] = []
        ordinal = self.state.cursor
        while len(ordinals) < max(groups_missing, self.state.params.batch_groups):
            if ordinal not in self.state.closed_ordinals:
                ordinals.append(ordinal)
            ordinal += 1
        return tuple(ordinals)

    async def lease_score(
        self,
        replica_id: str,
        max_samples: int,
        *,
        payload: bool,
        request_id: str = "",
        max_bytes: int = UNBOUNDED,
    ) -> Lease:
        state = self.state
        closed = state.take_back_expired(SCORING)
        out = Handout(state, replica_id, SCORING, max_samples, max_bytes, payload)
        if not out.put_again(request_id):
            for group in sorted(state.live(), key=lambda group: group.place):
                if out.full or not out.left:
                    break
                if group.judgeable:
                    out.take_whole(group)
                elif not state.params.scored_whole:
                    out.take(group, GENERATED)
                elif state.scorable(group):
                    out.take_together(group)
            out.remember(request_id)
        return Lease(
            out.groups,
            None if out.groups else state.why_no_score(),
            closed_groups=closed,
            left_over=any(state.scorable(group) for group in state.live()),
        )

    async def lease_train(self, epoch: int, step: int, *, payload: bool, max_bytes: int = UNBOUNDED) -> Lease:
        state = self.state
        batch, closed = train.leased_batch(state, epoch, step), 0
        if batch is None:
            closed = train.close_stale(state)
            chosen, waiting = train.plan_batch(state)
            if waiting is not None:
                return Lease([], waiting, closed_groups=closed)
            batch = train.record_batch(state, epoch, step, chosen)
        leased = [state.groups[order] for order in batch.orders]
        size = sum(len(row.payload) + len(row.score) for group in leased for row in group.alive)
        groups = [self._leased_whole(group, step, payload=payload and size <= max_bytes) for group in leased]
        return Lease(groups, batch_lease_id=batch.lease_id, closed_groups=closed)

    def _leased_whole(self, group: GroupRow, step: int, *, payload: bool) -> LeasedGroup:
        oldest = self.state.tokens_effective(group.alive)
        samples = [
            leased_sample(index, row, payload=payload, score=True)
            for index, row in enumerate(group.samples)
            if row.state != DEAD
        ]
        return LeasedGroup(group.order, group.ordinal, 0 if oldest is None else step - 1 - oldest, b"", samples)

    async def fetch(self, refs: Sequence[SampleRef], *, prompts: bool = False) -> list[Fetched]:
        return [self._fetch(ref, prompts=prompts) for ref in refs]

    def _fetch(self, ref: SampleRef, *, prompts: bool) -> Fetched:
        if (row := self.state.row(ref)) is None:
            return Fetched(0)
        prompt = self.state.groups[ref.order].prompt if prompts and not row.payload else b""
        return Fetched(row.state, row.partial, row.payload, row.score, prompt)

    async def extend(self, samples: Sequence[Extension]) -> Report:
        return Report([self._extend(each) for each in samples])

    def _extend(self, each: Extension) -> Result:
        if lost := self._lost(each.ref, each.lease_id, LEASED):
            return lost
        row = self.state.groups[each.ref.order].samples[each.ref.index]
        row.due_ms = self._clock_ms() + self.state.params.lease_ttl_ms
        if row.appended_from == NEVER_EXTENDED:
            row.appended_from, row.lost = NOTHING_APPENDED, 0
        if not each.num_tokens:
            return OK
        if row.state != GENERATING:
            return LEASE_LOST
        if each.from_token == row.appended_from and each.from_token + each.num_tokens == row.saved:
            return Result(pb.OUTCOME_DUPLICATE, row.saved)
        if each.from_token != row.saved:
            return Result(pb.OUTCOME_CONFLICT, row.saved)
        row.appended_from, row.saved, row.attempt = row.saved, row.saved + each.num_tokens, 0
        row.partial += each.delta
        self.state.bump("tokens_generated", each.num_tokens)
        return Result(pb.OUTCOME_OK, row.saved)

    async def complete_generate(self, samples: Sequence[Generated]) -> Report:
        return Report([self._complete_generate(each) for each in samples])

    def _complete_generate(self, each: Generated) -> Result:
        row = self.state.row(each.ref)
        if row is not None and row.generate_lease == each.lease_id:
            return DUPLICATE
        if lost := self._lost(each.ref, each.lease_id, (GENERATING,)):
            unsaved = max(0, each.completion_tokens - (row.saved if row else 0))
            self.state.bump("tokens_discarded", unsaved)
            self.state.bump("tokens_discarded.completed_late", unsaved)
            return lost
        assert row is not None
        self.state.bump("tokens_generated", max(0, each.completion_tokens - row.saved))
        row.state, row.generate_lease, row.attempt, row.lost = GENERATED, each.lease_id, 0, 0
        row.num_tokens, row.completion_tokens = each.num_tokens, each.completion_tokens
        row.finish_reason, row.versions, row.payload = each.finish_reason, each.versions, each.payload
        row.partial, row.saved, row.blobs = b"", 0, each.blobs
        return OK

    async def complete_score(self, samples: Sequence[Scored]) -> Report:
        before = {each.ref.order: self._standing(each.ref.order) for each in samples}
        results = [self._complete_score(each) for each in samples]
        return self._report(results, before)

    def _complete_score(self, each: Scored) -> Result:
        row = self.state.row(each.ref)
        if row is not None and each.lease_id in (row.score_lease, self._verdict_lease(each.ref)):
            return DUPLICATE
        if lost := self._lost(each.ref, each.lease_id, (SCORING,)):
            return lost
        assert row is not None
        if bool(each.verdict) != bool(row.score_lease):
            return LEASE_LOST
        if each.verdict:
            self.state.judge(self.state.groups[each.ref.order], each.verdict, each.verdict_reason)
            return OK
        row.state, row.score_lease, row.attempt, row.lost = SCORED, each.lease_id, 0, 0
        row.reward, row.score = each.reward, each.score
        self.state.finish(self.state.groups[each.ref.order])
        return OK

    def _verdict_lease(self, ref: SampleRef) -> int:
        """The lease under which a group that is judged was leased for it, 0 for another."""
        group = self.state.groups[ref.order]
        return group.samples[ref.index].lease_id if group.judged else 0

    def _lost(self, ref: SampleRef, lease_id: int, states: tuple[int, ...]) -> Result | None:
        """Why a lease does not hold, None when it does."""
        row = self.state.row(ref)
        if row is None or self.state.groups[ref.order].closed or row.state == DEAD:
            return GONE
        return None if row.state in states and row.lease_id == lease_id else LEASE_LOST

    async def partials(self, max_groups: int) -> list[LeasedGroup]:
        found = sorted(filter(self.state.has_partial, self.state.live()), key=lambda group: group.place)[:max_groups]
        return [
            LeasedGroup(
                group.order,
                group.ordinal,
                0,
                group.prompt,
                [
                    LeasedSample(index, 0, row.attempt, self.state.facts_of(group, row), score=row.score)
                    for index, row in enumerate(group.samples)
                    if row.state != DEAD
                ],
            )
            for group in found
        ]

    async def prefer(self, orders: Sequence[int]) -> None:
        self.state.preferred = {order: place for place, order in enumerate(dict.fromkeys(orders))}

    async def release(self, stage: int, samples: Sequence[Released]) -> Report:
        before = {each.ref.order: self._standing(each.ref.order) for each in samples}
        state = GENERATING if stage == sample_pb2.STAGE_GENERATE else SCORING
        return self._report([self._release(state, each) for each in samples], before)

    def _release(self, state: int, each: Released) -> Result:
        row = self.state.row(each.ref)
        if row is not None and row.released_lease == each.lease_id:
            return DUPLICATE
        if lost := self._lost(each.ref, each.lease_id, (state,)):
            return lost
        assert row is not None
        group = self.state.groups[each.ref.order]
        row.released_lease = each.lease_id
        self.state.bump("tokens_discarded", each.tokens_discarded)
        self.state.bump(each.discarded_as, each.tokens_discarded)
        if each.reason == pb.RELEASE_REASON_DROP:
            self.state.drop(group, each.drop_reason)
        elif each.reason == pb.RELEASE_REASON_FATAL:
            self.state.kill(group, row, each.error)
        elif each.reason == pb.RELEASE_REASON_SAMPLE_ERROR:
            self.state.fail(group, row, each.error)
        else:
            self.state.give_back(row)
        return OK

    def _standing(self, order: int) -> tuple[bool, bool]:
        group = self.state.groups.get(order)
        return (group.ready, group.closed or bool(group.rejected)) if group else (False, True)

    def _report(self, results: list[Result], before: dict[int, tuple[bool, bool]]) -> Report:
        ready = closed = 0
        for order, (was_ready, was_closed) in before.items():
            is_ready, is_closed = self._standing(order)
            ready += is_ready and not was_ready
            closed += is_closed and not was_closed
        return Report(results, ready, closed)

    async def commit_step(self, epoch: int, step: int, batch_lease_id: int, *, trained: bool) -> bool:
        return train.commit_step(self.state, epoch, step, batch_lease_id, trained=trained)

    async def publish_version(self, version: Version) -> None:
        train.publish_version(self.state, version)

    async def watermark(self, epoch: int, step: int) -> WatermarkRecord:
        return train.watermark(self.state, epoch, step)

    async def confirm_checkpoint(self, epoch: int, oldest_kept_step: int) -> int:
        return train.confirm_checkpoint(self.state, epoch, oldest_kept_step)

    async def acquire_epoch(self, known_epoch: int = 0) -> tuple[int, int]:
        self.state.epoch = max(self.state.epoch, known_epoch) + 1
        return self.state.epoch, self.state.step

    async def recover(self, epoch: int, step: int, watermark: WatermarkRecord | None) -> Recovered:
        return train.recover(self.state, epoch, step, watermark)

    async def register_replica(self, replica_id: str, replica: bytes, ttl_ms: int) -> Version | None:
        self.state.replicas[replica_id] = (self._clock_ms() + ttl_ms, replica)
        return self.state.floor

    async def list_replicas(self) -> list[bytes]:
        replicas, now = self.state.replicas, self._clock_ms()
        for key in [key for key, (until, _) in replicas.items() if until <= now]:
            del replicas[key]
            for target in LEASED:
                self.state.grants.pop((key, target), None)
        return [replicas[key][1] for key in sorted(replicas)]

    async def ledger(self, *, admit: bool) -> LedgerRecord:
        state = self.state
        counts: dict[tuple[int, int], list[int]] = {key: list(figures) for key, figures in state.tallies.items()}
        rows = (row for group in state.groups.values() if not group.closed for row in group.alive)
        for row in rows:
            figures = counts.setdefault((row.state, 0), [0, 0, 0])
            figures[0] += 1
            figures[1] += row.length
            figures[2] += bool(row.length)
        return LedgerRecord(
            state.accepted,
            [StateCount(*key, *counts[key]) for key in sorted(counts) if counts[key][0]],
            state.epoch,
            state.step,
            state.published,
            state.cursor,
            state.occupied(),
            policy.live_limit(state.params),
            self._waiting(admit=admit),
            dict(state.counters),
        )

    async def list_samples(self, state: int, start: int, limit: int) -> Page:
        return operator.list_samples(self.state, state, start, limit)

    async def requeue(self, refs: Sequence[SampleRef]) -> list[Requeued]:
        return [operator.requeue(self.state, ref) for ref in refs]

    async def referenced_blobs(self, digests: Sequence[str]) -> set[str]:
        rows = (row for group in self.state.groups.values() for row in group.samples)
        return set(digests) & {digest for row in rows for digest in row.blobs}

    async def import_groups(self, request_id: str, groups: Sequence[ImportedGroup]) -> tuple[list[int], int]:
        if request_id in self.state.submits:
            return list(self.state.submits[request_id]), 0
        made, ready = operator.import_groups(self.state, groups)
        self._remember_submit(request_id, made)
        return list(made), ready

    def _waiting(self, *, admit: bool) -> dict[int, Waiting]:
        """Per stage what a lease would wait for; nothing for a stage that has work."""
        state, waiting = self.state, {}
        fresh = any(group.birth is None and not group.closed for group in state.groups.values())
        can_start = state.published is not None and admit and state.room() and fresh
        if state.published is None or not (state.count(PENDING) or can_start):
            waiting[int(sample_pb2.STAGE_GENERATE)] = state.why_no_generate(None, admit=admit)
        if not state.count(GENERATED) and not any(group.judgeable for group in state.live()):
            waiting[int(sample_pb2.STAGE_SCORE)] = state.why_no_score()
        reason = None if state.count(TRAINING) else train.plan_batch(state)[1]
        if reason:
            waiting[int(sample_pb2.STAGE_TRAIN)] = reason
        return waiting
