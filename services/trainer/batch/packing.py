"""Packs sequences of any length into one row without padding, computing a prompt that several of them share once.

A packed row is a set of tokens; a *sequence* is a list of indices into it. Two samples of the same prompt list the
same indices for the prompt and their own for the completion, so that the prompt's tokens pass through the linear
layers once (with 8 short completions per prompt that halves the work). Only attention sees sequences: it gathers them
into blocks of similar length, and each is causal within itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Sequences share an attention block when the shortest has at least this share of the longest's tokens ...
BLOCK_FILL = 0.75
# ... or is at most this many tokens shorter.
BLOCK_SLACK = 16


@dataclass(frozen=True, slots=True)
class PackItem:
    """One segment, ready to be packed. Per-token arrays hold the trained tokens only, n of them."""

    token_ids: NDArray[np.int32]
    """The tokens that are fed: up to, and without, the last trained one."""
    prompt_length: int
    predict: NDArray[np.int64]
    """[n]: which fed token predicts each trained one."""
    targets: NDArray[np.int32]
    """[n]: the trained tokens."""
    rollout_logprobs: NDArray[np.float32]
    fresh: NDArray[np.bool_]
    """[n]: sampled by the very weights about to be trained."""
    weight: float
    """Of each of its tokens in the loss."""
    temperature: float
    sample_row: int
    """Which sample of the optimizer step it belongs to."""

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch: T packed tokens, of which n predict a trained token."""

    token_ids: NDArray[np.int64]
    """[T]"""
    position_ids: NDArray[np.int64]
    """[T]: from 0 in each sequence."""
    blocks: tuple[NDArray[np.int64], ...]
    """Each [sequences, longest]: indices into the packed tokens, a shorter row filled with its last one."""
    slots: NDArray[np.int64]
    """[T]: where each token stands in the concatenation of the flattened blocks."""
    order: NDArray[np.int64]
    """Indices into the packed tokens, sequence after sequence: longer than T where they share prompts."""
    places: NDArray[np.int64]
    """[T]: where each token stands in `order`."""
    lengths: NDArray[np.int32]
    """[sequences]: what they have of `order`."""
    predict: NDArray[np.int64]
    """[n]: which packed token predicts each trained one."""
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]
    """[n]: the loss is the sum of weight * token loss over all micro-batches of the optimizer step."""
    rollout_logprobs: NDArray[np.float32]
    temperatures: NDArray[np.float32]
    fresh: NDArray[np.bool_]
    sample_rows: NDArray[np.int64]
    sequences: NDArray[np.int64]
    """[n]: which item of this micro-batch, from 0."""
    sequence_count: int
    advantages: NDArray[np.float32]
    """[n]: 0 until they are known."""
    old_logprobs: NDArray[np.float32] | None = None
    """[n]: the trainer's own at the start of the step, where they were needed before."""
    ref_logprobs: NDArray[np.float32] | None = None
    """[n]: the reference model's, where there is one."""
    teacher_logprobs: NDArray[np.float32] | None = None
    """[n]: the teacher's, where there is one."""
    policy_factors: NDArray[np.float32] | None = None
    """[n]: of the policy loss, where a user's function weighs it."""
    old_values: NDArray[np.float32] | None = None
    """[n]: the critic's at the start of the step, where there is one."""
    returns: NDArray[np.float32] | None = None
    """[n]: what it learns."""


# What a rank computes for a micro-batch in which it has no sequence: one token, none of them trained.
_FILLER = PackItem(
    token_ids=np.zeros(1, dtype=np.int32),
    prompt_length=1,
    predict=np.empty(0, dtype=np.int64),
    targets=np.empty(0, dtype=np.int32),
    rollout_logprobs=np.empty(0, dtype=np.float32),
    fresh=np.empty(0, dtype=np.bool_),
    weight=0.0,
    temperature=1.0,
    sample_row=0,
)


