"""The trainer's verbs of the reference store: batches, commits, checkpoints, recovery."""

from __future__ import annotations

from polyhead.v1 import sample_pb2
from services.buffer import policy
from services.buffer.memory_state import CONSUMED, DEAD, READY, RETIRED, TRAINING, Batch, GroupRow, MemoryState
from services.buffer.records import NO_ORDINAL, Recovered, Waiting, WatermarkRecord
from services.common.errors import ConfigError, PreconditionError
from services.common.versions import Version


def plan_batch(state: MemoryState) -> tuple[list[GroupRow], Waiting | None]:
    """The groups the next step would be trained on, in position order, or why there are none yet."""
    step, size = state.step + 1, state.params.batch_groups
    recorded = state.batches[step].orders if step in state.batches else []
    chosen = [state.groups[order] for order in recorded if order in state.groups]
    chosen = [group for group in chosen if group.bound_step == step]
    surplus = _surplus(state, step)
    if not chosen or len(chosen) < len(recorded):
        ready = (group for group in state.live() if group.ready and group.place not in surplus)
        by_deadline = sorted(ready, key=lambda group: (state.deadline(group), group.place))
        chosen += by_deadline[: max(0, size - len(chosen))]
        if len(chosen) < size:
            return [], state.why_no_batch(len(chosen))
    if state.params.on_stale == "wait":
        left = [group for group in state.live() if group not in chosen and group.place not in surplus]
        blocking = policy.blocking_group(step, size, *_deadlines(state, chosen, left))
        if blocking is not None:
            return [], Waiting("deadline", (next(group.order for group in left if group.place == blocking),))
    return chosen, None


def _surplus(state: MemoryState, step: int) -> set[int]:
    if not policy.over_sampled(state.params):
        return set()
    live = ((group.bound_step or state.deadline(group), group.place) for group in state.live())
    return policy.surplus(step, state.params.batch_groups, live)


def _deadlines(
    state: MemoryState, chosen: list[GroupRow], left: list[GroupRow]
) -> tuple[list[int], list[tuple[int, int, bool]]]:
    """Deadlines as `policy.blocking_group` takes them: a bound group is due at its step."""
    return (
        [group.bound_step or state.deadline(group) for group in chosen],
        [(group.bound_step or state.deadline(group), group.place, bool(group.bound_step)) for group in left],
    )


def close_stale(state: MemoryState) -> int:
    """Drops groups that no later step may train, by the name of the cause. Returns how many."""
    surplus, stale = sample_pb2.DROP_REASON_SURPLUS, sample_pb2.DROP_REASON_STALE
    live = [group for group in state.live() if not group.bound_step] if state.params.on_stale != "mask" else []
    closed = _close_over(state, live, surplus if policy.over_sampled(state.params) else stale)
    rejected = [group for group in state.groups.values() if group.rejected and not group.closed]
    return closed + _close_over(state, rejected, surplus)


def _close_over(state: MemoryState, groups: list[GroupRow], reason: int) -> int:
    over = [group for group in groups if state.deadline(group) <= state.step]
    for group in sorted(over, key=lambda group: (state.deadline(group), group.order)):
        state.drop(group, reason)
    return len(over)


def leased_batch(state: MemoryState, epoch: int, step: int) -> Batch | None:
    """The batch this epoch has leased for the step already."""
    state.fence(epoch)
    if epoch not in state.forks:
        raise PreconditionError(f"epoch {epoch} has to Recover first", field="epoch")
    batch = state.batches.get(step)
    if batch and not batch.committed and batch.epoch == epoch:
        return batch
    if step != state.step + 1:
        raise PreconditionError(f"{step} does not follow the last committed step {state.step}", field="step")
    return None


def record_batch(state: MemoryState, epoch: int, step: int, chosen: list[GroupRow]) -> Batch:
    for group in chosen:
        for row in group.alive:
            row.state = TRAINING
    batch = Batch(epoch, state.next_lease(), [group.order for group in chosen])
    state.filtered = 0
    state.batches[step] = batch
    return batch


