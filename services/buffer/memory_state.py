"""The reference store's state, in plain dicts, and the transitions of samples and groups that its verbs share.

Nothing is indexed: who is pending, live or ready is read off the samples each time, so that this stays the model that
the Redis store is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.buffer import policy
from services.buffer.ids import SampleRef
from services.buffer.records import NO_ORDINAL, RunParams, SampleFacts, Waiting
from services.common.errors import FencedError, PreconditionError
from services.common.versions import Version

State = sample_pb2.SampleState
PENDING, GENERATING = State.SAMPLE_STATE_PENDING, State.SAMPLE_STATE_GENERATING
GENERATED, SCORING = State.SAMPLE_STATE_GENERATED, State.SAMPLE_STATE_SCORING
SCORED, READY = State.SAMPLE_STATE_SCORED, State.SAMPLE_STATE_READY
TRAINING, CONSUMED = State.SAMPLE_STATE_TRAINING, State.SAMPLE_STATE_CONSUMED
RETIRED, DROPPED, DEAD = State.SAMPLE_STATE_RETIRED, State.SAMPLE_STATE_DROPPED, State.SAMPLE_STATE_DEAD
LEASED = (GENERATING, SCORING)
# `appended_from` of a lease that was never extended, and of one under which no token was saved.
NEVER_EXTENDED, NOTHING_APPENDED = -2, -1
# What counts a group that the filter's verdict leaves in.
_KEPT: dict[int, str] = {
    pb.GROUP_VERDICT_KEEP: "filter.kept",
    pb.GROUP_VERDICT_KEEP_IF_INSUFFICIENT: "filter.kept_when_insufficient",
    pb.GROUP_VERDICT_FILTER_FAILED: "filter.failed",
}


@dataclass(slots=True, eq=False)
class SampleRow:
    state: int = PENDING
    lease_id: int = 0
    due_ms: int = 0
    attempt: int = 0
    saved: int = 0
    appended_from: int = NOTHING_APPENDED
    """from_token of the last delta saved under the present lease."""
    lost: int = 0
    """Leases in a row that expired without a heartbeat."""
    num_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: int = 0
    versions: tuple[tuple[int, int, int], ...] = ()
    reward: float = 0.0
    generate_lease: int = 0
    score_lease: int = 0
    released_lease: int = 0
    requeued: bool = False
    """It was dead before."""
    partial: bytes = b""
    payload: bytes = b""
    score: bytes = b""
    blobs: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        return self.completion_tokens or self.saved

    def forget(self) -> None:
        """Lets go of all that is big."""
        self.partial = self.payload = self.score = b""
        self.blobs = ()

    def facts(self) -> SampleFacts:
        oldest = Version(*self.versions[0][:2]) if self.versions else Version(0, 0)
        return SampleFacts(self.num_tokens, self.length, self.finish_reason, oldest, self.reward)


@dataclass(slots=True, eq=False)
class GroupRow:
    order: int
    ordinal: int
    prompt: bytes
    samples: list[SampleRow]
    place: int
    """In the order of issue: its `order`, or the place of the group that it was issued again for."""
    birth: Version | None = None
    """The published version at its first lease; None until then."""
    bound_step: int = 0
    """The step it has to be replayed at, after a recovery."""
    closed: bool = False
    kept: bool = False
    """Closed as GROUP_DEAD, and its prompt is there for a requeue."""
    reissued_as: int | None = None
    judged: bool = False
    """The filter's verdict is in."""
    rejected: int = 0
    """The reason for which a filter would have it dropped, if it turns out to lie before the last group of its step."""
    rejected_as: str = ""
    """What counts it when it is dropped."""

    @property
    def alive(self) -> list[SampleRow]:
        return [row for row in self.samples if row.state != DEAD]

    @property
    def live(self) -> bool:
        return self.birth is not None and not self.closed and not self.rejected

    @property
    def ready(self) -> bool:
        return self.live and not self.bound_step and all(row.state == READY for row in self.alive)

    @property
    def judgeable(self) -> bool:
        return self.live and all(row.state == SCORED for row in self.alive)


