"""Context parallelism: what one of several ranks computes of a packed row that all of them share.

Each *part* of the row, a prompt or a completion, is cut into 2c chunks for c ranks, and rank r takes the r-th from the
front and the r-th from the back: those two have as much before them whichever rank it is. What does not divide goes,
token by token, to who has fewest: ranks have as many tokens of the row, give or take one. Linear layers see the rank's
own tokens. In attention the keys of all are brought together, rank after rank, and each *run*, consecutive tokens of a
sequence that the rank has, meets those from the sequence's first to the run's last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
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
    queries: NDArray[np.int64]
    """Indices into the rank's tokens, run after run: each token once, also one of several sequences."""
    places: NDArray[np.int64]
    """[L]: where each token stands in `queries`."""
    query_lengths: NDArray[np.int32]
    """[runs]"""
    keys: NDArray[np.int64]
    """Indices into the keys of all ranks, L of each: what each run meets, run after run."""
    key_lengths: NDArray[np.int32]
    """[runs]"""
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
    owners = _owners(batch, ranks)
    each = int(np.bincount(owners, minlength=ranks).max())
    places = _places_of(owners, ranks)
    own = np.flatnonzero(owners == rank)
    queries, keys = zip(*_runs(batch, owners, rank), strict=True) if len(own) else (([0],), ([0],))
    lined = places[np.concatenate(queries)]
    of_owner = owners[batch.predict]
    most = max(int(np.bincount(of_owner, minlength=ranks).max()), 1) if len(of_owner) else 0
    mine = of_owner == rank
    members = owners[batch.order] == rank
    return ContextShare(
        token_ids=_filled(batch.token_ids[own], each),
        position_ids=_filled(batch.position_ids[own], each),
        queries=lined,
        places=_filled(np.argsort(lined), each),
        query_lengths=np.array(list(map(len, queries)), dtype=np.int32),
        keys=(owners * each + places)[np.concatenate(keys)],
        key_lengths=np.array(list(map(len, keys)), dtype=np.int32),
        predict=_filled(places[batch.predict[mine]], most),
        targets=_filled(batch.targets[mine], most),
        temperatures=_filled(batch.temperatures[mine], most, 1),
        order=of_owner * most + _places_of(of_owner, ranks),
        member_tokens=places[batch.order[members]],
        member_sequences=np.repeat(np.arange(len(batch.lengths)), batch.lengths)[members],
    )


def _owners(batch: PackedBatch, ranks: int) -> NDArray[np.int64]:
    """[T]: which rank has each token."""
    owners = np.empty(len(batch.token_ids), dtype=np.int64)
    fold = np.concatenate([np.arange(ranks), np.arange(ranks)[::-1]])
    held = np.zeros(ranks, dtype=np.int64)
    for first, end in _parts(batch):
        size, left = divmod(end - first, 2 * ranks)
        # Of what is left, 0, 1 or 2 tokens for each rank: its first chunk has one more, or both have.
        more = np.full(ranks, left // ranks)
        more[np.argsort(held, kind="stable")[: left % ranks]] += 1
        held += more
        owners[first:end] = np.repeat(fold, size + np.concatenate([more > 0, (more > 1)[::-1]]))
    return owners


def _parts(batch: PackedBatch) -> Iterator[tuple[int, int]]:
    """From which token to which the row has neither a sequence's end nor that of a prompt that several share."""
    sequences = np.cumsum(batch.lengths)[:-1]
    begins = np.union1d(np.flatnonzero(np.diff(batch.order) != 1) + 1, sequences)
    firsts, lasts = batch.order[np.append(0, begins)], batch.order[np.append(begins, len(batch.order)) - 1]
    bounds = np.union1d(firsts, lasts + 1).tolist()
    return pairwise(bounds)


def _runs(
    batch: PackedBatch, owners: NDArray[np.int64], rank: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Of each run: its tokens, and those that it meets. A prompt that several sequences share is in the first one's."""
    left = owners == rank
    for sequence in np.split(batch.order, np.cumsum(batch.lengths)[:-1]):
        wanted = left[sequence]
        left[sequence] = False
        edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False))
        for first, end in edges.reshape(-1, 2):
            yield sequence[first:end], sequence[:end]


def _places_of(owners: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
    """Where each stands among those of its owner."""
    places = np.empty(len(owners), dtype=np.int64)
    for rank in range(ranks):
        own = np.flatnonzero(owners == rank)
        places[own] = np.arange(len(own))
    return places


def _filled(array: NDArray[Any], length: int, value: int = 0) -> NDArray[Any]:
    return np.pad(array, (0, length - len(array)), constant_values=value)
