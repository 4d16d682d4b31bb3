"""`polyhead reward test`: a scorer tried on the rows of a file, in the pool that a run would have it in."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from services.cli.reward_rows import Row, read_rows
from services.common.config import Config, load
from services.common.errors import ConfigError
from services.common.telemetry import configure_logging
from services.reward.items import item_of_request
from services.reward.jobs import Result
from services.reward.opening import running_station

# Rewards that differ by less agree: they may have been written with few digits.
_CLOSE = 1e-6

_console = Console(highlight=False, soft_wrap=True)


class Scored(NamedTuple):
    row: Row
    result: Result

    @property
    def disagrees(self) -> bool:
        expected, verdict = self.row.expected, self.result.verdict
        if expected is None or verdict is None:
            return False
        return not math.isclose(verdict.reward, expected, rel_tol=_CLOSE, abs_tol=_CLOSE)

    @property
    def is_problem(self) -> bool:
        return self.disagrees or self.result.verdict is None


def run(arguments: argparse.Namespace) -> int:
    """1 when a row failed or disagrees, else 0. Raises ConfigError for bad rows and for a scorer that does not load."""
    _check(arguments)
    configure_logging("reward-test", stream=sys.stderr)
    rows, config = read_rows(arguments.file, arguments.expect), _config(arguments)
    scored, seconds = asyncio.run(_score(config, arguments.processes, rows))
    summary = summarise(scored, seconds)
    shown = [each for each in scored if each.is_problem or not arguments.problems]
    if arguments.json:
        document = {"scorer": config.reward.scorer, **summary, "rows": [_as_dict(each) for each in shown]}
        print(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())
    else:
        _print(shown, summary)
    return 1 if summary["failed"] or summary["disagreements"] else 0


def summarise(scored: Sequence[Scored], seconds: float) -> dict[str, Any]:
    """Counts; the time in all, in which the pool scored; and percentiles of what a row took in the scorer."""
    spent = [each.result.seconds * 1e3 for each in scored]
    failed = sum(each.result.verdict is None for each in scored)
    return {
        "scored": len(scored) - failed,
        "failed": failed,
        "compared": sum(each.row.expected is not None and each.result.verdict is not None for each in scored),
        "disagreements": sum(each.disagrees for each in scored),
        "total_s": round(seconds, 3),
        "scores_per_s": round(len(scored) / seconds, 1),
        "p50_ms": round(float(np.percentile(spent, 50)), 3),
        "p99_ms": round(float(np.percentile(spent, 99)), 3),
    }


def _check(arguments: argparse.Namespace) -> None:
    if arguments.processes < 1:
        raise ConfigError(f"is {arguments.processes}, must be at least 1", field="--processes")
    if arguments.timeout is not None and not (math.isfinite(arguments.timeout) and arguments.timeout > 0):
        raise ConfigError(f"is {arguments.timeout:g}, must be positive", field="--timeout")


def _config(arguments: argparse.Namespace) -> Config:
    """Raises ConfigError."""
    overrides: dict[str, Any] = {}
    if arguments.scorer is not None:
        overrides["reward.scorer"] = arguments.scorer
    if arguments.timeout is not None:
        overrides["reward.score_timeout_s"] = arguments.timeout
    config = load(arguments.config, overrides)
    config.plugins.paths = [*config.plugins.paths, *(path.resolve() for path in arguments.path)]
    return config


async def _score(config: Config, processes: int, rows: Sequence[Row]) -> tuple[list[Scored], float]:
    async with running_station(config, processes=processes) as station:
        begun = time.perf_counter()
        items = [item_of_request(row.item, place) for place, row in enumerate(rows)]
        calls = [items]
        if station.scores_whole:
            of_group = itertools.groupby(zip(rows, items, strict=True), key=lambda pair: pair[0].group)
            calls = [[item for _, item in pairs] for _, pairs in of_group]
        results = itertools.chain(*await asyncio.gather(*map(station.score, calls)))
        scored = [Scored(row, result) for row, result in zip(rows, results, strict=True)]
        return scored, time.perf_counter() - begun


def _as_dict(scored: Scored) -> dict[str, Any]:
    row, result = scored
    verdict = result.verdict
    return {
        "line": row.line,
        "reward": None if verdict is None else verdict.reward,
        "parts": {} if verdict is None else verdict.parts,
        "expected": row.expected,
        "disagrees": scored.disagrees,
        "failure": result.failure,
        "reason": result.reason,
        "ms": round(result.seconds * 1e3, 3),
    }


def _print(shown: Sequence[Scored], summary: dict[str, Any]) -> None:
    if shown:
        table = Table("line", "reward", "expected", "ms", "", box=None)
        for each in shown:
            table.add_row(*map(Text, _cells(each)))
        _console.print(table)
    _console.print(f"{summary['scored']} scored, {summary['failed']} failed, {_compared(summary)}")
    _console.print(
        f"{summary['total_s']:g} s, {summary['scores_per_s']:g} scores/s, in the scorer p50 {summary['p50_ms']:g} ms, "
        f"p99 {summary['p99_ms']:g} ms"
    )


def _cells(scored: Scored) -> list[str]:
    row, result = scored
    reward = "–" if result.verdict is None else f"{result.verdict.reward:g}"
    expected = "" if row.expected is None else f"{row.expected:g}"
    return [str(row.line), reward, expected, f"{result.seconds * 1e3:.2f}", _remark(scored)]


def _remark(scored: Scored) -> str:
    if scored.result.verdict is None:
        return f"{scored.result.failure}: {scored.result.reason}"
    parts = " ".join(f"{name}={value:g}" for name, value in scored.result.verdict.parts.items())
    return f"disagrees {parts}".rstrip() if scored.disagrees else parts


def _compared(summary: dict[str, Any]) -> str:
    if not summary["compared"]:
        return "nothing to compare with"
    return f"{summary['disagreements']} of {summary['compared']} disagree"