def commit_step(state: MemoryState, epoch: int, step: int, lease_id: int, *, trained: bool) -> bool:
    state.fence(epoch)
    batch = state.batches.get(step)
    ours = batch is not None and batch.epoch == epoch and batch.lease_id == lease_id
    if ours and batch is not None and batch.committed:
        return False
    if step != state.step + 1:
        raise PreconditionError(f"{step} does not follow the last committed step {state.step}", field="step")
    if not ours or batch is None:
        raise PreconditionError(f"no batch of step {step} was leased under {lease_id}", field="batch_lease_id")
    state.step, batch.committed = step, True
    groups = [state.groups[order] for order in batch.orders]
    for group in groups:
        if not trained:
            state.drop(group, sample_pb2.DROP_REASON_INVALID)
            continue
        for row in group.alive:
            row.state = CONSUMED
            state.tally(row, CONSUMED)
        state.close_ordinal(group)
    state.drop_rejected(before=max(group.place for group in groups))
    # A step that was skipped is gone for the groups that wait, too.
    state.trained[step] = len(batch.orders)
    return True


def publish_version(state: MemoryState, version: Version) -> None:
    state.fence(version.epoch)
    if version.epoch not in state.forks:
        raise PreconditionError(f"epoch {version.epoch} has to Recover first", field="version.epoch")
    if not state.forks[version.epoch] <= version.step <= state.step:
        raise PreconditionError(f"step {version.step} is no step of this epoch's history", field="version.step")
    if state.published is not None and version < state.published:
        raise PreconditionError(f"{version} is older than the published {state.published}", field="version")
    state.published = state.floor = version
    state.trained = {step: groups for step, groups in state.trained.items() if step > version.step}
    # What the last step left is issued again before anything new is: the next lease may be a replica's.
    close_stale(state)


def watermark(state: MemoryState, epoch: int, step: int) -> WatermarkRecord:
    state.fence(epoch)
    if not state.retired_step <= step <= state.step:
        raise PreconditionError(
            f"{step} is not between the retired step {state.retired_step} and the last step {state.step}", field="step"
        )
    closed = {ordinal for ordinal, at in state.closed_ordinals.items() if at <= step}
    low_water = state.low_water
    while low_water in closed:
        closed.discard(low_water)
        low_water += 1
    return WatermarkRecord(step, low_water, tuple(sorted(closed)), state.params.dataset_digest, state.params.seed)


def confirm_checkpoint(state: MemoryState, epoch: int, oldest_kept_step: int) -> int:
    state.fence(epoch)
    if oldest_kept_step > state.step:
        raise PreconditionError(
            f"{oldest_kept_step} is above the last committed step {state.step}", field="oldest_kept_step"
        )
    retired = _retire_steps(state, oldest_kept_step)
    while state.closed_ordinals.get(state.low_water, oldest_kept_step + 1) <= oldest_kept_step:
        del state.closed_ordinals[state.low_water]
        state.low_water += 1
    return retired


def _retire_steps(state: MemoryState, last: int) -> int:
    """Retires what the steps up to `last` consumed. Returns the number of samples."""
    retired = 0
    for step in sorted(step for step in state.batches if state.retired_step < step <= last):
        for group in _kept(state, state.batches.pop(step)):
            retired += _retire_consumed(state, group)
    state.retired_step = max(state.retired_step, last)
    return retired


def _kept(state: MemoryState, batch: Batch) -> list[GroupRow]:
    """The groups of a batch, but for those that a checkpoint's watermark has retired."""
    return [state.groups[order] for order in batch.orders if order in state.groups]


def _retire_consumed(state: MemoryState, group: GroupRow) -> int:
    rows = [row for row in group.samples if row.state == CONSUMED]
    for row in rows:
        state.tally(row, CONSUMED, sign=-1)
        state.tally(row, RETIRED)
    if rows:
        del state.groups[group.order]
    return len(rows)


