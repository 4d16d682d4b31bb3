"""How full micro-batches are, how even the work of eight ranks, and what planning takes. `polyhead bench packing`.

One optimizer step of 2,048 samples of long-tailed lengths, planned by `plan_micro_batches`, beside simple peers in the
same run.

* `useful_token_ratio`: the samples' tokens in all micro-batches but the last, over the room in these micro-batches,
  `max_tokens_per_gpu` each. There is no padding in it: what is lost is room that no sample fits in. The last one holds
  what was left over. Beside it: a micro-batch is closed when the next sample in order does not fit (`in_order_`), and
  each sample goes to the first one with room, in order (`first_fit_`).
* `useful_token_ratio_8`: the same for eight ranks, their number made a multiple of eight, none excepted.
* `imbalance_8`: FLOPs of the busiest rank over the mean, less one. Beside it the same micro-batches dealt out in turn.
* `lockstep_imbalance_8`: the same where ranks wait for each other at every micro-batch: the costliest of each
  round over its mean, rounds added up.
* `plan_ms_2048`: from lengths to the micro-batches of eight ranks, median; beside it in order and in turn.

Of several seeds the worst is given, on both sides; times are over all of them. The top level is the first of `mixes`,
which has the same for other lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from services.trainer.batch.flops import SequenceFlops, sequence_flops
from services.trainer.batch.plan import Batching, first_fit_decreasing, plan_micro_batches

SAMPLES, GROUP, RANKS, LONGEST, MAX_TOKENS = 2048, 8, 8, 7936, 8192
REPEATS = 20
# The shape of Qwen3-0.6B.
MODEL = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
Bins = list[list[int]]
Values = dict[str, list[float]]
Draw = Callable[[np.random.Generator], np.ndarray[Any, np.dtype[np.float64]]]
# Completion lengths, cut at LONGEST.
MIXES: dict[str, tuple[str, Draw]] = {
    "lognormal": ("median 1,000, sigma 1", lambda rng: rng.lognormal(np.log(1000), 1.0, SAMPLES)),
    "wider": ("median 1,300, sigma 1.2", lambda rng: rng.lognormal(np.log(1300), 1.2, SAMPLES)),
    "pareto": ("at least 300, alpha 1.1", lambda rng: 300 * (1 + rng.pareto(1.1, SAMPLES))),
    "long": (
        "median 4,000, sigma 0.6: half of them over half the room",
        lambda rng: rng.lognormal(np.log(4000), 0.6, SAMPLES),
    ),
}


class Step(NamedTuple):
    """One optimizer step's samples."""

    lengths: list[int]
    predicted: list[int]


