"""How far real SGLang's log-probs are from the trainer's, at equal weights, by where each side rounds.

Two engines on two GPUs generate with SmolLM2-135M-Instruct in bf16, one with logits rounded to that and one without;
the trainer's model, whose logits are float32, then scores the same tokens, its residual stream in bf16 and in float32.
`python -m tests.gpu.mismatch --gguf FILE --work DIR --out mismatch.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer

from services.cli.demo.smollm2 import convert_file
from services.rollout.engines.client import EngineClient
from services.rollout.engines.messages import GenerateRequest
from services.trainer.algorithms.kl import k3
from services.trainer.backends.torch.logprobs import to_device, token_logprobs
from services.trainer.backends.torch.model import load_model
from services.trainer.backends.torch.sharding import Placement, Root
from services.trainer.batch.packing import PackItem, pack
from tests.gpu.first_run import write_prompts
from tests.gpu.rollout import host, running_engine

REQUESTS, LENGTH = 256, 256
# Completions in a packed row.
ROW = 32


class Sampled(NamedTuple):
    prompt: int
    token_ids: list[int]
    """Prompt and completion."""
    logprobs: list[float]
    """Of the completion, by the engine."""


def sample(model: Path, prompts: list[list[int]], directory: Path, number: int) -> list[Sampled]:
    """The completions of the engine on GPU `number`; that on GPU 1 does not round its logits."""
    log = directory / f"engine-{number}.log"
    with running_engine(model, log, base_gpu=number, float32_logits=bool(number), context_length=1024) as (url, key):
        return asyncio.run(_generate(url, key, prompts))


async def _generate(url: str, key: str, prompts: list[list[int]]) -> list[Sampled]:
    async with EngineClient(url, key) as client:

        async def one(ids: list[int], number: int) -> Sampled:
            request = GenerateRequest(
                rid=f"m{number}",
                input_ids=ids,
                max_new_tokens=LENGTH,
                temperature=1.0,
                top_p=1.0,
                top_k=-1,
                stop=[],
                stop_token_ids=[],
                sampling_seed=number,
            )
            tokens: list[int] = []
            logprobs: list[float] = []
            async for _, chunk in client.generate([request], "m"):
                tokens += chunk.token_ids
                logprobs += chunk.logprobs
            return Sampled(len(ids), ids + tokens, logprobs)

        return list(await asyncio.gather(*(one(ids, number) for number, ids in enumerate(prompts))))


def score(root: Root, sampled: Sequence[Sampled], device: torch.device) -> torch.Tensor:
    """Log-probs of all completions, as the trainer packs and computes them."""
    found = []
    for start in range(0, len(sampled), ROW):
        part = [_item(each, row) for row, each in enumerate(sampled[start : start + ROW])]
        with torch.no_grad():
            found.append(root.run(token_logprobs, to_device(pack(part), device)).logprobs.cpu())
    return torch.cat(found)


def _item(each: Sampled, row: int) -> PackItem:
    count = len(each.logprobs)
    return PackItem(
        token_ids=np.array(each.token_ids[:-1], dtype=np.int32),
        prompt_length=each.prompt,
        predict=np.arange(each.prompt - 1, len(each.token_ids) - 1),
        targets=np.array(each.token_ids[each.prompt :], dtype=np.int32),
        rollout_logprobs=np.array(each.logprobs, dtype=np.float32),
        fresh=np.ones(count, dtype=np.bool_),
        weight=0.0,
        temperature=1.0,
        sample_row=row,
    )


def compare(model: Path, engines: list[list[Sampled]]) -> list[dict[str, Any]]:
    """For each way of the engine and of the trainer: mean k3 over tokens, and the mean absolute difference."""
    device = torch.device("cuda:0")
    rows = []
    for wide in (False, True):
        root = load_model(model, "bfloat16", Placement(device, wide_residuals=wide))
        for number, sampled in enumerate(engines):
            theirs = torch.cat([torch.tensor(each.logprobs) for each in sampled])
            ours = score(root, sampled, device)
            row = {
                "engine_logits": ("bfloat16", "float32")[number],
                "trainer_residuals": ("bfloat16", "float32")[wide],
                "tokens": len(ours),
                "mismatch_kl": k3(theirs, ours).mean().item(),
                "mean_abs": (theirs - ours).abs().mean().item(),
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    model = options.work / "model"
    convert_file(options.gguf, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = [json.loads(line) for line in write_prompts(options.work / "prompts.jsonl", REQUESTS).open()]
    prompts = [
        tokenizer.apply_chat_template(line["messages"], add_generation_prompt=True, return_dict=True)["input_ids"]
        for line in lines
    ]
    with ThreadPoolExecutor(2) as pool:
        engines = list(pool.map(lambda number: sample(model, prompts, options.work, number), range(2)))
    rows = compare(model, engines)
    options.out.write_text(json.dumps({"host": host(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
