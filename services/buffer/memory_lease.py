"""GENERATE and SCORE leases of the reference store: what an answer may hold, and what an earlier one granted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.buffer.ids import SampleRef
from services.buffer.memory_state import DEAD, GENERATED, NEVER_EXTENDED, GroupRow, MemoryState, SampleRow
from services.buffer.records import LeasedGroup, LeasedSample


@dataclass(slots=True)
class Handout:
    """An answer in the making: at most `left` samples and, after the first one, `max_bytes`."""

    state: MemoryState
    replica_id: str
    target: int
    """The state of a leased sample: GENERATING or SCORING."""
    left: int
    max_bytes: int
    payload: bool = False
    bytes: int = 0
    full: bool = False
    groups: list[LeasedGroup] = field(default_factory=list)
    granted: list[tuple[SampleRef, int]] = field(default_factory=list)

    def take(self, group: GroupRow, source: int) -> int:
        """Leases samples of the group that are in `source`. Returns how many."""
        places = [index for index, row in enumerate(group.samples) if row.state == source][: self.left]
        return self._put(group, places) if places and not self.full else 0

    def take_whole(self, group: GroupRow) -> int:
        """Leases all samples of a scored group, to be judged: the first one of an answer whatever its size."""
        places = [index for index, row in enumerate(group.samples) if row.state != DEAD]
        size = len(group.prompt) + sum(self._size(group.samples[index], judge=True) for index in places)
        if self.granted and (len(places) > self.left or self.bytes + size > self.max_bytes):
            return 0
        return self._put(group, places, judge=True, payload=self.payload and size <= self.max_bytes)

    def take_together(self, group: GroupRow) -> None:
        """Leases all generated samples of the group: the first group of an answer whatever its size. Its samples are to
        be fetched."""
        places = [index for index, row in enumerate(group.samples) if row.state == GENERATED]
        if not self.granted or len(places) <= self.left:
            self._put(group, places, payload=False)

    def put_again(self, request_id: str) -> bool:
        """Puts what the replica still holds of an earlier answer to this request into this one, if there is any."""
        held: dict[int, list[int]] = {}
        for ref, lease_id in self._grant_of(request_id):
            row = self.state.row(ref)
            if row is not None and row.state == self.target and row.lease_id == lease_id:
                held.setdefault(ref.order, []).append(ref.index)
        for order, places in held.items():
            group = self.state.groups[order]
            if not group.samples[places[0]].score_lease:
                self._put(group, places)
            elif len(places) == len(group.alive):
                self.take_whole(group)
        return bool(self.groups)

    def remember(self, request_id: str, *, more: bool = False) -> None:
        """Remembers what this answer grants, beside what an earlier turn of the same request did."""
        if request_id and self.granted:
            earlier = self._grant_of(request_id) if more else []
            self.state.grants[self.replica_id, self.target] = (request_id, [*earlier, *self.granted])

    def _grant_of(self, request_id: str) -> list[tuple[SampleRef, int]]:
        known, granted = self.state.grants.get((self.replica_id, self.target), ("", []))
        return granted if request_id and known == request_id else []

    def _size(self, row: SampleRow, *, judge: bool, payload: bool = True) -> int:
        return len(row.score if judge else row.partial) + (len(row.payload) if self.payload and payload else 0)

    def _put(self, group: GroupRow, places: Sequence[int], *, judge: bool = False, payload: bool = True) -> int:
        samples: list[LeasedSample] = []
        size = len(group.prompt)
        for index in places:
            row = group.samples[index]
            size += self._size(row, judge=judge, payload=payload or judge)
            self.full = self.full or (not judge and bool(self.granted) and self.bytes + size > self.max_bytes)
            if self.full:
                break
            if row.state != self.target:
                row.state, row.lease_id, row.appended_from = self.target, self.state.next_lease(), NEVER_EXTENDED
            row.due_ms = self.state.clock_ms() + self.state.params.lease_ttl_ms
            samples.append(leased_sample(index, row, payload=self.payload and payload, score=judge))
            self.granted.append((SampleRef(group.order, index), row.lease_id))
        if samples:
            self.bytes += size
            self.left = max(0, self.left - len(samples))
            self.groups.append(LeasedGroup(group.order, group.ordinal, 0, group.prompt, samples, judge))
        return len(samples)


def leased_sample(index: int, row: SampleRow, *, payload: bool, score: bool = False) -> LeasedSample:
    return LeasedSample(
        index,
        row.lease_id,
        row.attempt,
        row.facts(),
        row.partial,
        row.payload if payload else b"",
        row.score if score else b"",
    )