def make_step(draw: Draw, seed: int) -> Step:
    """Groups share a prompt of 64 to 256 tokens."""
    rng = np.random.default_rng(seed)
    completions = np.clip(draw(rng), 1, LONGEST).astype(int)
    prompts = np.repeat(rng.integers(64, 257, SAMPLES // GROUP), GROUP)
    return Step((prompts + completions).tolist(), completions.tolist())


def in_order(lengths: Sequence[int]) -> Bins:
    """A micro-batch is closed when the next sample does not fit."""
    bins: Bins = []
    room = 0
    for index, length in enumerate(lengths):
        if length > room or not bins:
            bins.append([])
            room = MAX_TOKENS
        bins[-1].append(index)
        room -= length
    return bins


def first_fit(lengths: Sequence[int]) -> Bins:
    """Each sample goes to the first micro-batch with room, in order."""
    bins: Bins = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        number = next((number for number, free in enumerate(room) if free >= length), len(bins))
        if number == len(bins):
            bins.append([])
            room.append(MAX_TOKENS)
        bins[number].append(index)
        room[number] -= length
    return bins


def useful(bins: Bins, lengths: Sequence[int]) -> float:
    return sum(lengths[index] for members in bins for index in members) / (MAX_TOKENS * len(bins))


def imbalances(plan: Sequence[Bins], step: Step, flops: SequenceFlops) -> tuple[float, float]:
    """Of whole ranks, and of rounds in lockstep."""
    work = np.array(
        [
            [sum(flops(step.lengths[index], step.predicted[index]) for index in members) for members in of_rank]
            for of_rank in plan
        ],
        dtype=float,
    )
    ranks = work.sum(axis=1)
    return ranks.max() / ranks.mean() - 1, work.max(axis=0).sum() / work.mean(axis=0).sum() - 1


def times_ms(work: Callable[[], object]) -> list[float]:
    milliseconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        milliseconds.append((time.perf_counter() - started) * 1e3)
    return milliseconds


def measure(draw: Draw, seeds: int, flops: SequenceFlops) -> dict[str, Any]:
    """The worst of `seeds` for each side, and median times."""
    steps = [_measure_step(make_step(draw, seed), flops) for seed in range(seeds)]
    ratios, uneven, milliseconds = (
        {name: [value for step in steps for value in step[part][name]] for name in steps[0][part]} for part in range(3)
    )
    return {
        **{name: round(min(values), 4) for name, values in ratios.items()},
        **{name: round(max(values), 4) for name, values in uneven.items()},
        **{name: round(statistics.median(values), 2) for name, values in milliseconds.items()},
        "plan_ms_2048_p95": round(float(np.percentile(milliseconds["plan_ms_2048"], 95)), 2),
    }


def _measure_step(step: Step, flops: SequenceFlops) -> tuple[Values, Values, Values]:
    """Ratios, imbalances and times by name."""
    balanced = Batching(MAX_TOKENS, flops=flops, dp=RANKS)
    plan, dealt = plan_micro_batches(*step, balanced), plan_micro_batches(*step, Batching(MAX_TOKENS, dp=RANKS))
    packed = {
        "useful_token_ratio": first_fit_decreasing(step.lengths, MAX_TOKENS),
        "in_order_useful_token_ratio": in_order(step.lengths),
        "first_fit_useful_token_ratio": first_fit(step.lengths),
    }
    ratios = {name: [useful(bins[:-1], step.lengths)] for name, bins in packed.items()}
    ratios["useful_token_ratio_8"] = [useful([members for of_rank in plan for members in of_rank], step.lengths)]
    uneven = {}
    for name, of_ranks in (("", plan), ("round_robin_", dealt)):
        total, lockstep = imbalances(of_ranks, step, flops)
        uneven |= {f"{name}imbalance_8": [total], f"{name}lockstep_imbalance_8": [lockstep]}
    milliseconds = {
        "plan_ms_2048": times_ms(lambda: plan_micro_batches(*step, balanced)),
        "in_order_plan_ms_2048": times_ms(lambda: in_turn(in_order(step.lengths))),
    }
    return ratios, uneven, milliseconds


def in_turn(bins: Bins) -> list[Bins]:
    return [bins[rank::RANKS] for rank in range(RANKS)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="polyhead bench packing", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--seeds", type=int, default=5, help="of each mix of lengths")
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0] / (os.cpu_count() or 1)
    flops = sequence_flops(MODEL)
    mixes = {name: measure(draw, arguments.seeds, flops) for name, (_, draw) in MIXES.items()}
    figures = {
        **mixes["lognormal"],
        "mixes": mixes,
        "limits": {"useful_token_ratio": 0.98, "imbalance_8": 0.02, "plan_ms_2048": 50},
        "conditions": {
            "load_before": round(load_before, 2),
            "samples": f"{SAMPLES} in groups of {GROUP}, prompts of 64 to 256 tokens, completions cut at {LONGEST}",
            "lengths": {name: described for name, (described, _) in MIXES.items()},
            "max_tokens_per_gpu": MAX_TOKENS,
            "model": "Qwen3-0.6B",
            "seeds": arguments.seeds,
            "repeats": REPEATS,
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "machine": f"{platform.system()} {platform.machine()}",
        },
    }
    content = json.dumps(figures, indent=1) + "\n"
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(content)
    print(content, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
