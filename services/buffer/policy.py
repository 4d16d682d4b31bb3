"""Decisions as pure functions: staleness and deadlines, admission, the filter, and what waiting means in words.

The Lua scripts decide by the same rules; the conformance suite holds both to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from polyhead.v1 import buffer_pb2 as pb
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
    "push": "weights of step {0} are not published: a group started now would be too old for the next step",
    "memory": "store memory",
    "prompts": "end of prompts",
    "generating": "samples in generation",
    "pending": "groups waiting for a rollout replica",
    "idle": "no sample in generation",
    "groups": "{0} of {1} groups ready: {2} samples in generation, {3} to be scored",
    "filtered": "{0} of {1} groups ready: the filter has dropped {2} groups since the last batch",
    "deadline": "group deadline: {0} must be trained first",
}
"""Why nothing could be leased, by code. The figures are those of `Waiting`."""

VERSION_REFUSED = frozenset({"below", "abandoned"})
"""The reasons that only another weight version ends."""


def for_memory(waiting: Waiting) -> Waiting:
    """The reason of a batch that lacks groups while none is admitted: memory, counted in groups."""
    if waiting.code != "groups":
        return waiting
    have, wanted, *_ = waiting.figures
    return Waiting("memory", (wanted - have,))


UNCOUNTED_LOSSES = 2
"""So many leases in a row may expire without a heartbeat: their answers may have been lost on the way."""

LEASES_PER_MS = 16
"""How fast ids of leases advance with the clock from one new run to the next: more than are granted in the long run."""

KEPT_SUBMITS = 10_000
"""Submits whose request ids are remembered, the newest ones."""

KEPT_DEAD = 1_000
"""Dead letters that can be read and requeued, the newest ones."""


def describe(waiting: Waiting) -> tuple[str, int]:
    """The reason in words, and how many things are waited for."""
    figures = waiting.figures
    if waiting.code == "deadline":
        return REASONS["deadline"].format(group_id(figures[0])), 1
    count = figures[0] if figures else 0
    if waiting.code in ("groups", "filtered"):
        count = figures[1] - figures[0]
    elif waiting.code in ("below", "push"):
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
    later = (fork for e, fork in forks.items() if version.epoch < e <= epoch)
    shared = min(version.step, min(later, default=version.step))
    return 2 * shared - version.step


def deadline(effective: int, max_staleness: int) -> int:
    """The last step that may train a group whose oldest token is at the effective step."""
    return effective + 1 + max_staleness


REISSUED_REASONS = (sample_pb2.DROP_REASON_STALE, sample_pb2.DROP_REASON_SURPLUS)
"""Groups dropped for these did nothing wrong: their prompts are issued again, in the places that they had."""


def over_sampled(params: RunParams) -> bool:
    """Whether more groups are admitted than can be trained in time, and the surplus is to be told by name."""
    return params.surplus_groups > 0 and params.on_stale == "wait"


def speculative(params: RunParams) -> bool:
    """Whether a group that a filter rejects may lie behind the last one of its step: then the verdict, which is about
    weights that will not be the next step's, does not count.
    """
    return over_sampled(params) and params.max_staleness == 0


def surplus(step: int, batch_groups: int, live: Iterable[tuple[int, int]]) -> set[int]:
    """Places of the groups that cannot be trained in time while those before them are.

    `live` holds (deadline, place in the order of issue). In that order, and not in the order of arrival, groups are
    assigned to the steps until their deadlines: long groups do not lose their turn to short ones. When a group before
    it is dropped, a surplus group moves up.
    """
    assigned, left_over = 0, set()
    for due, place in sorted(live):
        if assigned < (due - step + 1) * batch_groups:
            assigned += 1
        else:
            left_over.add(place)
    return left_over


def blocking_group(
    step: int, batch_groups: int, chosen: Sequence[int], left: Iterable[tuple[int, int, bool]]
) -> int | None:
    """The place of the group that has to be waited for before `chosen` may be trained at `step`, or None.

    `chosen` holds deadlines (steps), `left` (deadline, place, bound) of all other live groups; a group bound to a
    later step is due there. Training is put off when the later steps could not train what is due by some deadline,
    unless waiting cannot help: all that is chosen is due no later, or all that is left is bound.
    """
    last_chosen = max(chosen)
    first: int | None = None
    rows = sorted(left)
    for count, (due, place, bound) in enumerate(rows, start=1):
        if due >= last_chosen:
            return None
        if first is None and not bound:
            first = place
        at_last_of_due = count == len(rows) or rows[count][0] != due
        if at_last_of_due and count > (due - step) * batch_groups and first is not None:
            return first
    return None


MAX_PARTIALS = 1024
"""Waiting groups that a user's buffer filter gets to see at once, the oldest ones."""

KEPT_REASONS = 64
"""Reasons of filters that are counted apart; further ones are counted together."""

FILTER_REASONS = (sample_pb2.DROP_REASON_ZERO_VARIANCE, sample_pb2.DROP_REASON_FILTERED)


def reason_counter(reason: str, counters: Iterable[str]) -> str:
    """The counter of a filter's reason, given the counters there are."""
    name = f"filter.drop_{reason}"
    known = [counter for counter in counters if counter.startswith("filter.drop_")]
    return name if name in known or len(known) < KEPT_REASONS else "filter.drop_other"


def verdict_drops(verdict: int, filtered: int, refill_groups: int) -> bool:
    """Whether a filter's verdict closes the group, when `filtered` groups were dropped since the last batch."""
    if verdict == pb.GROUP_VERDICT_KEEP_IF_INSUFFICIENT:
        return filtered < refill_groups
    return verdict == pb.GROUP_VERDICT_DROP


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
