"""The long form of the random histories: python -m tests.property.long --histories 5000 --commands 100."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import secrets
import sys
import time
import traceback
from collections import Counter
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import Any

import structlog

from services.common.process import die_with_parent
from tests.property import histories

PART = 25
"""Histories per seed: a failure is shrunk and played again from its part alone."""
_PROGRESS_S = 15.0


def main() -> int:
    asked = _arguments()
    began, base = time.monotonic(), asked.seed if asked.seed is not None else secrets.randbelow(1 << 31)
    print(
        f"{asked.histories} histories x <= {asked.commands} commands, seed {base}, {asked.workers} workers", flush=True
    )
    parts = [(base + at, min(PART, asked.histories - at * PART)) for at in range(-(-asked.histories // PART))]
    seen, failures = _play(parts, asked, began)
    summary = {
        "seed": base,
        "histories": seen["histories"],
        "commands": seen["commands"],
        "seconds": round(time.monotonic() - began, 1),
        "workers": asked.workers,
        "failed_seeds": sorted(failures),
        "seen": dict(sorted(seen.items())),
    }
    print(json.dumps(summary, indent=2))
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(summary, indent=2) + "\n")
    return 1 if failures else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.property.long", description=__doc__)
    parser.add_argument("--histories", type=int, default=5000)
    parser.add_argument("--commands", type=int, default=100, help="at most, per history")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, help="a random one by default")
    parser.add_argument("--shrink", action="store_true", help="look for the shortest history that fails: minutes each")
    parser.add_argument("--json", type=Path, help="where the summary is written")
    return parser.parse_args()


def _play(parts: list[tuple[int, int]], asked: argparse.Namespace, began: float) -> tuple[Counter[str], list[int]]:
    """What happened, and the seeds of the parts that failed."""
    spawn = multiprocessing.get_context("spawn")
    todo, told = spawn.Queue(), spawn.Queue()
    for part in [*parts, *[None] * asked.workers]:
        todo.put(part)
    arguments = (todo, told, asked.commands, asked.shrink)
    processes = [spawn.Process(target=_work, args=arguments, daemon=True) for _ in range(asked.workers)]
    for process in processes:
        process.start()
    seen: Counter[str] = Counter()
    failures: list[int] = []
    played, left, shown = 0, len(parts), time.monotonic()
    while left:
        try:
            what, value = told.get(timeout=5.0)
        except Empty:
            if not any(process.is_alive() for process in processes):
                print("the workers died")
                failures.append(-1)
                break
            continue
        if what == "history":
            played += 1
        else:
            left -= 1
            if what == "seen":
                seen.update(value)
            else:
                number, text = value
                failures.append(number)
                again = f"--seed {number} --histories {PART} --commands {asked.commands} --workers 1 --shrink"
                print(f"FAILED with seed {number}; again: python -m tests.property.long {again}\n{text}", flush=True)
        if time.monotonic() - shown > _PROGRESS_S:
            shown = time.monotonic()
            rate = played / (shown - began)
            rest = max(0, asked.histories - played) / rate if rate else 0.0
            print(f"{played} histories, {rate:.2f}/s, {len(failures)} failed, about {rest:.0f} s left", flush=True)
    for process in processes:
        process.join(timeout=10.0)
    return seen, failures


def _work(todo: Queue[Any], told: Queue[Any], commands: int, shrink: bool) -> None:
    die_with_parent(os.getppid())
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr), cache_logger_on_first_use=True)
    while (part := todo.get()) is not None:
        number, count = part
        try:
            seen = histories.run(number, count, commands, lambda: told.put(("history", 1)), shrink=shrink)
            told.put(("seen", seen))
        except BaseException:  # a worker goes on with the next part whatever became of this one
            told.put(("failed", (number, traceback.format_exc())))


if __name__ == "__main__":
    sys.exit(main())
