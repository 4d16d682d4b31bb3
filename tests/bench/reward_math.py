"""The math scorer in a pool beside a bare pool of math-verify, over the thousand pairs."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.pool import Pool as ProcessPool
from typing import Any, NamedTuple

from services.reward.pool import ScorerPool
from services.reward.scorers.base import Item
from services.reward.settings import ScorerSettings
from tests.bench import math_pairs

PROCESSES = 2
_CHUNK = 16
_TIMEOUT_S = 60.0
# What a process does before it is timed: the scorer's own start does as much.
_FIRST = (r"1+\sqrt{2}", "$x+2$")
_COLLECTIONS = ("finite_set", "interval", "point")


class Round(NamedTuple):
    """One side's way through all pairs: a verdict and the seconds it took in its process for each."""

    verdicts: list[float]
    seconds: list[float]
    wall_s: float


def items(pairs: Sequence[dict[str, Any]]) -> list[Item]:
    return [
        Item(f"pair-{number}", "", "", pair["completion"], pair["label"], "", "completed", 0, 0, number)
        for number, pair in enumerate(pairs)
    ]


async def measure_math(rounds: int) -> dict[str, Any]:
    """Both sides in turn, each round in new processes: no label is met twice, so that no cache helps."""
    pairs = math_pairs.load()
    ours, theirs = [], []
    for _ in range(rounds):
        theirs.append(await asyncio.to_thread(_bare_round, pairs))
        ours.append(await _pool_round(pairs))
    ratios = [bare.wall_s / pool.wall_s for bare, pool in zip(theirs, ours, strict=True)]
    expected = [pair["reward"] for pair in pairs]
    return {
        "math_scores_per_s": round(len(pairs) / statistics.median(each.wall_s for each in ours)),
        "math_verify_scores_per_s": round(len(pairs) / statistics.median(each.wall_s for each in theirs)),
        "ratio_to_math_verify": round(statistics.median(ratios), 2),
        "ratio_of_each_round": [round(ratio, 2) for ratio in ratios],
        **_inside(pairs, ours, theirs),
        "different_verdicts": sum(_differences(one.verdicts, ours[0].verdicts) for one in (*ours, *theirs)),
        "wrong_verdicts": _differences(ours[0].verdicts, expected),
    }


async def _pool_round(pairs: Sequence[dict[str, Any]]) -> Round:
    pool = ScorerPool(ScorerSettings("math", [], {}), processes=PROCESSES, timeout_s=_TIMEOUT_S)
    await pool.start()
    try:
        begun = time.perf_counter()
        results = await pool.score(items(pairs))
        wall_s = time.perf_counter() - begun
    finally:
        await pool.close()
    verdicts = [result.verdict.reward if result.verdict else float("nan") for result in results]
    return Round(verdicts, [result.seconds for result in results], wall_s)


def _bare_round(pairs: Sequence[dict[str, Any]]) -> Round:
    with _bare_pool() as pool:
        begun = time.perf_counter()
        answers = list(pool.imap(_verify, [(pair["label"], pair["completion"]) for pair in pairs], _CHUNK))
        wall_s = time.perf_counter() - begun
    return Round([verdict for verdict, _ in answers], [seconds for _, seconds in answers], wall_s)


@contextmanager
def _bare_pool() -> Iterator[ProcessPool]:
    with multiprocessing.get_context("spawn").Pool(PROCESSES, _warm_up) as pool:
        pool.map(_verify, [_FIRST] * PROCESSES, 1)  # returns when both have started
        yield pool


def _warm_up() -> None:
    logging.disable(logging.CRITICAL)
    _verify(_FIRST)


def _verify(pair: tuple[str, str]) -> tuple[float, float]:
    """As math-verify's documentation shows it."""
    from math_verify import parse, verify

    label, completion = pair
    begun = time.perf_counter()
    equal = verify(parse(f"${label}$"), parse(completion))
    return float(equal), time.perf_counter() - begun


def _inside(pairs: Sequence[dict[str, Any]], ours: Sequence[Round], theirs: Sequence[Round]) -> dict[str, Any]:
    """Ratios of the seconds inside the processes, of which a bare math-verify spends most on a few kinds."""
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for side, rounds in enumerate((theirs, ours)):
        for each in rounds:
            for pair, seconds in zip(pairs, each.seconds, strict=True):
                spent[pair["kind"]][side] += seconds
    numbers = [seconds for kind, seconds in spent.items() if kind not in _COLLECTIONS]
    return {
        "ratio_by_kind": {kind: round(bare / pool, 2) for kind, (bare, pool) in sorted(spent.items())},
        "ratio_of_numbers": round(sum(bare for bare, _ in numbers) / sum(pool for _, pool in numbers), 2),
    }


def _differences(one: Sequence[float], other: Sequence[float]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))
