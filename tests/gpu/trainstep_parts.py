"""One variant of a row of `trainstep.py`, its figures as the last line: `python -m tests.gpu.trainstep_parts SPEC`."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from services.common.config import Config
from services.common.process import free_port
from services.trainer.algorithms.policy_loss import clipped_surrogate
from services.trainer.backends.torch import attention as packed
from services.trainer.backends.torch import linear_logprobs as linear
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.backends.torch.linear_logprobs import linear_logprobs
from services.trainer.backends.torch.logprobs import MAX_LOGITS, to_device
from services.trainer.batch.flops import sequence_flops
from services.trainer.batch.packing import PackedBatch, PackItem, pack
from services.trainer.ranks.group import RankGroup
from tests.gpu.models import QWEN3_0_6B, write_mixture, write_model

QWEN3_4B = {
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}
# Half of Qwen3-30B-A3B's experts, and a quarter of its layers: 4.1 B parameters, 1.0 B of them for each token.
QWEN3_MOE = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}
TINY_MOE = {**TINY, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
SHAPES = {"0.6b": QWEN3_0_6B, "4b": QWEN3_4B, "moe": QWEN3_MOE}
# Dense bfloat16 of an H100 or H200 SXM.
PEAK_FLOPS = 989e12
# Sequences of each packed row of 8,192 tokens: a long tail, with prompts of 128.
LENGTHS = (4096, 1536, 1024, 640, 384, 256, 160, 96)
PROMPT = 32
ROWS, REPEATS = 8, 3


def packed_row(rng: np.random.Generator, lengths: tuple[int, ...], vocabulary: int) -> PackedBatch:
    """Of sequences of their own prompts, of which all but the prompt is trained."""
    items = []
    for number, length in enumerate(lengths):
        tokens = rng.integers(0, vocabulary, length + 1).astype(np.int32)
        predict = np.arange(PROMPT - 1, length)
        items.append(
            PackItem(
                token_ids=tokens[:-1],
                prompt_length=PROMPT,
                predict=predict,
                targets=tokens[predict + 1],
                rollout_logprobs=np.full(len(predict), -11.9, dtype=np.float32),
                fresh=np.ones(len(predict), dtype=np.bool_),
                weight=1.0 / len(predict),
                temperature=1.0,
                sample_row=number,
            )
        )
    return pack(items)


class Steps:
    """Optimizer steps of `ROWS` packed rows of 8,192 tokens of a random model."""

    def __init__(self, spec: dict[str, Any]) -> None:
        gpu = spec["device"] == "cuda"
        mixture = spec["model"] == "moe"
        self.shape = SHAPES[spec["model"]] if gpu else TINY_MOE if mixture else TINY
        self.lengths = LENGTHS if gpu else tuple(length // 32 + PROMPT for length in LENGTHS)
        directory = Path(spec["work"]) / f"model-{spec['model']}-{spec['device']}"
        if not (directory / "config.json").exists():
            write = write_mixture if mixture else write_model
            write(directory, self.shape, 0, torch.bfloat16, spec["device"])
        layers = spec["recompute"]
        recompute = {"recompute": layers != 0, "recompute_layers": layers or None}
        algorithm = {"entropy_coef": 0.0}
        config = Config(
            model={"hf_checkpoint": directory, "dtype": "bfloat16"},
            trainer={
                "device": spec["device"],
                "compile": spec["compile"],
                "algorithm": algorithm,
                "lora": spec.get("lora", {}),
                "offload": spec.get("offload", False),
                "rendezvous": f"127.0.0.1:{free_port()}",
                # An off-loaded optimizer steps on the CPU.
                "threads": max(1, (os.cpu_count() or 2) // 2),
                **recompute,
            },
        )
        if gpu:
            torch.cuda.empty_cache()
        self.backend = TorchBackend(config, RankGroup.form(config.trainer, 0))
        rng = np.random.default_rng(0)
        self.rows = [packed_row(rng, self.lengths, self.shape["vocab_size"]) for _ in range(ROWS)]
        for row in self.rows:
            row.advantages[:] = rng.normal(size=len(row.advantages))

    def run(self) -> None:
        self.backend.train(self.rows)


def forward_flops(shape: dict[str, Any], lengths: Sequence[int]) -> int:
    """Of the forward pass over sequences of `packed_row`."""
    flops = sequence_flops(shape)
    return sum(flops(length, length - PROMPT + 1) for length in lengths)


def mfu(spec: dict[str, Any]) -> dict[str, Any]:
    """``mfu = FLOPs of the model / seconds / 989e12`` of whole optimizer steps.

    FLOPs of a sequence of n tokens, m of them trained, are three times (forward and backward)
    ``2 p n + 2 H V m + 2 L h d n^2``: p parameters of the linear layers without the head, which runs for trained tokens
    only, and causal attention as half of the square. Recomputation counts nothing. With adapters it is twice the
    forward pass: a frozen weight has no gradient.
    """
    steps = Steps(spec)
    lengths = steps.lengths
    passes = 2 if spec.get("lora") else 3
    total = passes * forward_flops(steps.shape, lengths) * ROWS
    began = time.perf_counter()
    steps.run()
    first_s = time.perf_counter() - began
    seconds, peak = timed(steps.run, spec["device"] == "cuda")
    return {
        "mfu": round(total / seconds / PEAK_FLOPS, 4),
        "peak_bytes": peak,
        "tokens_per_s": round(sum(lengths) * ROWS / seconds, 1),
        "step_s": round(seconds, 4),
        "first_step_s": round(first_s, 1),
        "model_flops": total,
        "parameters": sum(weight.numel() for weight in steps.backend.weights().values()),
        "tokens": f"{ROWS} x {sum(lengths)}",
        "lengths": lengths,
    }


def profile(spec: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of the GPU by kernel, of one step, and how long it was idle."""
    steps = Steps(spec)
    for _ in range(2):
        steps.run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        steps.run()
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    kernels = {each.key: each.self_device_time_total / 1e3 for each in recorded.key_averages()}
    busy = sum(kernels.values())
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:40]
    return {
        "step_ms": round(seconds * 1e3, 1),
        "busy_ms": round(busy, 1),
        "kernels_ms": {name[:120]: round(value, 2) for name, value in longest},
    }


