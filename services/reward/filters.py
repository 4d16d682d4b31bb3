"""A user's dynamic-sampling filter, in slime's signature: ``fn(args, group) -> bool | DynamicFilterOutput``."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from services.common.errors import ConfigError
from services.common.plugins import load_function
from services.reward.scorers.base import Item
from services.reward.scorers.user import Sample, to_sample

FIELD = "batch.dynamic_sampling_filter"


class ScoredItem(NamedTuple):
    """A scored sample of a group to be judged, as it travels to a pool process."""

    item: Item
    reward: float | None
    """None in a waiting group, as long as it is not scored."""
    parts: dict[str, float]


class GroupItem(NamedTuple):
    """A whole group, in index order."""

    group_id: str
    samples: list[ScoredItem]


class WaitingItem(NamedTuple):
    """Unfinished groups that wait, oldest first, for the user's buffer filter."""

    name: str
    groups: list[list[ScoredItem]]
    num_samples: int
    """Groups of one step."""


class Judgement(NamedTuple):
    """What the filter said. `reason` is a word for the counter of dropped groups."""

    keep: bool
    reason: str
    keep_when_insufficient: bool


@dataclass
class DynamicFilterOutput:
    """slime's richer result of a filter; `reason` is counted when the group is dropped."""

    keep: bool
    reason: str | None = None
    keep_when_insufficient: bool = False


class Reward(float):
    """A reward as filters read it: a number, with the parts a reward function returned beside it."""

    parts: Mapping[str, float]

    def __getitem__(self, name: str) -> float:
        return float(self) if name in ("score", "reward") else self.parts[name]


class GroupFilter:
    """Calls the function with whole groups, and runs it to its end when it is async."""

    def __init__(self, path: str, search: Sequence[Path], args: Mapping[str, Any]) -> None:
        """Raises ConfigError when the function does not import or cannot be called with (args, group)."""
        self._function = load_function(path, field=FIELD, search=search)
        self._args = SimpleNamespace(**args)
        try:
            inspect.signature(self._function).bind(None, None)
        except ValueError:  # some builtins have no signature
            return
        except TypeError as error:
            raise ConfigError(f"{path} cannot be called as fn(args, group): {error}", field=FIELD) from None

    def __call__(self, group: GroupItem) -> Judgement:
        value = self._function(self._args, [to_scored_sample(ScoredItem(*each)) for each in group.samples])
        return _to_judgement(asyncio.run(_await(value)) if inspect.isawaitable(value) else value)


def to_scored_sample(scored: ScoredItem) -> Sample:
    """The sample with its reward, as filters see it."""
    sample = to_sample(Item(*scored.item))
    if scored.reward is not None:
        sample.reward = reward = Reward(scored.reward)
        reward.parts = scored.parts
    return sample


def _to_judgement(value: Any) -> Judgement:
    """Raises TypeError for what is neither a truth value nor has `keep`."""
    if hasattr(value, "keep"):
        reason = getattr(value, "reason", None) or "unnamed"
        return Judgement(bool(value.keep), str(reason), bool(getattr(value, "keep_when_insufficient", False)))
    if not hasattr(value, "__bool__") or value is None:
        raise TypeError(f"the filter returned {value!r:.80}, neither a bool nor a DynamicFilterOutput")
    return Judgement(bool(value), "unnamed", keep_when_insufficient=False)


async def _await(value: Any) -> Any:
    return await value
