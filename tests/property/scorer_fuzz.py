"""Random inputs to every built-in scorer: python -m tests.property.scorer_fuzz --seconds 60 --seed 0.

Each gets a finite verdict or a SampleError, the same one twice, in bounded time, and the process keeps its size.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import random
import secrets
import sys
import time
from collections import Counter

import psutil

from services.reward.scorers import build
from services.reward.scorers.base import Item, SampleError, Scorer, Verdict
from services.reward.scorers.builtin import NAMES, Options
from tests.kit.fuzz.answers import Answers

SECONDS = 8.0
"""Of this process's own time, for one score."""
_HANG_S = 100.0
_GROWTH_MB = 500
_CODE_SHARE = 0.05
"""Of the items for `code`: a program costs as much as hundreds of other scores."""
_AGAIN = 0.1
_OPTIONS = Options(code_timeout_s=2.0, code_memory_mb=256)


def run(seconds: float, seed: int) -> Counter[str]:
    """What was seen. Raises AssertionError with the seed and the number of the item; a hang ends the process."""
    names = [*NAMES, *(f"boxed_{name}" for name in NAMES)]
    scorers = {name: build(name, paths=[], args={}, options=_OPTIONS) for name in names}
    begun, process = time.monotonic(), psutil.Process()
    before = process.memory_info().rss >> 20
    seen: Counter[str] = Counter()
    number = 0
    while time.monotonic() - begun < seconds:
        rng = random.Random(f"{seed}:{number}")
        name = rng.choice(names)
        if not name.endswith("code") or rng.random() < _CODE_SHARE:
            item = Answers(rng).item(name)
            try:
                seen[f"{name} {_try(scorers[name], item, rng.random() < _AGAIN)}"] += 1
            except BaseException as error:
                error.add_note(f"item {number} of seed {seed}, for {name}: {str(item)[:2000]}")
                raise
        number += 1
    seen["grown_mb"] = (process.memory_info().rss >> 20) - before
    assert seen["grown_mb"] < _GROWTH_MB, dict(seen)
    for name in names:
        if not name.endswith("code"):
            assert seen[f"{name} scored"] or number < 50 * len(names), f"{name} has scored nothing: {dict(seen)}"
    return seen


def _try(scorer: Scorer, item: Item, again: bool) -> str:
    begun = time.process_time()
    faulthandler.dump_traceback_later(_HANG_S, exit=True)
    try:
        verdict = _scored(scorer, item)
        took = time.process_time() - begun
        assert took < SECONDS, f"took {took:.1f} s"
        if again and took < 1.0 and not isinstance(verdict, str):
            assert _scored(scorer, item) == verdict, "scored again, it is another"
    finally:
        faulthandler.cancel_dump_traceback_later()
    return "refused" if isinstance(verdict, str) else "scored"


def _scored(scorer: Scorer, item: Item) -> Verdict | str:
    """The verdict, or why there is none."""
    try:
        verdict = scorer(item)
    except SampleError as error:
        return str(error)
    assert isinstance(verdict.reward, float), verdict
    assert all(map(math.isfinite, (verdict.reward, *verdict.parts.values()))), verdict
    return verdict


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.property.scorer_fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, help="a random one by default")
    asked = parser.parse_args()
    seed = asked.seed if asked.seed is not None else secrets.randbelow(1 << 31)
    print(f"{asked.seconds:g} s, seed {seed}", flush=True)
    print(json.dumps(dict(sorted(run(asked.seconds, seed).items())), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
