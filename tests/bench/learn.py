"""Does each algorithm learn, and what does asynchrony cost? `make learn`: the demo's task, over three seeds.

Every variant is a whole run of all services from the same warmed-up model of its seed. A run's figures are written as
soon as it is over, and one that has them is not run again: a campaign that was cut off goes on where it was.

* ``start``, ``end``: mean reward of the first and the last `EDGE` steps; ``gain`` is their difference.
* ``reward``: means of `BIN` steps each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from services.cli.demo.addition import prepare
from services.cli.demo.common import config_file
from services.common.config import dump, load
from services.common.process import die_with_parent
from tests.bench.learn_curves import draw

ROOT = Path(__file__).parents[2]
EDGE, BIN = 20, 10
LIMIT_S = 3600.0
TRAIN = "trainer.algorithm"
RECOMPUTED = {f"{TRAIN}.old_logprobs": "recomputed"}
TIS = {**RECOMPUTED, f"{TRAIN}.correction.weights": "clip"}
PER_SAMPLE = {f"{TRAIN}.loss_reduction": "per_sample"}

# What differs from deploy/config/demo.toml, by variant.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {f"{TRAIN}.name": "dr_grpo", f"{TRAIN}.loss_reduction": "constant"},
    "gspo": {f"{TRAIN}.name": "gspo", **PER_SAMPLE},
    # Weights up to 5, and no lower bound, as in arXiv:2510.13786.
    "cispo": {f"{TRAIN}.name": "cispo", f"{TRAIN}.eps_clip": 1.0, f"{TRAIN}.eps_clip_high": 4.0},
    "rloo": {f"{TRAIN}.name": "rloo"},
    "reinforce_plus_plus": {f"{TRAIN}.name": "reinforce_plus_plus"},
    "reinforce_plus_plus_baseline": {f"{TRAIN}.name": "reinforce_plus_plus_baseline"},
    "ppo": {f"{TRAIN}.name": "ppo", f"{TRAIN}.lambd": 0.95},
}
ASYNC: dict[str, dict[str, Any]] = {
    "synchronous": {"staleness.max_staleness": 0, **RECOMPUTED},
    "staleness-4-corrected": {"staleness.max_staleness": 4, **TIS},
    "staleness-4-uncorrected": {"staleness.max_staleness": 4, **RECOMPUTED},
    "staleness-16-corrected": {"staleness.max_staleness": 16, **TIS},
    "staleness-16-uncorrected": {"staleness.max_staleness": 16, **RECOMPUTED},
}
VARIANTS = ALGORITHMS | ASYNC


def prepare_models(work: Path, seeds: Sequence[int]) -> None:
    for seed in seeds:
        prepare(work / "models" / str(seed), work / "prompts.jsonl", seed)


def run(work: Path, steps: int, variant: str, seed: int) -> dict[str, Any] | None:
    """The figures of a run, made or found; None when it fails."""
    result = work / "results" / f"{variant}.{seed}.{steps}.json"
    if result.exists():
        figures: dict[str, Any] = json.loads(result.read_bytes())
        return figures
    directory = work / "runs" / f"{variant}-{seed}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    file = directory.with_suffix(".toml")
    file.write_text(dump(load(config_file("demo.toml"), _settings(work, directory, steps, seed) | VARIANTS[variant])))
    began = time.monotonic()
    with directory.with_suffix(".out").open("wb") as output:
        status = _finish(["-m", "services.cli.main", "up", "-c", str(file)], output)
    if status != 0:
        print(f"{variant}, seed {seed}: ended with {status}, see {directory.with_suffix('.out')}", flush=True)
        return None
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    figures = run_figures(lines) | {"wall_s": round(time.monotonic() - began, 1)}
    result.parent.mkdir(parents=True, exist_ok=True)
    partial_file = result.with_suffix(".partial")
    partial_file.write_text(json.dumps(figures))
    partial_file.rename(result)
    shutil.rmtree(directory, ignore_errors=True)
    print(f"{variant}, seed {seed}: {figures['start']} -> {figures['end']}, {figures['wall_s']} s", flush=True)
    return figures


def _settings(work: Path, directory: Path, steps: int, seed: int) -> dict[str, Any]:
    return {
        "run.dir": str(directory),
        "run.seed": seed,
        "run.num_rollout": steps,
        "data.seed": seed,
        "model.hf_checkpoint": str(work / "models" / str(seed)),
        "data.prompt_data": str(work / "prompts.jsonl"),
        "trainer.checkpoint.save_interval": steps,
        "trainer.checkpoint.export_hf": False,
    }


def _finish(arguments: Sequence[str], output: Any) -> int:
    paths = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "protos"), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=partial(die_with_parent, os.getpid()),
    )
    try:
        return process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        process.terminate()
        return process.wait()


def run_figures(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the lines of metrics.jsonl; a step that is there twice counts as it was last."""
    steps = sorted({line["step"]: line for line in lines}.items())
    rewards = [line["reward_mean"] for _, line in steps]
    samples = [(int(behind), count) for _, line in steps for behind, count in line["staleness"].items()]
    start, end = statistics.mean(rewards[:EDGE]), statistics.mean(rewards[-EDGE:])
    return {
        "start": round(start, 4),
        "end": round(end, 4),
        "gain": round(end - start, 4),
        "staleness_mean": round(sum(behind * count for behind, count in samples) / sum(n for _, n in samples), 3),
        "mismatch_kl": round(statistics.mean(line["mismatch_kl"] for _, line in steps), 6),
        "reward": [round(statistics.mean(rewards[first : first + BIN]), 4) for first in range(0, len(rewards), BIN)],
    }