def logprobs(spec: dict[str, Any]) -> dict[str, Any]:
    """From hidden states of 32,768 tokens to a clipped surrogate's gradient, over a vocabulary of 151,936."""
    gpu = spec["device"] == "cuda"
    tokens, width, vocabulary = (32_768, 2560, 151_936) if gpu else (512, 64, 4096)
    device, generator = spec["device"], torch.Generator(spec["device"]).manual_seed(0)
    dtype = torch.bfloat16
    hidden = torch.randn(tokens, width, generator=generator, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator, device=device) * 0.02).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator, device=device)
    advantages = torch.randn(tokens, generator=generator, device=device)
    temperatures = torch.ones(tokens, device=device)
    chunk = max(1, MAX_LOGITS[device] // vocabulary)
    score = _scorers(chunk)[spec["variant"]]

    def step() -> None:
        hidden.grad = weight.grad = None
        values = score(hidden, weight, targets, temperatures)
        if spec["variant"] == "liger":
            values.backward()
            return
        old = values.detach() + 0.1 * advantages
        clipped_surrogate(values, old, advantages, eps_clip=0.2, eps_clip_high=0.2).loss.sum().backward()

    held = torch.cuda.memory_allocated() if gpu else 0
    step()
    hidden.grad = weight.grad = None
    seconds, peak = timed(step, gpu)
    return {
        "seconds": round(seconds, 4),
        "peak_bytes_above_inputs": peak - held,
        "one_chunk_bytes": chunk * vocabulary * 4,
        "gradient_bytes": (tokens + vocabulary) * width * 2,
        "tokens": tokens,
        "vocabulary": vocabulary,
        "width": width,
        "chunk": chunk if spec["variant"] in ("chunked", "checkpointed") else None,
    }


def _scorers(chunk: int) -> dict[str, Callable[..., torch.Tensor]]:
    """From hidden, weight, targets and temperatures to log-probs; `liger` to a cross-entropy, which is all it has."""

    def plain(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        distribution = torch.log_softmax((h @ w.t()).float() / temperature.unsqueeze(1), dim=-1)
        return distribution.gather(1, t.unsqueeze(1)).squeeze(1)

    def checkpointed(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        parts = zip(h.split(chunk), t.split(chunk), temperature.split(chunk), strict=True)
        return torch.cat([checkpoint(plain, h_, w, *more, use_reentrant=False) for h_, *more in parts])

    def liger(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss(reduction="sum")(w, h, t)

    def trls(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        return ChunkedLogProbFunction.apply(h, w, None, t, 1.0, 32_768, None, 1.0, ("log_probs", "entropy"))[0]

    return {
        "chunked": lambda h, w, t, temperature: linear_logprobs(h, w, None, t, temperature, chunk)[0],
        "checkpointed": checkpointed,
        "naive": plain,
        "liger": liger,
        "trl": trls,
    }


def attention(spec: dict[str, Any]) -> dict[str, Any]:
    """The ways of packed attention in bfloat16, outputs and gradients against the blocks in float32. `shared`: by the
    kernel, what two ranks that share the row compute, one after the other.
    """
    device = spec["device"]
    rng = np.random.default_rng(0)
    lengths = LENGTHS if device == "cuda" else tuple(length // 32 + PROMPT for length in LENGTHS)
    figures: dict[str, Any] = {}
    for heads, kv_heads, width, window in ((32, 8, 128, None), (16, 8, 128, None), (8, 8, 64, None), (16, 4, 128, 100)):
        row_of_all = packed_row(rng, lengths, 1000)
        layout = to_device(row_of_all, torch.device(device)).layout
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(sum(lengths), count, width) for count in (heads, kv_heads, kv_heads)]
        exact = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
        grad = torch.randn(shapes[0], generator=generator, device=device)
        ways = {"blocks": packed._blockwise}
        if packed._has_kernel(exact[0].bfloat16(), exact[2].bfloat16()):
            ways["varlen"] = lambda *args: packed._varlen(*args[:3], args[3].varlen, *args[4:])
        ways["shared"] = _shared(row_of_all, torch.device(device))
        wanted = _attended(packed._blockwise, exact, grad, layout, window)
        row: dict[str, Any] = {}
        for name, way in ways.items():
            work = partial(_attended, way, [each.bfloat16() for each in exact], grad.bfloat16(), layout, window)
            row[f"{name}_error"] = [round(_distance(*pair), 5) for pair in zip(work(), wanted, strict=True)]
            seconds, _ = timed(work, device == "cuda")
            row[f"{name}_ms"] = round(seconds * 1e3, 3)
        figures[f"{heads} heads, {kv_heads} of keys, width {width}, window {window}"] = row
    return figures


def exact(spec: dict[str, Any]) -> dict[str, Any]:
    """Of log-probs, entropies and their gradients: the distance from float64 as a share of its size, by the vocabulary,
    and the size of the logits; with the kernel and with torch's own operations.
    """
    device = spec["device"]
    figures: dict[str, Any] = {}
    for vocabulary in (151_936, 50_257, 7) if device == "cuda" else (1009, 7):
        for scale in (0.3, 30.0):
            generator = torch.Generator(device).manual_seed(0)
            hidden = torch.randn(300, 64, generator=generator, device=device) * scale
            weight = torch.randn(vocabulary, 64, generator=generator, device=device) * 0.125
            targets = torch.randint(0, vocabulary, (300,), generator=generator, device=device)
            temperatures = torch.rand(300, generator=generator, device=device) + 0.5
            factors = torch.randn(2, 300, generator=generator, device=device)
            inputs = (targets, temperatures, factors)
            wanted = _scored(_plain_scores, hidden.double(), weight.double(), *inputs)
            row: dict[str, Any] = {}
            for name, kernel in (("kernel", True), ("plain", False)):
                with mock.patch.object(linear, "_has_kernel", lambda logits, on=kernel: on and logits.is_cuda):
                    found = _scored(_chunked_scores, hidden, weight, *inputs)
                row[name] = [float(f"{_distance(*pair):.3g}") for pair in zip(found, wanted, strict=True)]
            figures[f"vocabulary {vocabulary}, logits of {scale}"] = row
    return {"errors_of": ["logprobs", "entropy", "gradient of hidden", "gradient of weight"], **figures}


def _scored(
    way: Any,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperatures: torch.Tensor,
    factors: torch.Tensor,
) -> list[torch.Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
    values = way(*leaves, targets, temperatures.to(hidden.dtype))
    sum((each * factor).sum() for each, factor in zip(values, factors, strict=True)).backward()
    return [*(each.detach() for each in values), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _chunked_scores(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight, targets, temperatures = inputs
    return linear_logprobs(hidden, weight, None, targets, temperatures, 128)


def _plain_scores(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight, targets, temperatures = inputs
    distribution = torch.log_softmax(hidden @ weight.t() / temperatures.unsqueeze(1), dim=-1)
    return distribution.gather(1, targets.unsqueeze(1)).squeeze(1), -(distribution.exp() * distribution).sum(dim=1)


def _attended(
    way: Any, inputs: list[torch.Tensor], grad: torch.Tensor, layout: Any, window: int | None
) -> list[torch.Tensor]:
    """The outcome, and the gradients of queries, keys and values."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = way(*leaves, layout, inputs[0].shape[-1] ** -0.5, window)
    output.backward(grad)
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _shared(row: PackedBatch, device: torch.device, ranks: int = 2) -> Callable[..., torch.Tensor]:
    """A way of attention over the whole row, by the part of each of `ranks`."""
    groups = [RankGroup(rank, ranks, context=object(), context_size=ranks) for rank in range(ranks)]
    # Numbered from 1, tokens tell which of them a rank has; 0 is filled in.
    numbered = replace(row, token_ids=np.arange(1, len(row.token_ids) + 1))
    tokens = torch.cat([to_device(numbered, device, group).token_ids for group in groups])
    own, places = (tokens - 1).clamp_min(0), tokens.argsort()[-len(row.token_ids) :]
    layouts = [to_device(row, device, group).layout.varlen for group in groups]

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _: Any, scaling: float, window: int | None
    ) -> torch.Tensor:
        queries, keys, values = (rows.index_select(0, own) for rows in (query, key, value))
        parts = zip(queries.chunk(ranks), layouts, strict=True)
        return torch.cat([packed._varlen(part, keys, values, varlen, scaling, window) for part, varlen in parts])[
            places
        ]

    return attend


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def timed(work: Callable[[], Any], gpu: bool) -> tuple[float, int]:
    """Median seconds, and on a GPU the most bytes allocated."""
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(REPEATS):
        if gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() if gpu else 0


if __name__ == "__main__":
    SPEC = json.loads(sys.argv[1])
    PARTS = {"attention": attention, "mfu": mfu, "logprobs": logprobs, "exact": exact, "profile": profile}
    print(json.dumps(PARTS[SPEC["what"]](SPEC)))
