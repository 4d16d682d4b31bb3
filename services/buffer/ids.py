"""Ids of groups and samples: made by the store from counters, and read back strictly, so that a key is never built
from a client's text."""

from __future__ import annotations

import re
from typing import NamedTuple

from services.common.errors import InvalidArgumentError

_SAMPLE_ID = re.compile(r"g(\d{8,15})-(\d{3,6})")


class SampleRef(NamedTuple):
    """A sample by its group's place in the order of issue and its own place in the group."""

    order: int
    index: int  # type: ignore[assignment]


def group_id(order: int) -> str:
    """``g00000012``"""
    return f"g{order:08d}"


def sample_id(order: int, index: int) -> str:
    """``g00000012-003``"""
    return f"g{order:08d}-{index:03d}"


def stamped(payload: bytes, order: int, index: int) -> bytes:
    """A serialized Sample that came without ids, with those of its place: fields 1 and 2 of the message."""
    sample, group = sample_id(order, index).encode(), group_id(order).encode()
    return payload + bytes([10, len(sample)]) + sample + bytes([18, len(group)]) + group


def parse_sample_id(text: str, field: str) -> SampleRef:
    """Inverse of `sample_id`. Raises InvalidArgumentError, naming `field`, for anything it would not write."""
    if match := _SAMPLE_ID.fullmatch(text):
        ref = SampleRef(int(match[1]), int(match[2]))
        if sample_id(*ref) == text:
            return ref
    raise InvalidArgumentError(f"{text[:40]!r} is not a sample id", field=field)