def pack(items: Sequence[PackItem]) -> PackedBatch:
    """Packs all `items` into one row. Without any it is one token, of which nothing is trained."""
    items = items or [_FILLER]
    row = _Row()
    sequences = [row.add(item) for item in items]
    blocks, slots = _blocks(sequences, row.length)
    order = np.concatenate(sequences)
    places = np.empty(row.length, dtype=np.int64)
    places[order] = np.arange(len(order))
    counts = [len(item.targets) for item in items]
    return PackedBatch(
        token_ids=np.concatenate(row.token_ids).astype(np.int64),
        position_ids=np.concatenate(row.position_ids),
        blocks=blocks,
        slots=slots,
        order=order,
        places=places,
        lengths=np.array(list(map(len, sequences)), dtype=np.int32),
        predict=np.concatenate([sequence[item.predict] for sequence, item in zip(sequences, items, strict=True)]),
        targets=np.concatenate([item.targets for item in items]).astype(np.int64),
        weights=np.repeat(np.array([item.weight for item in items], dtype=np.float32), counts),
        rollout_logprobs=np.concatenate([item.rollout_logprobs for item in items]),
        temperatures=np.repeat(np.array([item.temperature for item in items], dtype=np.float32), counts),
        fresh=np.concatenate([item.fresh for item in items]),
        sample_rows=np.repeat(np.array([item.sample_row for item in items], dtype=np.int64), counts),
        sequences=np.repeat(np.arange(len(items)), counts),
        sequence_count=len(items),
        advantages=np.zeros(sum(counts), dtype=np.float32),
    )


class _Row:
    """The packed row while it grows."""

    def __init__(self) -> None:
        self.token_ids: list[NDArray[np.int32]] = []
        self.position_ids: list[NDArray[np.int64]] = []
        self.length = 0
        self._prompts: dict[bytes, NDArray[np.int64]] = {}

    def add(self, item: PackItem) -> NDArray[np.int64]:
        """The indices of the item's tokens in the row; those of a prompt that is there already are reused."""
        prompt = item.token_ids[: item.prompt_length]
        key = prompt.tobytes()
        if key not in self._prompts:
            self._prompts[key] = self._append(prompt, 0)
        completion = self._append(item.token_ids[item.prompt_length :], item.prompt_length)
        return np.concatenate([self._prompts[key], completion])

    def _append(self, token_ids: NDArray[np.int32], first_position: int) -> NDArray[np.int64]:
        start, count = self.length, len(token_ids)
        self.token_ids.append(token_ids)
        self.position_ids.append(np.arange(first_position, first_position + count))
        self.length += count
        return np.arange(start, start + count)


def _blocks(
    sequences: Sequence[NDArray[np.int64]], tokens: int
) -> tuple[tuple[NDArray[np.int64], ...], NDArray[np.int64]]:
    """Attention blocks of sequences of similar length, and the slot of each token in them."""
    slots = np.empty(tokens, dtype=np.int64)
    blocks: list[NDArray[np.int64]] = []
    offset = 0
    for members in _similar(sequences):
        longest = len(members[0])
        block = np.empty((len(members), longest), dtype=np.int64)
        for number, sequence in enumerate(members):
            count = len(sequence)
            block[number, :count] = sequence
            block[number, count:] = sequence[-1]
            # A shared prompt stands in several rows with the same outcome: the last one is read.
            slots[sequence] = np.arange(offset, offset + count)
            offset += longest
        blocks.append(block)
    return tuple(blocks), slots


def _similar(sequences: Sequence[NDArray[np.int64]]) -> list[list[NDArray[np.int64]]]:
    """The sequences, longest first, cut where a block would hold too much padding."""
    classes: list[list[NDArray[np.int64]]] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        longest = len(classes[-1][0]) if classes else 0
        if classes and len(sequence) >= min(BLOCK_FILL * longest, longest - BLOCK_SLACK):
            classes[-1].append(sequence)
        else:
            classes.append([sequence])
    return classes
