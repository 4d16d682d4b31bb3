"""Our GRPO train step beside TRL's, on the same model and batch. `polyhead bench trainstep`.

Both sides are given one batch of prompts, completions of long-tailed lengths, old log-probs and advantages, and take
optimizer steps on it, in turn, from the same weights: `train_batch` here, `GRPOTrainer.train()` there, in an
environment of its own (`.engines/trl`), with generation replaced. Both have the same dtype, float32 master weights,
recomputation, clip, optimizer, torch's own attention kernels, and `max_tokens` a micro-batch: here tokens packed, there
rows times the longest sequence, since TRL takes a fixed number of rows and pads the whole batch to its longest.

* `tokens_per_s`, `trl_tokens_per_s`: tokens of all samples, prompts and completions, padding not counted, over the
  median seconds of a step. `trl_trimmed_tokens_per_s`: of a TRL whose micro-batches are cut to their own longest. On a
  GPU `trl_half_tokens_per_s`: of a TRL that trains bfloat16 weights without masters, in which most of each update is
  lost. `ratio_to_trl_cpu_time` is of processor time, which other work on the machine moves less; on a CPU only.
* `max_loss_diff`: the largest difference of the two losses of a step, over all steps; `losses` has each.
* `peak_bytes`: allocated on a GPU at most; on a CPU the resident size of the process, libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
OPTIMIZER = {"lr": 1e-5, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "clip_grad": 1.0, "eps_clip": 0.2}
# The shape of Qwen3-0.6B.
QWEN3_0_6B = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}
TINY = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
# By device: the shape, the dtype, samples, the longest sequence and the tokens of a micro-batch.
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"shape": TINY, "dtype": "float32", "samples": 32, "longest": 512, "max_tokens": 2048},
    "cuda": {"shape": QWEN3_0_6B, "dtype": "bfloat16", "samples": 64, "longest": 8192, "max_tokens": 16384},
}
GROUP = 8


class Side:
    """A process that takes a step for each line it is given."""

    def __init__(self, command: Sequence[str], paths: Sequence[Path]) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
        self.about = self._read()
        self.steps: list[dict[str, Any]] = []

    def step(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.steps.append(self._read())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args}: ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def make_spec(device: str, directory: Path, *, threads: int, recompute: bool, seed: int = 0) -> dict[str, Any]:
    """Completions are log-normal with a median of an eighth of the longest and a sigma of 1; one has all of it."""
    size = SIZES[device]
    rng = np.random.default_rng(seed)
    longest_prompt = size["longest"] // 32
    longest = size["longest"] - longest_prompt
    lengths = np.clip(rng.lognormal(np.log(longest / 8), 1.0, size["samples"]), 1, longest).astype(int)
    prompts = np.repeat(rng.integers(longest_prompt // 4, longest_prompt + 1, size["samples"] // GROUP), GROUP)
    lengths[-1], prompts[-GROUP:] = longest, longest_prompt
    return {
        **OPTIMIZER,
        **size,
        "device": device,
        "threads": threads,
        "recompute": recompute,
        "seed": seed,
        "group": GROUP,
        "rows": size["max_tokens"] // size["longest"],
        "prompt_lengths": prompts.tolist(),
        "completion_lengths": lengths.tolist(),
        "model": str(directory / "model"),
        "batch": str(directory / "batch.npz"),
    }


def measure(spec: dict[str, Any], directory: Path, trl_python: Path, steps: int) -> dict[str, Any]:
    """Steps of all sides in turn on a CPU, which has other work at times; one side after the other on a GPU, whose
    memory they do not share. The first of each is left out of the times.
    """
    script = str(Path(__file__).with_name("trainstep_trl.py"))
    how: dict[str, tuple[Sequence[str], Sequence[Path], dict[str, Any]]] = {
        "ours": ([sys.executable, "-m", "tests.bench.trainstep_ours"], [ROOT, ROOT / "protos"], {}),
        "trl": ([str(trl_python), script], [], {"trim": False, "master": "float32"}),
        "trl_trimmed": ([str(trl_python), script], [], {"trim": True, "master": "float32"}),
    }
    if spec["dtype"] != "float32":
        how["trl_half"] = ([str(trl_python), script], [], {"trim": False, "master": spec["dtype"]})
    sides: dict[str, Side] = {}

    def start(name: str) -> None:
        command, paths, more = how[name]
        file = directory / f"{name}.json"
        file.write_text(json.dumps(spec | more))
        sides[name] = Side([*command, str(file)], paths)

    def step(name: str, number: int) -> None:
        sides[name].step()
        print(f"step {number} {name}: {sides[name].steps[-1]}", file=sys.stderr, flush=True)

    try:
        if spec["device"] == "cpu":
            for name in how:
                start(name)
            for number in range(steps + 1):
                for name in how:
                    step(name, number)
        else:
            for name in how:
                start(name)
                for number in range(steps + 1):
                    step(name, number)
                sides[name].close()
        return figures(spec, sides)
    finally:
        for side in sides.values():
            side.close()


def figures(spec: dict[str, Any], sides: dict[str, Side]) -> dict[str, Any]:
    tokens = sum(spec["prompt_lengths"]) + sum(spec["completion_lengths"])
    seconds = {name: statistics.median(step["seconds"] for step in side.steps[1:]) for name, side in sides.items()}
    worked = {name: statistics.median(step["cpu_seconds"] for step in side.steps[1:]) for name, side in sides.items()}
    rates = {name: tokens / value for name, value in seconds.items()}
    losses = {name: np.array([step["loss"] for step in side.steps]) for name, side in sides.items()}
    others = [name for name in sides if name != "ours"]
    return {
        "tokens_per_s": round(rates["ours"], 1),
        **{f"{name}_tokens_per_s": round(rates[name], 1) for name in others},
        **{f"ratio_to_{name}": round(rates["ours"] / rates[name], 3) for name in others},
        **({"ratio_to_trl_cpu_time": round(worked["trl"] / worked["ours"], 3)} if spec["device"] == "cpu" else {}),
        "max_loss_diff": float(np.abs(losses["ours"] - losses["trl"]).max()),
        "losses": {name: [round(loss, 7) for loss in of_side.tolist()] for name, of_side in losses.items()},
        "peak_bytes": max(step["peak_bytes"] for step in sides["ours"].steps),
        **{f"{name}_peak_bytes": max(step["peak_bytes"] for step in sides[name].steps) for name in others},
        "seconds": {name: [round(step["seconds"], 4) for step in side.steps] for name, side in sides.items()},
        "micro_batches": sides["ours"].steps[-1]["micro_batches"],
        "trl_micro_batches": spec["samples"] // spec["rows"],
        "clip_fraction": round(sides["ours"].steps[0]["clip_fraction"], 4),
        "versions": sides["ours"].about["versions"],
        "trl_versions": sides["trl"].about["versions"],
        "parameters": sides["ours"].about["parameters"],
    }


def conditions(spec: dict[str, Any]) -> dict[str, Any]:
    lengths = spec["completion_lengths"]
    sizes = ("device", "dtype", "samples", "group", "longest", "max_tokens", "rows", "recompute", "threads", "shape")
    return {
        **{name: spec[name] for name in sizes},
        "optimizer": OPTIMIZER,
        "completions": {"median": statistics.median(lengths), "mean": round(statistics.mean(lengths), 1)},
        "loss": "GRPO, clipped surrogate, mean over samples of the token mean, no KL",
        "attention": "ours: packed (blocks by SDPA on a CPU, varlen flash on a GPU); TRL: sdpa over padded rows",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="polyhead bench trainstep", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--device", choices=sorted(SIZES), default="cpu")
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".engines" / "trl" / "bin" / "python")
    parser.add_argument("--steps", type=int, default=5, help="timed, of each side; one more comes first")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on each side")
    parser.add_argument("--recompute", action="store_true", help="activations, on both sides")
    arguments = parser.parse_args()
    if not arguments.trl_python.exists():
        parser.error(f"{arguments.trl_python} is not there: make trl-env, or --trl-python")
    load_before = os.getloadavg()[0] / (os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as directory:
        spec = make_spec(arguments.device, Path(directory), threads=arguments.threads, recompute=arguments.recompute)
        row = measure(spec, Path(directory), arguments.trl_python, arguments.steps)
    row["limits"] = {"ratio_to_trl": 1.5}
    row["conditions"] = {"load_before": round(load_before, 2), "steps": arguments.steps, **conditions(spec)}
    content = json.dumps(row, indent=1) + "\n"
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(content)
    print(content, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
