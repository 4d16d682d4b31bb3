"""The operators' verbs of the reference store: listing samples, requeueing dead ones, importing groups."""

from __future__ import annotations

from collections.abc import Sequence

from polyhead.v1 import buffer_pb2 as pb
from services.buffer.ids import SampleRef, stamped
from services.buffer.memory_state import (
    CONSUMED,
    DEAD,
    GENERATED,
    PENDING,
    READY,
    SCORED,
    TRAINING,
    GroupRow,
    MemoryState,
    SampleRow,
)
from services.buffer.policy import deadline, live_limit
from services.buffer.records import (
    NO_ORDINAL,
    ImportedGroup,
    ImportedSample,
    Letter,
    ListedSample,
    Page,
    Requeued,
)
from services.common.errors import PreconditionError
from services.common.versions import Version

NOWHERE = -1


def list_samples(state: MemoryState, wanted: int, start: int, limit: int) -> Page:
    found = _dead(state, start) if wanted == DEAD else _others(state, wanted, start)
    return Page([each for _, each in found[:limit]], found[limit][0] if len(found) > limit else 0)


def _dead(state: MemoryState, start: int) -> list[tuple[int, ListedSample]]:
    """With their places in the order of death."""
    letters = sorted(state.letters.items(), key=lambda each: each[1].place)
    return [
        (row.place, ListedSample(ref, row.attempt, row.facts, Letter(row.error, row.died_ms, outcome(state, ref))))
        for ref, row in letters
        if row.place >= start
    ]


def _others(state: MemoryState, wanted: int, start: int) -> list[tuple[int, ListedSample]]:
    """With their serial numbers."""
    size = state.params.group_size
    return [
        (group.order * size + index, ListedSample(SampleRef(group.order, index), row.attempt, row.facts()))
        for group in state.in_order()
        if wanted == CONSUMED or not group.closed
        for index, row in enumerate(group.samples)
        if row.state == wanted and group.order * size + index >= start
    ]


def outcome(state: MemoryState, ref: SampleRef) -> int:
    """What a requeue of the sample does, or why it does nothing."""
    row, group = state.row(ref), state.groups.get(ref.order)
    if row is not None and row.state != DEAD and row.requeued:
        return pb.REQUEUE_OUTCOME_DUPLICATE
    if ref not in state.letters:
        return pb.REQUEUE_OUTCOME_GONE
    if group is None:
        return pb.REQUEUE_OUTCOME_GROUP_WENT_ON
    if group.reissued_as is not None:
        return pb.REQUEUE_OUTCOME_DUPLICATE
    if group.kept:
        return pb.REQUEUE_OUTCOME_REISSUED
    whole = group.closed or group.rejected or any(row.state in (READY, TRAINING) for row in group.samples)
    return pb.REQUEUE_OUTCOME_GROUP_WENT_ON if whole else pb.REQUEUE_OUTCOME_REQUEUED


def requeue(state: MemoryState, ref: SampleRef) -> Requeued:
    found = outcome(state, ref)
    if found in (pb.REQUEUE_OUTCOME_GONE, pb.REQUEUE_OUTCOME_GROUP_WENT_ON):
        return Requeued(found, NOWHERE)
    group = state.groups[ref.order]
    if found == pb.REQUEUE_OUTCOME_REQUEUED:
        _requeue_in_group(state, ref, group.samples[ref.index])
    elif found == pb.REQUEUE_OUTCOME_REISSUED:
        group.reissued_as = state.new_group(NO_ORDINAL, group.prompt)
        state.forget_prompt(group)
    if found != pb.REQUEUE_OUTCOME_DUPLICATE:
        state.bump("samples_requeued")
    return Requeued(found, ref.order if group.reissued_as is None else group.reissued_as)


def _requeue_in_group(state: MemoryState, ref: SampleRef, row: SampleRow) -> None:
    state.tally(row, DEAD, sign=-1)
    del state.letters[ref]
    row.state, row.attempt, row.saved, row.lost, row.requeued = PENDING, 0, 0, 0, True
    row.num_tokens, row.completion_tokens, row.finish_reason, row.versions, row.reward = 0, 0, 0, (), 0.0


def import_groups(state: MemoryState, groups: Sequence[ImportedGroup]) -> tuple[list[int], int]:
    _check_import(state, groups)
    made = [_import_group(state, each) for each in groups]
    return [group.order for group in made], sum(group.ready for group in made)


def _import_group(state: MemoryState, imported: ImportedGroup) -> GroupRow:
    group = state.groups[state.new_group(NO_ORDINAL, imported.prompt)]
    group.birth = state.published
    for index, (row, each) in enumerate(zip(group.samples, imported.samples, strict=True)):
        row.num_tokens, row.completion_tokens = each.num_tokens, each.completion_tokens
        row.finish_reason, row.versions = each.finish_reason, each.versions
        row.payload, row.score = stamped(each.payload, group.order, index), each.score
        row.blobs = each.blobs
        row.state, row.reward = (GENERATED, 0.0) if each.reward is None else (SCORED, each.reward)
        row.score_lease = 0 if each.reward is None else state.next_lease()
    state.bump("samples_imported", len(group.samples))
    state.finish(group)
    return group


def _check_import(state: MemoryState, groups: Sequence[ImportedGroup]) -> None:
    if state.published is None:
        raise PreconditionError("no version published yet", field="groups")
    if state.behind():
        raise PreconditionError(f"weights of step {state.step} are not published", field="groups")
    live, limit = state.occupied(), live_limit(state.params)
    if live + len(groups) > limit:
        raise PreconditionError(
            f"staleness bound: {live} of {limit} groups live, {len(groups)} more came", field="groups"
        )
    for number, group in enumerate(groups):
        for index, sample in enumerate(group.samples):
            _check_versions(state, sample, f"groups[{number}].samples[{index}].sample.segments")


def _check_versions(state: MemoryState, sample: ImportedSample, field: str) -> None:
    for version in (Version(epoch, step) for epoch, *steps in sample.versions for step in steps):
        fork = state.forks.get(version.epoch)
        if fork is None or version.step < fork or state.effective(version) > state.step:
            raise PreconditionError(f"{version} is no version of this run's history", field=field)
        too_old = deadline(state.effective(version), state.params.max_staleness) <= state.step
        if state.params.on_stale != "mask" and too_old:
            raise PreconditionError(
                f"{version} is older than max_staleness = {state.params.max_staleness} allows", field=field
            )
