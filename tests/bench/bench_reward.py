"""What the reward service costs and how fast it is, each figure beside its limit. `polyhead bench reward`.

* `math_scores_per_s`, `ratio_to_math_verify`: a thousand pairs through a pool of two processes, and the same pairs
  through a bare pool of two processes that call math-verify, in turn (`reward_math.py`, `math_pairs.py`); medians of
  the rounds, and by kind of answer the ratio of the seconds inside the processes.
* `slowdown_with_hung_pct`, `hung_dies_after_s`: what a scorer that never answers costs another one
  (`reward_hung.py`).
* `overhead_ms`: per sample through a whole service, beyond the function itself (`reward_overhead.py`).
* `judge_efficiency`: of the ideal, with a judge elsewhere that takes 50 ms and fails on a fifth of the calls; beside it
  a plain loop of as many callers (`reward_judge.py`).
* `invented_scores`: rewards that nothing has given.

A machine with other work to do gives other figures, and `conditions` says how much it had (`load_before`, per core).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any

import grpc
import structlog
import uvloop

from services.common.errors import PolyheadError
from tests.bench.reward_hung import measure_hung
from tests.bench.reward_judge import measure_judge
from tests.bench.reward_math import PROCESSES, measure_math
from tests.bench.reward_overhead import measure_overhead

LIMITS = {
    "ratio_to_math_verify": 3,
    "different_verdicts": 0,
    "slowdown_with_hung_pct": 10,
    "slowdown_with_spinning_pct": 10,
    "hung_lives_beyond_its_limit_s": 1,
    "overhead_ms": 0.5,
    "judge_efficiency": 0.9,  # or more
    "invented_scores": 0,
}


async def measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    figures = await measure_math(arguments.rounds)
    figures |= await measure_hung(arguments.rounds, arguments.seconds)
    figures |= await measure_judge()
    figures["invented_scores"] += figures.pop("hung_but_scored")
    return figures | await measure_overhead(arguments.samples)


def table(figures: dict[str, Any]) -> str:
    """The figures beside their limits, for the documentation."""
    kinds = figures["ratio_by_kind"]
    rows = [
        ("`math`, scores a second", figures["math_scores_per_s"], ""),
        ("bare math-verify, scores a second", figures["math_verify_scores_per_s"], ""),
        ("ratio", figures["ratio_to_math_verify"], "≥ 3"),
        ("the same inside the processes, without sets, intervals and points", figures["ratio_of_numbers"], ""),
        ("by kind of answer: " + ", ".join(kinds), ", ".join(f"{ratio:g}" for ratio in kinds.values()), ""),
        ("verdicts that differ", figures["different_verdicts"], "0"),
        ("slower beside a scorer that waits for ever, in one pool", f"{figures['slowdown_with_hung_pct']}%", "≤ 10%"),
        ("the same, one that works for ever", f"{figures['slowdown_with_spinning_pct']}%", "≤ 10%"),
        (
            "both, from its first sample on",
            f"{figures['slowdown_with_hung_first_pct']}%, {figures['slowdown_with_spinning_first_pct']}%",
            "",
        ),
        ("the scorer that waits in a pool of its own", f"{figures['slowdown_in_two_pools_pct']}%", ""),
        ("one sample that waits for ever, beside others of its scorer", f"{figures['slowdown_by_sample_pct']}%", ""),
        (
            f"a score that hangs is over, at a limit of {figures['hung_limit_s']:g} s, after",
            f"{figures['hung_dies_after_s']} s",
            f"≤ {figures['hung_limit_s'] + 1:g} s",
        ),
        ("overhead a sample, leased and completed", f"{figures['overhead_ms']} ms", "≤ 0.5 ms"),
        ("overhead a sample, by `RewardService.Score`", f"{figures['overhead_call_ms']} ms", "≤ 0.5 ms"),
        ("a judge of 50 ms with 20% errors, of the ideal", figures["judge_efficiency"], "≥ 0.9"),
        ("the same beside a plain loop", figures["judge_ratio_to_plain_loop"], ""),
        ("invented scores", figures["invented_scores"], "0"),
    ]
    lines = ["| figure | measured | asked |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} | {asked} |" for name, value, asked in rows)]) + "\n"


def _conditions(arguments: argparse.Namespace, load_before: float) -> dict[str, Any]:
    return {
        "load_before": round(load_before, 2),
        "pool_processes": PROCESSES,
        "pairs": "tests/bench/math_pairs.jsonl, every label once, new processes each round",
        "rounds": arguments.rounds,
        "seconds_of_each_rate": arguments.seconds,
        "samples_for_overhead": arguments.samples,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "math_verify": importlib.metadata.version("math-verify"),
        "grpc": grpc.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="polyhead bench reward", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--rounds", type=int, default=3, help="of each comparison")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each rate beside a scorer that hangs")
    parser.add_argument("--samples", type=int, default=8000, help="for the overhead")
    parser.add_argument("--table", type=Path, help="only print what an earlier --json FILE says, as a table")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())), end="")
        return 0
    # That processes are killed is what is measured.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    load_before = os.getloadavg()[0] / (os.cpu_count() or 1)
    try:
        figures = uvloop.run(measure_all(arguments))  # as the service does
    except PolyheadError as error:
        print(f"polyhead bench reward: {error}", file=sys.stderr)
        return error.exit_code
    figures |= {"limits": LIMITS, "conditions": _conditions(arguments, load_before)}
    content = json.dumps(figures, indent=1) + "\n"
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(content)
    print(content, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
