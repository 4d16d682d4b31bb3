"""The trainer's ranks over NCCL, one on each of two GPUs, beside one rank: `python -m tests.gpu.ranks --out ranks.json
--work DIR`.

* `float32`: a small model. The largest difference of a gradient from that of one rank, as a share of the largest
  component of that tensor's, with a row for each rank and with rows that both share (I10).
* `0.6b`, `4b`: bfloat16, optimizer steps of 8 rows of 8,192 tokens: seconds, model FLOPs utilisation, and the memory of
  each GPU.
* `0.6b-long`: rows of 32,768 tokens, most of them of one sequence, which both ranks share.

`--cpu` goes through it over gloo with tiny models and rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from services.common.config import Config
from services.common.process import free_port
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.backends.torch.sharding import gathered
from services.trainer.ranks.group import RankGroup
from tests.gpu.models import QWEN3_0_6B, write_model
from tests.gpu.trainstep import ROOT, host
from tests.gpu.trainstep_parts import LENGTHS, PEAK_FLOPS, PROMPT, QWEN3_4B, forward_flops, packed_row, timed

SMALL = {**QWEN3_0_6B, "vocab_size": 8192, "num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 1536}
TINY = {**SMALL, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "head_dim": 32}
LONG = (24_576, 4096, 2048, 1024, 512, 256, 160, 96)
# Ranks, and how many of them share each row.
LAYOUTS = {"one rank": (1, 1), "two ranks": (2, 1), "two ranks share rows": (2, 2)}


@dataclass(frozen=True)
class Row:
    shape: dict[str, Any]
    dtype: str = "bfloat16"
    lengths: tuple[int, ...] = LENGTHS
    rows: int = 8
    compile: bool = False
    recompute: int | None = 0
    """Of the first so many layers activations are computed again; None: of all."""
    layouts: tuple[str, ...] = ("one rank", "two ranks")


ROWS = {
    "float32": Row(SMALL, "float32", layouts=tuple(LAYOUTS)),
    "0.6b": Row(QWEN3_0_6B, compile=True),
    # One GPU of 80 GB does not hold its optimizer.
    "4b": Row(QWEN3_4B, compile=True, recompute=18, layouts=("two ranks",)),
    "0.6b-long": Row(QWEN3_0_6B, lengths=LONG, rows=4, recompute=None, layouts=tuple(LAYOUTS)),
}


def rank_main(spec: dict[str, Any]) -> None:
    """One rank. Rank 0 prints the figures, and leaves the gradients in a file if they are to be compared."""
    device, ranks, share = spec["device"], spec["ranks"], spec["share"]
    config = Config(
        model={"hf_checkpoint": spec["model"], "dtype": spec["dtype"]},
        trainer={
            "device": device,
            "ranks": ranks,
            "context_parallel": share,
            "rendezvous": f"127.0.0.1:{spec['port']}",
            "optimizer": {"lr": 1e-6},
            "compile": spec["compile"],
            "recompute": spec["recompute"] != 0,
            "recompute_layers": spec["recompute"] or None,
        },
    )
    group = RankGroup.form(config.trainer, spec["rank"])
    backend = TorchBackend(config, group)
    rng = np.random.default_rng(0)
    rows = [packed_row(rng, tuple(spec["lengths"]), backend.vocab_size) for _ in range(spec["rows"])]
    for row in rows:
        row.advantages[:] = rng.normal(size=len(row.advantages))
    own = rows[group.part :: group.parts]
    result = backend.accumulate(own)
    gradients = {}
    for name, master in backend._optimizer._masters.items() if spec["gradients"] else ():
        whole = gathered(master.grad, torch.float32, torch.device(device))
        if whole is not None:
            gradients[name] = whole.cpu()
    backend.train(own)
    seconds, peak = timed(lambda: backend.train(own), device == "cuda")
    peaks = group.all_gather(peak)
    if group.leads:
        if spec["gradients"]:
            save_file(gradients, spec["gradients"])
        tokens = sum(spec["lengths"]) * spec["rows"]
        flops = 3 * spec["rows"] * forward_flops(backend.model.config.to_dict(), spec["lengths"])
        figures = {"loss": result.loss, "step_s": round(seconds, 4), "tokens_per_s": round(tokens / seconds, 1)}
        figures["mfu"] = round(flops / seconds / ranks / PEAK_FLOPS, 4)
        print(json.dumps({**figures, "peak_bytes": peaks}), flush=True)
    else:
        group.receive()
    group.close()


def run(options: argparse.Namespace, name: str, layout: str, model: Path) -> dict[str, Any]:
    row, (ranks, share) = ROWS[name], LAYOUTS[layout]
    lengths = [length // 32 + PROMPT for length in row.lengths] if options.cpu else row.lengths
    gradients = options.work / f"{name}-{layout}.safetensors"
    spec = {
        "device": "cpu" if options.cpu else "cuda",
        "ranks": ranks,
        "share": share,
        "model": str(model),
        "port": free_port(),
        "gradients": str(gradients) if "one rank" in row.layouts else None,
        "lengths": lengths,
        "rows": row.rows,
        "dtype": row.dtype,
        "compile": row.compile and not options.cpu,
        "recompute": row.recompute,
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.ranks", "--rank", json.dumps(spec | {"rank": rank})],
            cwd=ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        return {"error": [process.returncode for process in processes]}
    figures: dict[str, Any] = json.loads(said[0].splitlines()[-1])
    return figures


def difference(options: argparse.Namespace, name: str, layout: str) -> float:
    own, wanted = (load_file(options.work / f"{name}-{each}.safetensors") for each in (layout, "one rank"))
    assert own.keys() == wanted.keys()
    return max(float((own[each] - wanted[each]).abs().max() / wanted[each].abs().max()) for each in wanted)


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    row = ROWS[name]
    model = options.work / f"model-{name}"
    dtype, device = getattr(torch, row.dtype), "cpu" if options.cpu else "cuda"
    write_model(model, TINY if options.cpu else row.shape, 0, dtype, device)
    found: dict[str, Any] = {}
    for layout in row.layouts:
        figures = found[layout] = run(options, name, layout, model)
        if layout != "one rank" and "one rank" in row.layouts and "error" not in figures:
            figures["gradient_difference"] = difference(options, name, layout)
        print(f"{name}, {layout}: {figures}", flush=True)
    conditions = {"dtype": row.dtype, "rows": row.rows, "lengths": row.lengths}
    return {**found, **conditions, "compile": row.compile, "recompute": row.recompute}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rank", help="the specification of one rank, for the processes that this one starts")
    parser.add_argument("--out", type=Path, help="JSON; rows that are there already are kept")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    if options.rank:
        rank_main(json.loads(options.rank))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    merged = json.loads(options.out.read_bytes()) if options.out.exists() else {}
    for name in options.rows:
        began = time.monotonic()
        figures = measure(options, name)
        merged[name] = {**figures, "wall_s": round(time.monotonic() - began, 1)}
        merged["host"] = host("cpu" if options.cpu else "cuda")
        options.out.write_text(json.dumps(merged, indent=1) + "\n")


if __name__ == "__main__":
    main()
