"""The trainer's ranks over NCCL, one on each of two GPUs, beside one rank: `python -m tests.gpu.ranks --out ranks.json
--work DIR`.

* `float32`: a small model. The largest difference of a gradient from that of one rank, as a share of the largest
  component of that tensor's, with a row for each rank and with rows that both share (I10).
* `0.6b`: bfloat16, optimizer steps of 8 rows of 8,192 tokens: seconds, and memory of each GPU.

`--cpu` goes through it over gloo with tiny rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
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
from tests.gpu.trainstep_parts import LENGTHS, PROMPT, ROWS, packed_row, timed

SMALL = {**QWEN3_0_6B, "vocab_size": 8192, "num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 1536}
TINY = {**SMALL, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "head_dim": 32}
# Ranks, and how many of them share each row.
LAYOUTS = {"one rank": (1, 1), "two ranks": (2, 1), "two ranks share rows": (2, 2)}


def rank_main(spec: dict[str, Any]) -> None:
    """One rank. Rank 0 prints the figures, and leaves the gradients in a file."""
    device, ranks, share = spec["device"], spec["ranks"], spec["share"]
    config = Config(
        model={"hf_checkpoint": spec["model"], "dtype": spec["dtype"]},
        trainer={
            "device": device,
            "ranks": ranks,
            "context_parallel": share,
            "rendezvous": f"127.0.0.1:{spec['port']}",
            "optimizer": {"lr": 1e-6},
        },
    )
    group = RankGroup.form(config.trainer, spec["rank"])
    backend = TorchBackend(config, group)
    rng = np.random.default_rng(0)
    rows = [packed_row(rng, tuple(spec["lengths"]), backend.vocab_size) for _ in range(ROWS)]
    for row in rows:
        row.advantages[:] = rng.normal(size=len(row.advantages))
    own = rows[group.part :: group.parts]
    result = backend.accumulate(own)
    gradients = {}
    for name, master in backend._optimizer._masters.items():
        whole = gathered(master.grad, torch.float32, torch.device(device))
        if whole is not None:
            gradients[name] = whole.cpu()
    backend.train(own)
    seconds, peak = timed(lambda: backend.train(own), device == "cuda")
    peaks = group.all_gather(peak)
    if group.leads:
        save_file(gradients, spec["gradients"])
        tokens = sum(spec["lengths"]) * ROWS
        figures = {"loss": result.loss, "step_s": round(seconds, 4), "tokens_per_s": round(tokens / seconds, 1)}
        print(json.dumps({**figures, "peak_bytes": peaks}), flush=True)
    else:
        group.receive()
    group.close()


def run(options: argparse.Namespace, row: str, layout: str, model: Path, lengths: list[int]) -> dict[str, Any]:
    ranks, share = LAYOUTS[layout]
    device = "cpu" if options.cpu else "cuda"
    gradients = options.work / f"{row}-{layout}.safetensors"
    spec = {"device": device, "ranks": ranks, "share": share, "model": str(model), "port": free_port()}
    spec |= {"lengths": lengths, "gradients": str(gradients), "dtype": "float32" if row == "float32" else "bfloat16"}
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


def difference(options: argparse.Namespace, row: str, layout: str) -> float:
    own, wanted = (load_file(options.work / f"{row}-{name}.safetensors") for name in (layout, "one rank"))
    assert own.keys() == wanted.keys()
    return max(float((own[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rank", help="the specification of one rank, for the processes that this one starts")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--rows", nargs="+", default=["float32", "0.6b"])
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    if options.rank:
        rank_main(json.loads(options.rank))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    lengths = [length // 32 + PROMPT for length in LENGTHS] if options.cpu else list(LENGTHS)
    found: dict[str, Any] = {}
    for row in options.rows:
        shape = TINY if options.cpu else SMALL if row == "float32" else QWEN3_0_6B
        dtype, device = torch.float32 if row == "float32" else torch.bfloat16, "cpu" if options.cpu else "cuda"
        model = write_model(options.work / f"model-{row}", shape, 0, dtype, device)
        found[row] = {}
        for layout in LAYOUTS if row == "float32" else ("one rank", "two ranks"):
            figures = found[row][layout] = run(options, row, layout, model, lengths)
            if layout != "one rank" and "error" not in figures:
                figures["gradient_difference"] = difference(options, row, layout)
            print(f"{row}, {layout}: {figures}", flush=True)
    found["host"] = host("cpu" if options.cpu else "cuda")
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