def summary(found: Mapping[str, Mapping[int, dict[str, Any]]]) -> dict[str, Any]:
    """By variant: its seeds, and the mean and spread over them."""
    rows: dict[str, Any] = {}
    for variant, by_seed in found.items():
        if not by_seed:
            continue
        gains, ends = ([each[name] for each in by_seed.values()] for name in ("gain", "end"))
        rows[variant] = {
            "gain_mean": round(statistics.mean(gains), 4),
            "gain_min": min(gains),
            "gain_max": max(gains),
            "end_mean": round(statistics.mean(ends), 4),
            "end_min": min(ends),
            "end_max": max(ends),
            "seeds": {str(seed): by_seed[seed] for seed in sorted(by_seed)},
        }
    return rows


def table(rows: Mapping[str, Any]) -> str:
    """For docs/algorithms.md."""
    lines = ["| | reward at the end, mean (of each seed) | gain, mean (spread) | mean staleness |", "|---|---|---|---|"]
    for variant, row in rows.items():
        seeds = row["seeds"].values()
        ends = ", ".join(f"{each['end']:.2f}" for each in seeds)
        behind = statistics.mean(each["staleness_mean"] for each in seeds)
        spread = f"{row['gain_min']:+.2f} to {row['gain_max']:+.2f}"
        lines.append(
            f"| {variant} | {row['end_mean']:.3f} ({ends}) | {row['gain_mean']:+.3f} ({spread}) | {behind:.1f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make learn", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="the figures; the curves go beside it, as PNG")
    parser.add_argument("--work", type=Path, required=True, help="for runs; what is finished there is not run again")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time; each keeps about two cores busy")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    options = parser.parse_args()
    seeds = range(options.seeds)
    prepare_models(options.work, seeds)
    # All variants of a seed before the next: what is there early is comparable.
    jobs = [(variant, seed) for seed in seeds for variant in options.variants]
    found: dict[str, dict[int, dict[str, Any]]] = {variant: {} for variant in options.variants}
    with ThreadPoolExecutor(options.workers) as pool:
        results = pool.map(lambda job: run(options.work, options.steps, *job), jobs)
        for (variant, seed), figures in zip(jobs, results, strict=True):
            if figures is not None:
                found[variant][seed] = figures
                _write(options, summary(found))
    rows = summary(found)
    print(table(rows))
    return int(any(len(by_seed) < options.seeds for by_seed in found.values()))


def _write(options: argparse.Namespace, rows: dict[str, Any]) -> None:
    conditions = {
        "task": "deploy/config/demo.toml: one-digit addition, 8 groups of 8 samples a step",
        "steps": options.steps,
        "edge": EDGE,
        "bin": BIN,
        "workers": options.workers,
        "cores": os.cpu_count(),
        "variants": {name: VARIANTS[name] for name in rows},
    }
    content = {"limits": {"gain_mean": 0.3}, "variants": rows, "conditions": conditions}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(content, indent=1) + "\n")
    panels = {"algorithms": list(ALGORITHMS), "asynchrony": list(ASYNC)}
    draw(options.json.with_suffix(".png"), rows, panels, BIN)


if __name__ == "__main__":
    sys.exit(main())
