"""The trainer's step on one GPU: figures for docs/benchmarks/trainstep.json.

`python -m tests.gpu.trainstep --out trainstep.json --work DIR`, see README.md here. Each variant of a row runs in a
process of its own, so that one that does not fit in memory leaves nothing behind; what it says then is the figure.
`--cpu` runs every step of it with tiny shapes, without a claim.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OUT_OF_MEMORY = "out of memory"
WAYS = ("eager", "compiled")
# Layers whose activations are computed again, from none to all: the first that fits is the row's figure.
KEPT = (0, 12, 24, 30, None)


def attention(options: argparse.Namespace) -> dict[str, Any]:
    """The varlen kernel, the blocks, and ranks that share a row, against float32."""
    return one("attention", options)


def mfu(
    model: str, kept: tuple[int | None, ...] = KEPT, **settings: Any
) -> Callable[[argparse.Namespace], dict[str, Any]]:
    """Eager and compiled, as far as that is asked for."""

    def measured(options: argparse.Namespace) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for way in options.ways:
            for layers in kept:
                found[way] = one("mfu", options, model=model, compile=way == "compiled", recompute=layers, **settings)
                if OUT_OF_MEMORY not in found[way].get("error", ""):
                    break
        return found

    return measured


def profiles(options: argparse.Namespace) -> dict[str, Any]:
    """Where the time of a compiled step goes."""
    return {model: one("profile", options, model=model, compile=True, recompute=0) for model in ("0.6b", "4b")}


def logprobs(options: argparse.Namespace) -> dict[str, Any]:
    variants = ("chunked", "checkpointed", "naive", "liger", "trl")
    return {variant: one("logprobs", options, variant=variant) for variant in variants}


def exact(options: argparse.Namespace) -> dict[str, Any]:
    """The kernel between logits and log-probs, and torch's own operations, against float64."""
    return one("exact", options)


def trl(options: argparse.Namespace) -> dict[str, Any]:
    """`polyhead bench trainstep` on the GPU, with the interpreter that has TRL."""
    if options.trl_python is None:
        return {"error": "no --trl-python"}
    with tempfile.TemporaryDirectory(dir=options.work) as directory:
        file = Path(directory) / "figures.json"
        command = [sys.executable, "-m", "tests.bench.bench_trainstep", "--device", options.device]
        command += ["--trl-python", str(options.trl_python), "--json", str(file), "--steps", "2"]
        environment = {**os.environ, "TMPDIR": directory}
        done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            return {"error": done.stderr.strip().splitlines()[-30:]}
        figures: dict[str, Any] = json.loads(file.read_bytes())
    return figures


ROWS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "attention": attention,
    "mfu-0.6b": mfu("0.6b"),
    "mfu-4b": mfu("4b"),
    "mfu-4b-lora": mfu("4b", lora={"rank": 32, "alpha": 64}),
    "mfu-4b-offload": mfu("4b", (None,), offload=True),
    "mfu-moe": mfu("moe"),
    "logprobs-32k": logprobs,
    "logprobs-exact": exact,
    "trl": trl,
    "profile": profiles,
}


def one(what: str, options: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    """The figures of one variant; {"error": ...} when it fails."""
    spec = {"what": what, "device": options.device, "work": str(options.work), **settings}
    command = [sys.executable, "-m", "tests.gpu.trainstep_parts", json.dumps(spec)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        error = OUT_OF_MEMORY if "OutOfMemoryError" in done.stderr else lines[-1][:300]
        print(f"  {settings}: {error}", flush=True)
        return {"error": error, **settings}
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"  {settings}: {figures}", flush=True)
    return {**figures, **settings}


def host(device: str) -> dict[str, str]:
    import torch
    import transformers

    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu_cores": str(os.cpu_count()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON; rows that are there already are kept")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--work", type=Path, required=True, help="for models: 9 GB, best in memory")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of the rows mfu-*")
    parser.add_argument("--trl-python", type=Path, help="an interpreter that has TRL")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    options.device = "cpu" if options.cpu else "cuda"
    options.work.mkdir(parents=True, exist_ok=True)
    merged = json.loads(options.out.read_bytes()) if options.out.exists() else {}
    for row in options.rows:
        print(row, flush=True)
        began = time.monotonic()
        figures = ROWS[row](options)
        merged[row] = {**figures, "wall_s": round(time.monotonic() - began, 1), "host": host(options.device)}
        options.out.write_text(json.dumps(merged, indent=1) + "\n")
        print(f"{row}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
