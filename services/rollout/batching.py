"""Cutting long lists into messages that fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def batches(items: Iterable[tuple[T, int]], *, max_items: int, max_bytes: int) -> Iterator[list[T]]:
    """Groups (item, bytes) in order, each group within both limits; an item over the limit travels alone."""
    batch: list[T] = []
    size = 0
    for item, item_bytes in items:
        if batch and (len(batch) == max_items or size + item_bytes > max_bytes):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item_bytes
    if batch:
        yield batch
