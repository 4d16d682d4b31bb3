"""Shares micro-batches out over data-parallel ranks: as many to each, and as nearly the same work."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from services.common.errors import InvalidArgumentError

Bins = list[list[int]]


class _Share(NamedTuple):
    """What one rank might get."""

    cost: int
    items: list[int]


def karmarkar_karp(costs: Sequence[int], parts: int) -> Bins:
    """`parts` sets of k indices each whose costs add up to nearly the same.

    The largest differencing method (N. Karmarkar and R. M. Karp, "The Differencing Method of Set Partitioning", 1982)
    for sets of equal size. Items of similar cost are rows with one item a set; the two rows that differ most within
    themselves become one, the costliest set of one with the cheapest of the other, until one row is left. Sets are
    ordered by their first index, indices by cost, the greatest first.

    The costliest set costs as little as can be for k up to 2, at most 4/3 of that for 3, 19/12 for 4 and 2 - 1 / parts
    for any k (W. Michiels and others, "Performance Ratios for the Differencing Method Applied to the Balanced Number
    Partitioning Problem", 2003), and hardly ever nearly so costly.

    Raises InvalidArgumentError when `costs` cannot be shared out in equal numbers.
    """
    if len(costs) % parts:
        raise InvalidArgumentError(f"{len(costs)} costs cannot be shared out equally over {parts} parts", field="costs")
    ranked = sorted(range(len(costs)), key=lambda index: -costs[index])
    rows = [[_Share(costs[index], [index]) for index in ranked[at : at + parts]] for at in range(0, len(costs), parts)]
    # The number breaks ties, so that shares are never compared.
    heap = [(-_spread(row), number, row) for number, row in enumerate(rows)]
    heapq.heapify(heap)
    number = len(heap)
    while len(heap) > 1:
        *_, one = heapq.heappop(heap)
        *_, other = heapq.heappop(heap)
        row = [_Share(a.cost + b.cost, a.items + b.items) for a, b in zip(one, reversed(other), strict=True)]
        row.sort(key=lambda share: -share.cost)
        heapq.heappush(heap, (-_spread(row), number, row))
        number += 1
    shares: Bins = [share.items for share in heap[0][2]] if heap else [[] for _ in range(parts)]
    return sorted((sorted(share, key=lambda index: (-costs[index], index)) for share in shares), key=_first)


def aligned(bins: Sequence[Sequence[int]], costs: Sequence[int], multiple: int) -> Bins:
    """The bins, some of them cut in two, until their number is a `multiple`. `costs` are those of the items.

    The costliest bin of several items is cut first. When none is left, empty bins fill up: their rank has no tokens
    there, and only takes part in what ranks do together.
    """
    result = [list(members) for members in bins]
    totals = [sum(costs[index] for index in members) for members in result]
    for _ in range(-len(result) % multiple):
        divisible = [number for number, members in enumerate(result) if len(members) > 1]
        if not divisible:
            result.append([])
            continue
        number = max(divisible, key=lambda number: totals[number])
        halves = _halves(result[number], costs)
        result[number : number + 1] = halves
        totals[number : number + 1] = [sum(costs[index] for index in half) for half in halves]
    return result


def _halves(members: Sequence[int], costs: Sequence[int]) -> Bins:
    """Two bins of nearly the same cost, in the order of `members`: each item to the cheaper one, the greatest first."""
    sides: tuple[set[int], set[int]] = (set(), set())
    totals = [0, 0]
    for index in sorted(members, key=lambda index: -costs[index]):
        side = int(totals[1] < totals[0])
        sides[side].add(index)
        totals[side] += costs[index]
    return [[index for index in members if index in side] for side in sides]


def _spread(row: Sequence[_Share]) -> int:
    return row[0].cost - row[-1].cost


def _first(members: Sequence[int]) -> int:
    return min(members, default=-1)
