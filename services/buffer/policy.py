"""Decisions as pure functions: staleness and deadlines, admission, the filter, and what waiting means in words.

The Lua scripts decide by the same rules; the conformance suite holds both to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from polyhead.v1 import sample_pb2
from services.buffer.ids import group_id
from services.buffer.records import RunParams, StateCount, Waiting
from services.common.errors import ConfigError
from services.common.versions import Version

REASONS = {
    "unpublished": "no version published yet",
    "below": "replica below the published version e{0}.s{1}",
    "abandoned": "replica serves a version that a recovery undid",
    "bound": "staleness bound: {0} of {1} groups live",
    "memory": "store memory",
    "prompts": "end of prompts",
    "generating": "samples in generation",
    "pending": "groups waiting for a rollout replica",
    "idle": "no sample in generation",
    "groups": "{0} of {1} groups ready: {2} samples in generation, {3} to be scored",
    "deadline": "group deadline: {0} must be trained first",
}
"""Why nothing could be leased, by code. The figures are those of `Waiting`."""


def for_memory(waiting: Waiting) -> Waiting:
    """The reason of a batch that lacks groups while none is admitted: memory, counted in groups."""
    if waiting.code != "groups":
        return waiting
    have, wanted, *_ = waiting.figures
    return Waiting("memory", (wanted - have,))


UNCOUNTED_LOSSES = 2
"""So many leases in a row may expire without a heartbeat: their answers may have been lost on the way."""

KEPT_SUBMITS = 10_000
"""Submits whose request ids are remembered, the newest ones."""


def describe(waiting: Waiting) -> tuple[str, int]:
    """The reason in words, and how many things are waited for."""
    figures = waiting.figures
    if waiting.code == "deadline":
        return REASONS["deadline"].format(group_id(figures[0])), 1
    count = figures[0] if figures else 0
    if waiting.code == "groups":
        count = figures[1] - figures[0]
    elif waiting.code == "below":
        count = 0
    return REASONS[waiting.code].format(*figures), count


def live_limit(params: RunParams) -> int:
    """Groups that may be live or consumed but unpublished at once."""
    return (params.max_staleness + 1) * params.batch_groups + params.surplus_groups


def effective_step(version: Version, forks: Mapping[int, int], epoch: int) -> int:
    """The step on today's history that is as far from its tip as `version` is, through fork points.

    For every later step t of `epoch`, ``t - effective_step(v) == steps_between(v, Version(epoch, t), forks)``
    (`services.common.versions`).
    """
    later = (forks[e] for e in range(version.epoch + 1, epoch + 1) if e in forks)
    shared = min(version.step, min(later, default=version.step))
    return 2 * shared - version.step


def deadline(effective: int, max_staleness: int) -> int:
    """The last step that may train a group whose oldest token is at the effective step."""
    return effective + 1 + max_staleness


def blocking_group(
    step: int, batch_groups: int, chosen: Sequence[int], left: Iterable[tuple[int, int, bool]]
) -> int | None:
    """The group that has to be waited for before `chosen` may be trained at `step`, or None.

    `chosen` holds deadlines (steps), `left` (deadline, order, bound) of all other live groups; a group bound to a
    later step is due there. Training is put off when the later steps could not train what is due by some deadline,
    unless waiting cannot help: all that is chosen is due no later, or all that is left is bound.
    """
    last_chosen = max(chosen)
    first: int | None = None
    rows = sorted(left)
    for count, (due, order, bound) in enumerate(rows, start=1):
        if due >= last_chosen:
            return None
        if first is None and not bound:
            first = order
        at_last_of_due = count == len(rows) or rows[count][0] != due
        if at_last_of_due and count > (due - step) * batch_groups and first is not None:
            return first
    return None


def has_zero_variance(rewards: Sequence[float]) -> bool:
    """True when all rewards are equal: the group carries no gradient under GRPO."""
    return max(rewards) == min(rewards)


def merge_versions(versions: Iterable[Version]) -> tuple[tuple[int, int, int], ...]:
    """(epoch, lowest step, highest step), by epoch."""
    ranges: dict[int, tuple[int, int]] = {}
    for epoch, step in versions:
        low, high = ranges.get(epoch, (step, step))
        ranges[epoch] = (min(low, step), max(high, step))
    return tuple((epoch, *ranges[epoch]) for epoch in sorted(ranges))


def length_bias(counts: Iterable[StateCount]) -> dict[str, float]:
    """Mean completion length of dropped samples over that of consumed ones, by reason, samples without tokens aside."""
    trained_states = (sample_pb2.SAMPLE_STATE_CONSUMED, sample_pb2.SAMPLE_STATE_RETIRED)
    rows = list(counts)
    trained = [row for row in rows if row.state in trained_states]
    tokens, lengths = sum(row.completion_tokens for row in trained), sum(row.lengths for row in trained)
    if not tokens:
        return {}
    return {
        sample_pb2.DropReason.Name(row.drop_reason).removeprefix("DROP_REASON_"): (
            row.completion_tokens / row.lengths / (tokens / lengths)
        )
        for row in rows
        if row.state == sample_pb2.SAMPLE_STATE_DROPPED and row.lengths
    }


def check_same_run(old: RunParams, new: RunParams) -> None:
    """Raises ConfigError when `new` cannot continue what was begun with `old`."""
    if old.group_size != new.group_size:
        raise ConfigError(
            f"is {new.group_size}, but the run was begun with {old.group_size}", field="batch.n_samples_per_prompt"
        )
    if old.dataset_digest != new.dataset_digest:
        raise ConfigError(
            f"the data set is {new.dataset_digest}, but the run was begun with {old.dataset_digest}",
            field="data.prompt_data",
        )
    if old.seed != new.seed:
        raise ConfigError(f"is {new.seed}, but the run was begun with {old.seed}", field="data.seed")
