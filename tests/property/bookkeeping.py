"""The outside ledger of a history: what clients were told, and what may follow from it. It never asks a store."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.buffer.ids import SampleRef, stamped
from services.buffer.records import (
    Extension,
    Generated,
    ImportedGroup,
    Lease,
    LeasedSample,
    LedgerRecord,
    Recovered,
    Released,
    Report,
    Requeued,
    RunParams,
    Scored,
)
from services.common.versions import Version, steps_between
from tests.property.audit import Found

_DONE = (pb.OUTCOME_OK, pb.OUTCOME_DUPLICATE)
_GENERATE, _SCORE = 1, 2
_NO_FORK = 1 << 40
"""Of an epoch that was skipped: no history forked there."""
Ranges = tuple[tuple[int, int, int], ...]


@dataclass(slots=True)
class Known:
    """What clients know of one sample. `held` is the lease it is under by stage, `last` the last one it was under,
    `failures` the most its attempt can be and `errors` the least.
    """

    versions: Ranges = ()
    payload: bytes | None = None
    saved: bytes = b""
    reward: float = 0.0
    score: bytes | None = None
    held: dict[int, int] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    deltas: set[tuple[int, int]] = field(default_factory=set)
    """Lease and from_token of what is saved."""
    failures: int = 0
    errors: int = 0

    def progressed(self) -> None:
        self.failures = self.errors = 0


@dataclass(slots=True)
class Bookkeeping:
    params: RunParams
    samples: dict[SampleRef, Known] = field(default_factory=dict)
    lease_of: dict[int, tuple[SampleRef, int]] = field(default_factory=dict)
    admitted: set[int] = field(default_factory=set)
    """Groups of which a sample was ever leased."""
    births: dict[int, Version] = field(default_factory=dict)
    """The published version when a group was admitted."""
    published: Version = field(default_factory=lambda: Version(0, 0))
    epoch: int = 0
    step: int = 0
    forks: dict[int, int] = field(default_factory=dict)
    leased: dict[int, list[SampleRef]] = field(default_factory=dict)
    """Trainer leases by id."""
    batches: dict[int, list[SampleRef]] = field(default_factory=dict)
    """Samples of the surviving history by step."""
    bound: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Step and position at which a group has to be trained again."""
    adopted: bool = False
    """A checkpoint overruled the store: some samples count as trained that no batch held."""
    in_time: bool = True
    """Nothing happened that makes a group too old before a step could train it."""
    live: set[int] = field(default_factory=set)
    """Groups that were ever seen to be live."""

    def sample(self, ref: SampleRef) -> Known:
        return self.samples.setdefault(ref, Known())

    # Leases

    def on_lease(self, stage: int, lease: Lease, *, payload: bool = True) -> None:
        for group in lease.groups:
            if stage == _GENERATE and group.order not in self.admitted:
                self.admitted.add(group.order)
                self.births[group.order] = self.published
            for each in group.samples:
                ref = SampleRef(group.order, each.index)
                self._on_leased(stage, ref, each)
                known = self.sample(ref)
                if stage == _GENERATE:
                    assert known.payload is None, f"{ref} was complete, and is generated again"
                    assert each.partial == known.saved, f"{ref}: {each.partial!r} for {known.saved!r}"
                else:
                    assert not payload or each.payload in (known.payload, b""), f"{ref}: {each.payload!r}"
                    assert group.judge == (known.score is not None), f"{ref} is scored already, or not yet"

    def _on_leased(self, stage: int, ref: SampleRef, each: LeasedSample) -> None:
        known = self.sample(ref)
        assert self.lease_of.setdefault(each.lease_id, (ref, stage)) == (ref, stage), (
            f"lease {each.lease_id} used twice"
        )
        holder = known.held.get(stage, each.lease_id)
        assert holder == each.lease_id, f"{ref} is leased as {each.lease_id} while {holder} holds it"
        assert all(other == stage for other in known.held), f"{ref} is leased for two stages"
        known.held[stage] = known.last[stage] = each.lease_id
        assert known.errors <= each.attempt <= known.failures, (
            f"{ref}: attempt {each.attempt}, but {known.errors} to {known.failures} failures"
        )
        assert each.attempt < self.params.max_attempts

    def on_expiry(self) -> None:
        """Every lease may end from here on, and may count as a failure when it does."""
        for known in self.samples.values():
            if known.held:
                known.held.clear()
                known.failures += 1

    # What is done under a lease

    def on_extended(self, rows: Sequence[Extension], report: Report) -> None:
        for each, result in zip(rows, report.results, strict=True):
            known, place = self.sample(each.ref), (each.lease_id, each.from_token)
            if result.outcome in _DONE and each.num_tokens and place not in known.deltas:
                known.deltas.add(place)
                known.saved += each.delta
                known.progressed()

    def on_generated(self, rows: Sequence[Generated], report: Report) -> None:
        for each, result in zip(rows, report.results, strict=True):
            known = self.sample(each.ref)
            unheard = result.outcome == pb.OUTCOME_DUPLICATE and known.last.get(_GENERATE) == each.lease_id
            if known.payload is not None or not (unheard or result.outcome == pb.OUTCOME_OK):
                assert result.outcome != pb.OUTCOME_OK, f"{each.ref} was completed twice"
                continue
            known.versions, known.payload, known.saved = each.versions, each.payload, b""
            self._ended(each.ref, each.lease_id)
            known.progressed()
            self._note_age(each.ref.order, each.versions)

    def _note_age(self, order: int, versions: Ranges) -> None:
        """Tokens older than the group, or of steps that are yet to come and may be undone, make it late."""
        ends = [(Version(epoch, low), Version(epoch, high)) for epoch, low, high in versions]
        if any(low < self.births[order] or high.step > self.step for low, high in ends):
            self.in_time = False

    def on_scored(self, rows: Sequence[Scored], report: Report) -> None:
        for each, result in zip(rows, report.results, strict=True):
            known = self.sample(each.ref)
            if result.outcome not in _DONE or known.last.get(_SCORE) != each.lease_id:
                continue
            if each.verdict and known.score is not None and each.lease_id in known.held.values():
                self._judged(each.ref.order)
            elif not each.verdict and known.score is None:
                known.reward, known.score = each.reward, each.score
                known.progressed()
            else:
                assert result.outcome == pb.OUTCOME_DUPLICATE or each.verdict, f"{each.ref} was scored twice"
            self._ended(each.ref, each.lease_id)

    def _judged(self, order: int) -> None:
        for index in range(self.params.group_size):
            known = self.sample(SampleRef(order, index))
            known.held.clear()
            known.progressed()

    def on_released(self, rows: Sequence[Released], report: Report) -> None:
        for each, result in zip(rows, report.results, strict=True):
            known = self.sample(each.ref)
            if result.outcome not in _DONE or each.lease_id not in known.held.values():
                continue
            self._ended(each.ref, each.lease_id)
            if each.reason == pb.RELEASE_REASON_SAMPLE_ERROR:
                known.failures, known.errors = known.failures + 1, known.errors + 1

    def _ended(self, ref: SampleRef, lease_id: int) -> None:
        held = self.sample(ref).held
        for stage in [stage for stage, holder in held.items() if holder == lease_id]:
            del held[stage]

    def on_requeued(self, rows: Sequence[SampleRef], answer: Sequence[Requeued], dead: Collection[SampleRef]) -> None:
        """`dead` are those that were dead right before."""
        for ref, each in zip(rows, answer, strict=True):
            unheard = each.outcome == pb.REQUEUE_OUTCOME_DUPLICATE and ref in dead and each.order == ref.order
            if unheard or each.outcome == pb.REQUEUE_OUTCOME_REQUEUED:
                self.samples[ref] = Known()

    def on_imported(self, groups: Sequence[ImportedGroup], orders: Sequence[int]) -> None:
        for order, group in zip(orders, groups, strict=False):  # the first request of this name may have had fewer
            if order in self.admitted:
                continue
            self.admitted.add(order)
            self.births[order] = self.published
            for index, each in enumerate(group.samples):
                known = self.sample(SampleRef(order, index))
                known.versions, known.payload = each.versions, stamped(each.payload, order, index)
                self._note_age(order, each.versions)
                if each.reward is not None:
                    known.reward, known.score = each.reward, each.score

    # The trainer

    def age(self, version: Version) -> int:
        """Steps from the version to the one that the next step trains."""
        return steps_between(version, Version(self.epoch, self.step), self.forks)

    def on_batch(self, epoch: int, step: int, lease: Lease, *, payload: bool) -> None:
        assert (epoch, step) in ((self.epoch, self.step + 1), (self.epoch, self.step))
        if not lease.groups:
            return
        if lease.batch_lease_id in self.leased:
            assert self.leased[lease.batch_lease_id] == _members(lease), "the batch of a lease has changed"
            return
        assert step == self.step + 1
        assert len(lease.groups) == self.params.batch_groups
        earlier = {ref for at, batch in self.batches.items() for ref in batch}
        for group in lease.groups:
            refs = [SampleRef(group.order, each.index) for each in group.samples]
            assert len(refs) >= self.params.min_group_size
            assert not earlier & set(refs), f"group {group.order} was trained before"
            for ref, each in zip(refs, group.samples, strict=True):
                self._check_trained(ref, each, payload=payload)
            ends = [Version(e, at) for ref in refs for e, *steps in self.sample(ref).versions for at in steps]
            staleness = max((self.age(end) for end in ends), default=0)
            assert group.staleness == staleness
            assert self.params.on_stale == "mask" or staleness <= self.params.max_staleness, (
                f"{group.order}: {staleness}"
            )
        replayed = [self.bound[group.order] for group in lease.groups if group.order in self.bound]
        assert replayed == sorted(replayed), "replayed in another order"
        assert all(at == step for at, _ in replayed), f"step {step} replays {replayed}"
        self.leased[lease.batch_lease_id] = _members(lease)

    def _check_trained(self, ref: SampleRef, each: LeasedSample, *, payload: bool) -> None:
        known = self.sample(ref)
        assert known.score is not None, f"{ref} is trained without a score"
        assert (each.facts.reward, each.score) == (known.reward, known.score)
        assert not payload or each.payload in (known.payload, b""), f"{ref}: {each.payload!r}"
        assert not known.held, f"{ref} is trained while {known.held} hold it"

    def on_commit(self, step: int, lease_id: int, *, trained: bool) -> None:
        """True or False was answered: the step is closed with this batch."""
        members = self.leased[lease_id]
        if step in self.batches:
            assert not trained or self.batches[step] == members
            return
        assert step == self.step + 1
        self.step = step
        self.batches[step] = members if trained else []
        for ref in members:
            self.bound.pop(ref.order, None)

    def on_epoch(self, epoch: int, step: int) -> None:
        assert epoch > self.epoch, f"epoch {epoch} after {self.epoch}"
        self.forks |= dict.fromkeys(range(self.epoch + 1, epoch), _NO_FORK)
        assert step == self.step, f"the store is at step {step}, {self.step} was committed"
        self.epoch = epoch

    def on_recover(self, step: int, answer: Recovered, *, adopts: bool) -> None:
        if self.epoch in self.forks:
            return
        self.forks[self.epoch] = step
        self.in_time = self.in_time and not self.step
        undone = {at: batch for at, batch in self.batches.items() if at > step}
        for at, batch in undone.items():
            order_of_groups = list(dict.fromkeys(ref.order for ref in batch))
            self.bound |= {order: (at, position) for position, order in enumerate(order_of_groups)}
            del self.batches[at]
        due = {at for at, _ in self.bound.values()}
        if adopts:
            self.adopted, self.in_time = True, False
            self.bound = {order: due for order, due in self.bound.items() if due[0] > step}
        assert set(answer.replayed_steps) <= due, f"{answer.replayed_steps} are to be replayed, {due} were undone"
        self.step = step

    # The store as a whole

    def check(self, found: Found, ledger: LedgerRecord) -> None:
        assert ledger.accepted == sum(each.samples for each in ledger.counts) == found.accepted
        assert (ledger.epoch, ledger.step) == (self.epoch, self.step)
        assert found.accepted >= max((ref.order + 1 for ref in self.samples), default=0) * self.params.group_size
        trained = 0
        for batch in self.batches.values():
            for ref in batch:
                trained |= 1 << (ref.order * self.params.group_size + ref.index)
        beside = found.trained & ~trained
        assert found.trained & trained == trained, "a sample of a surviving step does not count as trained"
        assert not beside or self.adopted, "a sample counts as trained that no surviving step holds"
        # Read off the store: the answer that admitted a group may have been lost.
        if not self.live.issuperset(found.indexes["live"]):
            assert ledger.live_groups <= ledger.live_groups_limit, "a group was admitted beyond the bound"
        self.live.update(found.indexes["live"], found.indexes["bound"])
        if self.in_time and self.params.on_stale == "wait" and not self.params.surplus_groups:
            late = [each for each in ledger.counts if each.drop_reason == sample_pb2.DROP_REASON_STALE]
            assert not late, "a group was dropped as too old, though nothing but its length can be the cause"


def _members(lease: Lease) -> list[SampleRef]:
    return [SampleRef(group.order, each.index) for group in lease.groups for each in group.samples]
