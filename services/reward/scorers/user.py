"""A user's reward function, in slime's signatures: ``[async] def fn(args, sample, **kwargs) -> float | dict``."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson

from services.common.errors import ConfigError
from services.common.plugins import load_function
from services.reward.scorers.base import Item, SampleError, Verdict, to_verdict
from services.reward.scorers.builtin import NAMES

FIELD = "reward.scorer"


class Status(StrEnum):
    """How a completion ended, in slime's words."""

    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass
class Sample:
    """What the function sees, under slime's field names."""

    group_index: int
    index: int
    prompt: str | list[dict[str, Any]]
    """Plain text, or a list of chat messages."""
    response: str
    response_length: int
    """In tokens; 0 when the score was asked for without a generation."""
    label: str | None
    status: Status
    metadata: dict[str, Any] = dataclass_field(default_factory=dict)
    reward: float | None = None
    """None until it is scored."""
    token_ids: bytes = dataclass_field(default=b"", repr=False)

    @property
    def tokens(self) -> list[int]:
        """The prompt's and the completion's, with `reward.send_tokens`; of a sample with several segments none."""
        return memoryview(self.token_ids).cast("i").tolist()

    def get_reward_value(self, args: Any) -> float | None:
        return self.reward


class UserFunction:
    """A function of the user's, which is run to its end when it is async. All its calls share one event loop."""

    def __init__(self, path: str, search: Sequence[Path], args: Mapping[str, Any], form: str, field: str) -> None:
        """`form` is how it is called, "fn(args, sample)". Raises ConfigError when it does not import or fit that."""
        self._function = load_function(path, field=field, search=search)
        self._args = SimpleNamespace(**args)
        _check_signature(self._function, path, form, field)
        self._runner = asyncio.Runner()

    def __call__(self, *arguments: Any) -> Any:
        value = self._function(self._args, *arguments)
        return self._wait(value) if inspect.isawaitable(value) else value

    def _wait(self, value: Any) -> Any:
        try:
            return self._runner.run(value if inspect.iscoroutine(value) else _await(value))
        except BaseException as error:
            # sys.exit tears the loop down in the middle of its work: the next call gets a new one.
            if not isinstance(error, Exception):
                self._runner = asyncio.Runner()
            raise


class UserScorer:
    """Scores sample by sample."""

    def __init__(
        self, path: str, search: Sequence[Path], args: Mapping[str, Any], reward_key: str = "", field: str = FIELD
    ) -> None:
        """Raises ConfigError when the function does not import or cannot be called with (args, sample)."""
        if "." not in path and ":" not in path:
            raise ConfigError(
                f"unknown scorer {path!r}: known are {', '.join(NAMES)}, each with boxed_ before it, "
                "and dotted paths, pkg.mod:fn",
                field=field,
            )
        self._function = UserFunction(path, search, args, "fn(args, sample)", field)
        self._reward_key = reward_key

    def __call__(self, item: Item) -> Verdict:
        return to_verdict(self._function(to_sample(item)), self._reward_key)


class UserWholeScorer:
    """Scores the samples of a group together: ``[async] def fn(args, samples, **kwargs) -> list[float | dict]``."""

    def __init__(self, path: str, search: Sequence[Path], args: Mapping[str, Any], reward_key: str = "") -> None:
        """Raises ConfigError when the function does not import or cannot be called with (args, samples)."""
        self._function = UserFunction(path, search, args, "fn(args, samples)", FIELD)
        self._reward_key = reward_key

    def __call__(self, items: Sequence[Item]) -> list[Verdict]:
        """Raises SampleError for what is no list, one of another length, and one with anything that is no score."""
        returned = self._function([to_sample(item) for item in items])
        if isinstance(returned, str | bytes | Mapping) or not (
            hasattr(returned, "__len__") and hasattr(returned, "__iter__")
        ):
            raise SampleError(f"{returned!r:.80} was returned for a group, not a list")
        if len(returned) != len(items):
            raise SampleError(f"{len(returned)} rewards were returned for a group of {len(items)} samples")
        return [self._verdict(item, value) for item, value in zip(items, returned, strict=True)]

    def _verdict(self, item: Item, value: Any) -> Verdict:
        try:
            return to_verdict(value, self._reward_key)
        except SampleError as error:
            raise SampleError(f"{item.sample_id}: {error}") from None


def _check_signature(function: Callable[..., Any], path: str, form: str, field: str) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some builtins have none
        return
    try:
        signature.bind(*[None] * len(form.split(",")))
    except TypeError as error:
        raise ConfigError(f"{path} cannot be called as {form}: {error}", field=field) from None


def to_sample(item: Item) -> Sample:
    """The item as users' functions see it."""
    metadata = orjson.loads(item.metadata_json) if item.metadata_json else {}
    if item.start_rollout_id >= 0:
        metadata.setdefault("start_rollout_id", item.start_rollout_id)
    return Sample(
        group_index=item.group_index,
        index=item.sample_index,
        prompt=orjson.loads(item.messages_json) if item.messages_json else item.prompt,
        response=item.completion,
        response_length=item.completion_tokens,
        label=item.label or None,
        status=Status(item.status),
        metadata=metadata,
        token_ids=item.token_ids,
    )


async def _await(value: Any) -> Any:
    return await value