@dataclass(slots=True)
class Batch:
    """The groups a step was leased with, in position order."""

    epoch: int
    lease_id: int
    orders: list[int]
    committed: bool = False


@dataclass(frozen=True, slots=True)
class DeadRow:
    """How a sample died. `place` is its place in the order of death."""

    place: int
    error: str
    died_ms: int
    attempt: int
    facts: SampleFacts


@dataclass(slots=True)
class MemoryState:
    params: RunParams
    clock_ms: Callable[[], int]
    groups: dict[int, GroupRow] = field(default_factory=dict)
    batches: dict[int, Batch] = field(default_factory=dict)
    closed_ordinals: dict[int, int] = field(default_factory=dict)
    """Ordinal to the last committed step when it was closed."""
    submits: dict[str, list[int]] = field(default_factory=dict)
    replicas: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    grants: dict[tuple[str, int], tuple[str, list[tuple[SampleRef, int]]]] = field(default_factory=dict)
    """By replica and state of the leased samples: its newest request, and the leases it was answered with."""
    counters: dict[str, int] = field(default_factory=dict)
    tallies: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """Samples, completion tokens and samples with a token in closed states, by (state, drop reason)."""
    letters: dict[SampleRef, DeadRow] = field(default_factory=dict)
    forks: dict[int, int] = field(default_factory=dict)
    trained: dict[int, int] = field(default_factory=dict)
    """Groups in the batch of each step above the published one."""
    answers: dict[int, int] = field(default_factory=dict)
    """Groups that the Recover of an epoch returned."""
    accepted: int = 0
    cursor: int = 0
    next_order: int = 0
    last_lease: int = 0
    preferred: dict[int, int] = field(default_factory=dict)
    """Places of the groups that are leased first, by order."""
    filtered: int = 0
    """Groups that filters dropped since the last batch was leased."""
    epoch: int = 0
    step: int = 0
    retired_step: int = 0
    low_water: int = 0
    published: Version | None = None
    floor: Version | None = None

    # Reading

    def row(self, ref: SampleRef) -> SampleRow | None:
        group = self.groups.get(ref.order)
        if group is None or ref.index >= len(group.samples):
            return None
        return group.samples[ref.index]

    def in_order(self) -> Iterator[GroupRow]:
        return (self.groups[order] for order in sorted(self.groups))

    def effective(self, version: Version) -> int:
        return policy.effective_step(version, self.forks, self.epoch)

    def tokens_effective(self, rows: Iterable[SampleRow]) -> int | None:
        """The effective step of the oldest token among `rows`, None while they have none."""
        ends = (Version(epoch, step) for row in rows for epoch, *steps in row.versions for step in steps)
        return min((self.effective(end) for end in ends), default=None)

    def deadline(self, group: GroupRow) -> int:
        assert group.birth is not None
        birth, tokens = self.effective(group.birth), self.tokens_effective(group.samples)
        return policy.deadline(birth if tokens is None else min(birth, tokens), self.params.max_staleness)

    def live(self) -> list[GroupRow]:
        return [group for group in self.groups.values() if group.live]

    def has_partial(self, group: GroupRow) -> bool:
        """Whether a live group waits for a rollout replica with tokens already there."""
        states = [row.state for row in group.samples]
        return group.live and PENDING in states and any(row.length for row in group.alive)

    @staticmethod
    def facts_of(group: GroupRow, row: SampleRow) -> SampleFacts:
        """The record of a sample in a waiting group: unfinished tokens are as old as the group's birth."""
        facts = row.facts()
        if group.birth is None or not row.length or row.versions:
            return facts
        return replace(facts, oldest=group.birth)

    def unpublished(self) -> int:
        """Groups in the batches of steps that are not published yet."""
        return sum(self.trained.values())

    def occupied(self) -> int:
        return len(self.live()) + self.unpublished()

    def room(self) -> int:
        """Groups that may be admitted; none while they would be too old for the next step from the start."""
        return 0 if self.behind() else max(0, policy.live_limit(self.params) - self.occupied())

    def behind(self) -> bool:
        return self.published is not None and self.published.step + self.params.max_staleness < self.step

    def count(self, *states: int) -> int:
        """Samples of open groups in these states, those of groups never leased aside."""
        return sum(row.state in states for group in self.live() for row in group.samples)

    def why_no_generate(self, version: Version | None, *, admit: bool) -> Waiting:
        if refused := self.refuses(version):
            return refused
        if self.behind():
            return Waiting("push", (self.step,))
        if not self.room():
            return Waiting("bound", (self.occupied(), policy.live_limit(self.params)))
        return Waiting("prompts") if admit else Waiting("memory")

    def refuses(self, version: Version | None) -> Waiting | None:
        """Why a replica at `version` gets nothing to generate; None for no particular replica."""
        if self.published is None:
            return Waiting("unpublished")
        if version is None:
            return None
        if version < self.published:
            return Waiting("below", tuple(self.published))
        return Waiting("abandoned") if self.effective(version) != version.step else None

    def why_no_score(self) -> Waiting:
        if generating := self.count(GENERATING):
            return Waiting("generating", (generating,))
        pending = sum(any(row.state == PENDING for row in group.samples) for group in self.live())
        return Waiting("pending", (pending,)) if pending else Waiting("idle")

    def why_no_batch(self, have: int) -> Waiting:
        if self.filtered and self.filtered >= self.params.refill_groups:
            return Waiting("filtered", (have, self.params.batch_groups, self.filtered))
        to_score = self.count(SCORING)
        for group in self.live():
            if self.scorable(group):
                to_score += sum(row.state == GENERATED or group.judgeable for row in group.alive)
        return Waiting("groups", (have, self.params.batch_groups, self.count(GENERATING), to_score))

    def scorable(self, group: GroupRow) -> bool:
        """Whether the score stage has work with the group."""
        states = {row.state for row in group.alive}
        wait = self.params.scored_whole and states & {PENDING, GENERATING, SCORING}
        return group.judgeable or (GENERATED in states and not wait)

    def fence(self, epoch: int) -> None:
        if epoch < self.epoch:
            raise FencedError(f"{epoch} was superseded by {self.epoch}", field="epoch")
        if epoch > self.epoch:
            raise PreconditionError(f"{epoch} was never acquired: the last one is {self.epoch}", field="epoch")

    # Changing

    def bump(self, counter: str, by: int = 1) -> None:
        if by:
            self.counters[counter] = self.counters.get(counter, 0) + by

    def tally(self, row: SampleRow, state: int, reason: int = 0, sign: int = 1) -> None:
        figures = self.tallies.setdefault((state, reason), [0, 0, 0])
        figures[0] += sign
        figures[1] += sign * row.length
        figures[2] += sign * bool(row.length)

    def next_lease(self) -> int:
        self.last_lease += 1
        return self.last_lease

    def new_group(self, ordinal: int, prompt: bytes, place: int | None = None) -> int:
        order, size = self.next_order, self.params.group_size
        samples = [SampleRow() for _ in range(size)]
        self.groups[order] = GroupRow(order, ordinal, prompt, samples, order if place is None else place)
        self.next_order += 1
        self.accepted += size
        return order

    def close_ordinal(self, group: GroupRow) -> None:
        group.closed = True
        group.bound_step = 0
        if group.ordinal != NO_ORDINAL:
            self.closed_ordinals[group.ordinal] = self.step

    def drop(self, group: GroupRow, reason: int) -> None:
        """Closes a whole group. A STALE or SURPLUS one is issued again in its place; a `kept` one keeps its prompt."""
        for row in group.alive:
            row.state = DROPPED
            self.tally(row, DROPPED, reason)
            row.forget()
        if reason in policy.REISSUED_REASONS:
            group.closed, group.bound_step = True, 0
            self.new_group(group.ordinal, group.prompt, group.place)
        else:
            self.close_ordinal(group)
        if not group.kept:
            group.prompt = b""
        if not group.rejected:
            self.filtered += reason in policy.FILTER_REASONS

    def reject(self, group: GroupRow, reason: int, counter: str = "") -> None:
        """Drops a group that a filter does not want: at once, or when it is known that it had its turn."""
        if not policy.speculative(self.params):
            self.drop(group, reason)
            if counter:
                self.bump(counter)
            return
        self.filtered += 1
        group.rejected, group.rejected_as = reason, counter
        for row in group.alive:
            row.forget()

    def drop_rejected(self, before: int) -> None:
        """The verdict on groups before this place counts: the step that was committed came to them."""
        for group in [group for group in self.in_order() if group.rejected and not group.closed]:
            if group.place < before:
                if group.rejected_as:
                    self.bump(group.rejected_as)
                self.drop(group, group.rejected)

    def judge(self, group: GroupRow, verdict: int, reason: str) -> None:
        """Applies what the filter says of a scored group."""
        group.judged = True
        for row in group.alive:
            row.state, row.attempt, row.lost = SCORED, 0, 0
        if policy.verdict_drops(verdict, self.filtered, self.params.refill_groups):
            self.reject(group, sample_pb2.DROP_REASON_FILTERED, policy.reason_counter(reason, self.counters))
            return
        self.bump(_KEPT[verdict])
        self.finish(group)

    def kill(self, group: GroupRow, row: SampleRow, error: str) -> None:
        """Makes a dead letter of a sample; its group goes on without it or is dropped."""
        self.tally(row, DEAD)
        row.state, row.requeued = DEAD, False
        self._write_letter(SampleRef(group.order, group.samples.index(row)), row, error)
        row.forget()
        if len(group.alive) < self.params.min_group_size:
            group.kept = True
            self.drop(group, sample_pb2.DROP_REASON_GROUP_DEAD)
        else:
            self.finish(group)

    def _write_letter(self, ref: SampleRef, row: SampleRow, error: str) -> None:
        self.letters[ref] = DeadRow(self.next_lease(), error, self.clock_ms(), row.attempt, row.facts())
        if len(self.letters) > policy.KEPT_DEAD:
            oldest = min(self.letters, key=lambda each: self.letters[each].place)
            del self.letters[oldest]
            if (group := self.groups.get(oldest.order)) is not None and group.kept:
                self.forget_prompt(group)

    @staticmethod
    def forget_prompt(group: GroupRow) -> None:
        """Lets go of what a requeue of the group would need."""
        group.prompt, group.kept = b"", False

    def finish(self, group: GroupRow) -> None:
        """If all samples are scored: READY together, dropped by the filter, or left to be judged."""
        if any(row.state != SCORED for row in group.alive) or (self.params.judged and not group.judged):
            return
        if self.params.drop_zero_variance and policy.has_zero_variance([row.reward for row in group.alive]):
            if not self.params.zero_variance_fallback or self.filtered < self.params.refill_groups:
                self.reject(group, sample_pb2.DROP_REASON_ZERO_VARIANCE)
                return
            self.bump("filter.kept_when_insufficient")
        for row in group.alive:
            row.state = READY

    def fail(self, group: GroupRow, row: SampleRow, error: str) -> None:
        """Counts a failure of the sample; returns it to its mailbox, or kills it."""
        row.attempt += 1
        if row.attempt >= self.params.max_attempts:
            self.kill(group, row, error)
        else:
            self.give_back(row)

    @staticmethod
    def give_back(row: SampleRow) -> None:
        returned = SCORED if row.score_lease else GENERATED
        row.state = PENDING if row.state == GENERATING else returned

    def take_back_expired(self, state: int) -> int:
        """Ends leases of samples in `state` that are over. Returns the number of groups this closed."""
        now, closed = self.clock_ms(), 0
        expired = [
            (row.due_ms, group.order, index)
            for group in self.live()
            for index, row in enumerate(group.samples)
            if row.state == state and row.due_ms <= now
        ]
        for _, order, index in sorted(expired):
            group = self.groups[order]
            row = group.samples[index]
            if row.state != state:
                continue
            self.bump("leases_expired")
            if row.appended_from == NEVER_EXTENDED and row.lost < policy.UNCOUNTED_LOSSES:
                row.lost += 1
                self.give_back(row)
            elif row.appended_from in (NEVER_EXTENDED, NOTHING_APPENDED):
                self.fail(group, row, "the lease expired without progress")
            else:
                self.give_back(row)
            closed += group.closed
        return closed
