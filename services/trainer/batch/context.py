"""Context parallelism: what one of several ranks computes of a packed row that all of them share.

Rank r of c takes every c-th token from the r-th on, so that each has as much of every sequence, early and late. Its
linear layers see its tokens only. In attention its queries meet the keys of all, which are brought together rank after
rank: token i stands at place (i mod c) * ceil(T / c) + i div c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.trainer.batch.packing import PackedBatch


@dataclass(frozen=True, slots=True)
class ContextShare:
    """One rank's part of a row of T tokens with n trained ones: L = ceil(T / c) tokens, some perhaps filled in."""

    token_ids: NDArray[np.int64]
    """[L]"""
    position_ids: NDArray[np.int64]
    """[L]"""
    blocks: tuple[NDArray[np.int64], ...]
    """Each [sequences, queries]: indices into the rank's tokens, filled up at the end."""
    places: tuple[NDArray[np.int64], ...]
    """Each [sequences, queries]: where in its sequence each of them is."""
    keys: tuple[NDArray[np.int64], ...]
    """Each [sequences, longest]: indices into the keys of all ranks, in the order of each sequence."""
    slots: NDArray[np.int64]
    """[L]: where each token stands in the concatenation of the flattened blocks."""
    predict: NDArray[np.int64]
    """[m]: which of the rank's tokens predict a trained one, filled up to the number of the rank that has most."""
    targets: NDArray[np.int64]
    """[m]"""
    temperatures: NDArray[np.float32]
    """[m]"""
    order: NDArray[np.int64]
    """[n]: where each trained token of the row is among those of all ranks, m of each."""
    member_tokens: NDArray[np.int64]
    """[M]: one of the rank's tokens, for each sequence that it is in."""
    member_sequences: NDArray[np.int64]
    """[M]: that sequence, by its number in the row."""


def context_share(batch: PackedBatch, ranks: int, rank: int) -> ContextShare:
    """The part of `rank`."""
    tokens = len(batch.token_ids)
    each = -(-tokens // ranks)
    own = np.arange(rank, tokens, ranks)
    slots = np.zeros(each, dtype=np.int64)
    blocks, places, start = [], [], 0
    for block in batch.blocks:
        found = [_own_places(sequence, ranks, rank) for sequence in block]
        width = max(1, *(len(of_row) for of_row in found))
        queries, positions = np.zeros((2, len(block), width), dtype=np.int64)
        for row, of_row in enumerate(found):
            count = len(of_row)
            positions[row, :count] = of_row
            queries[row, :count] = block[row][of_row] // ranks
            # A token of several sequences has the same outcome in each: the last one is read.
            slots[queries[row, :count]] = np.arange(start, start + count)
            start += width
        blocks.append(queries)
        places.append(positions)
    members = batch.order % ranks == rank
    owners = batch.predict % ranks
    most = max(int(np.bincount(owners, minlength=ranks).max()), 1) if len(owners) else 0
    mine = owners == rank
    return ContextShare(
        token_ids=_filled(batch.token_ids[own], each),
        position_ids=_filled(batch.position_ids[own], each),
        blocks=tuple(blocks),
        places=tuple(places),
        keys=tuple((block % ranks) * each + block // ranks for block in batch.blocks),
        slots=slots,
        predict=_filled(batch.predict[mine] // ranks, most),
        targets=_filled(batch.targets[mine], most),
        temperatures=_filled(batch.temperatures[mine], most, 1),
        order=_order(owners, ranks, most),
        member_tokens=batch.order[members] // ranks,
        member_sequences=np.repeat(np.arange(len(batch.lengths)), batch.lengths)[members],
    )


def _own_places(sequence: NDArray[np.int64], ranks: int, rank: int) -> NDArray[np.int64]:
    """Where in a sequence, which is filled up with its last token, the rank's own tokens are."""
    length = int(np.argmax(sequence == sequence[-1])) + 1
    return np.flatnonzero(sequence[:length] % ranks == rank)


def _order(owners: NDArray[np.int64], ranks: int, most: int) -> NDArray[np.int64]:
    order = np.empty(len(owners), dtype=np.int64)
    for rank in range(ranks):
        of_rank = np.flatnonzero(owners == rank)
        order[of_rank] = rank * most + np.arange(len(of_rank))
    return order


def _filled(array: NDArray[Any], length: int, value: int = 0) -> NDArray[Any]:
    return np.pad(array, (0, length - len(array)), constant_values=value)
