"""What a scorer is: a callable that turns one item into a verdict, built inside a pool process from its name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import index
from typing import Any, NamedTuple, Protocol

# slime's name for a scorer's own reward among the entries of its dict.
_OWN_KEY = "score"
_SPANS = "spans"


class Item(NamedTuple):
    """One sample to score, as it travels to a pool process. Every field is a plain value."""

    sample_id: str
    prompt: str
    """Plain text; empty when `messages_json` is set."""
    messages_json: str
    """A JSON list of chat messages; empty for a plain prompt."""
    completion: str
    label: str
    metadata_json: str
    """A JSON object, or empty."""
    status: str
    """slime's word for how the completion ended: "completed", "truncated", "aborted", "failed"."""
    completion_tokens: int
    group_index: int
    sample_index: int
    start_rollout_id: int = -1
    """The step whose weights made its first token, of a sample that later weights finished; else -1."""
    token_ids: bytes = b""
    """int32, prompt and completion, where they are wanted and known: of samples with one segment."""


class WholeItem(NamedTuple):
    """All living samples of a group, in index order, to be scored together."""

    group_id: str
    items: list[Item]


class RewardSpan(NamedTuple):
    """A reward for the completion tokens [start, end)."""

    start: int
    end: int
    reward: float


class Verdict(NamedTuple):
    """A score. `reward`, the parts and the rewards of spans are finite."""

    reward: float
    parts: dict[str, float]
    spans: tuple[RewardSpan, ...] = ()
    """Process rewards, beside the reward of the whole."""


class SampleError(Exception):
    """This sample cannot be scored; the message says why, in one line. It never becomes a number."""


class ScorerUnavailableError(Exception):
    """What the scorer needs is not to be had at present: not the sample's fault."""


class Scorer(Protocol):
    """Raises SampleError, or anything else, when the item has no score."""

    def __call__(self, item: Item) -> Verdict: ...


class WholeScorer(Protocol):
    """Scores the samples of a group together, one verdict each, in order. Raises when any of them has none."""

    def __call__(self, items: Sequence[Item]) -> list[Verdict]: ...


def finite(value: Any, what: str) -> float:
    """`value` as a float. Raises SampleError naming `what` when it is not a finite number.

    Python and NumPy numbers, booleans and one-element tensors are numbers; strings and None are not.
    """
    if not hasattr(value, "__float__"):
        raise SampleError(f"{what} is {_kind(value)}, not a number")
    try:
        number = float(value)
    except Exception as error:  # a tensor of several elements, a user's own class
        raise SampleError(f"{what} is {_kind(value)}, not a number") from error
    if not math.isfinite(number):
        raise SampleError(f"{what} is {number}, not a finite number")
    return number


def to_verdict(value: Any, reward_key: str = "") -> Verdict:
    """Reads what a user's function returned: a number, or a dict with the reward under `reward_key`.

    Without a key, that is "score" or "reward". "spans" is a list of [start, end, reward]. The other entries of a dict
    become parts when they are numbers; texts and nested values are left out.
    Raises SampleError for anything else, NaN, infinities and None included, and for a number where a key is asked for.
    """
    if not isinstance(value, Mapping):
        if reward_key:
            raise SampleError(f"the returned reward is {_kind(value)}, not a dict with {reward_key!r}")
        return Verdict(finite(value, "the returned reward"), {})
    wanted = (reward_key,) if reward_key else ("score", "reward")
    key = next((name for name in wanted if name in value), None)
    if key is None:
        missing = f"no {reward_key!r}" if reward_key else 'neither "score" nor "reward"'
        raise SampleError(f"the returned dict has {missing}")
    parts = {
        str(name): finite(part, f"the returned dict's {name!r}")
        for name, part in value.items()
        if name != key and hasattr(part, "__float__")
    }
    return Verdict(finite(value[key], f"the returned dict's {key!r}"), parts, to_spans(value.get(_SPANS)))


def to_spans(value: Any) -> tuple[RewardSpan, ...]:
    """Reads process rewards, [[start, end, reward], ...] over completion tokens; None is none.

    Raises SampleError for anything else: what is no list, bounds that are no whole numbers or 0 <= start < end not
    true of them, a reward that is not finite. Whether the completion is that long is checked by `check_spans`.
    """
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise SampleError(f"{_SPANS!r} is {_kind(value)}, not a list of [start, end, reward]")
    return tuple(_to_span(place, each) for place, each in enumerate(value))


def _to_span(place: int, value: Any) -> RewardSpan:
    what = f"{_SPANS}[{place}]"
    if not isinstance(value, list | tuple) or len(value) != len(RewardSpan._fields):
        raise SampleError(f"{what} is not [start, end, reward]")
    start, end = (_whole(bound, what) for bound in value[:2])
    if not 0 <= start < end:
        raise SampleError(f"{what} is from {start} to {end}")
    return RewardSpan(start, end, finite(value[2], what))


def _whole(value: Any, what: str) -> int:
    """NumPy's whole numbers included."""
    try:
        return index(value)
    except TypeError:
        raise SampleError(f"{what} has a bound that is {_kind(value)}, not a whole number") from None


def check_spans(verdict: Verdict, completion_tokens: int) -> None:
    """Raises SampleError for a span that ends behind the completion."""
    for place, span in enumerate(verdict.spans):
        if span.end > completion_tokens:
            raise SampleError(
                f"{_SPANS}[{place}] ends at {span.end}, and the completion has {completion_tokens} tokens"
            )


def keyed(verdict: Verdict, reward_key: str) -> Verdict:
    """A built-in scorer's verdict with its part `reward_key` as the reward, and the scorer's own as part "score".

    Raises SampleError when it has no such part.
    """
    if reward_key in ("", _OWN_KEY):
        return verdict
    if reward_key not in verdict.parts:
        raise SampleError(
            f"the verdict has no part {reward_key!r}; it has {', '.join(sorted(verdict.parts)) or 'none'}"
        )
    parts = {name: part for name, part in verdict.parts.items() if name != reward_key}
    return verdict._replace(reward=verdict.parts[reward_key], parts={**parts, _OWN_KEY: verdict.reward})


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