def recover(state: MemoryState, epoch: int, step: int, mark: WatermarkRecord | None) -> Recovered:
    state.fence(epoch)
    if epoch in state.forks:
        if state.forks[epoch] == step == state.step:
            return Recovered(state.answers[epoch], _bound_steps(state))
        raise PreconditionError(f"epoch {epoch} has recovered step {state.forks[epoch]} already", field="step")
    _check_watermark(state, mark)
    if step > state.step and mark is None:
        raise PreconditionError(
            f"{step} is above the store's last step {state.step}, and no watermark came", field="step"
        )
    if step < state.retired_step:
        raise PreconditionError(f"{step} is below the retired step {state.retired_step}", field="step")
    state.forks[epoch] = step
    returned = _undo_lease(state) + _undo_commits(state, step)
    if mark is not None and step > state.step:
        _adopt(state, mark)
    state.step = step
    if state.published is not None and state.effective(state.published) != state.published.step:
        state.published = None
    state.floor = state.published or Version(epoch, step)
    state.trained = {at: groups for at, groups in state.trained.items() if at <= step}
    _drop_late_replays(state)
    state.answers[epoch] = returned
    return Recovered(returned, _bound_steps(state))


def _check_watermark(state: MemoryState, mark: WatermarkRecord | None) -> None:
    if mark is None:
        return
    if mark.dataset_digest != state.params.dataset_digest:
        raise ConfigError(
            f"the checkpoint was made with data set {mark.dataset_digest}, this one is {state.params.dataset_digest}",
            field="data.prompt_data",
        )
    if mark.seed != state.params.seed:
        raise ConfigError(f"the checkpoint was made with seed {mark.seed}, not {state.params.seed}", field="data.seed")


def _undo_lease(state: MemoryState) -> int:
    groups = [group for group in state.live() if any(row.state == TRAINING for row in group.alive)]
    for group in groups:
        for row in group.alive:
            row.state = READY
    return len(groups)


def _undo_commits(state: MemoryState, step: int) -> int:
    returned = 0
    for at in range(step + 1, state.step + 1):
        for group in _kept(state, state.batches[at]):
            rows = [row for row in group.samples if row.state == CONSUMED]
            for row in rows:
                row.state = READY
                state.tally(row, CONSUMED, sign=-1)
            if rows:
                group.closed, group.bound_step = False, at
                state.closed_ordinals.pop(group.ordinal, None)
                returned += 1
        state.batches[at].committed = False
    for ordinal, at in state.closed_ordinals.items():
        state.closed_ordinals[ordinal] = min(at, step)
    return returned


def _adopt(state: MemoryState, mark: WatermarkRecord) -> None:
    """Takes over what a checkpoint knows and an older store does not. Nothing before it can be replayed any more."""
    _retire_steps(state, mark.step)
    closed = set(mark.closed)
    for group in list(state.in_order()):
        covered = group.ordinal != NO_ORDINAL and (group.ordinal < mark.low_water or group.ordinal in closed)
        if group.bound_step <= mark.step:
            group.bound_step = 0
        if group.closed or not covered:
            continue
        for row in group.samples:
            if row.state != DEAD:
                row.state = RETIRED
                state.tally(row, RETIRED)
        del state.groups[group.order]
    state.cursor = max(state.cursor, mark.low_water)
    state.low_water = max(state.low_water, mark.low_water)
    state.closed_ordinals |= dict.fromkeys(closed, mark.step)
    state.closed_ordinals = {o: at for o, at in state.closed_ordinals.items() if o >= state.low_water}


def _drop_late_replays(state: MemoryState) -> None:
    """A group that its recorded step may no longer train, by the new history, is generated anew."""
    if state.params.on_stale == "mask":
        return
    for at in sorted(state.batches):
        for group in _kept(state, state.batches[at]):
            if group.bound_step == at and state.deadline(group) < at:
                state.drop(group, sample_pb2.DROP_REASON_STALE)


def _bound_steps(state: MemoryState) -> tuple[int, ...]:
    return tuple(sorted({group.bound_step for group in state.live() if group.bound_step}))
