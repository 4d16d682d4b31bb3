"""What Hugging Face's models say about the same tokens: the independent judge of the engine's numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel


def load_reference(model_path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Of a mixture of experts, one expert after the other: what else there is takes no float64."""
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, experts_implementation="eager").eval()


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Hugging Face's own generate, which stops at the end-of-sequence token."""
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()


@torch.no_grad()
def teacher_forced(
    model: PreTrainedModel, prompt: list[int], completion: list[int], temperature: float = 1.0
) -> list[float]:
    """Log-probability of each completion token given all tokens before it."""
    ids = torch.tensor([[*prompt, *completion]])
    return _chosen(model(ids).logits[0, len(prompt) - 1 : -1], ids[0, len(prompt) :], temperature)


class Segment(NamedTuple):
    """Completion tokens [start, end) as one model drew them."""

    model: PreTrainedModel
    start: int
    end: int
    carried: bool
    """On the KV cache of the segment before, as far as that had come; else on one of its own."""


@torch.no_grad()
def teacher_forced_by_segments(segments: Iterable[Segment], prompt: list[int], completion: list[int]) -> list[float]:
    """Log-probability of each completion token by the model that drew it.

    The last token of a segment has not been fed yet when it ends, so it is the first that the next one computes.
    """
    ids = torch.tensor([[*prompt, *completion]])
    logprobs: list[float] = []
    cache, fed = DynamicCache(), 0
    for segment in segments:
        if not segment.carried:
            cache, fed = DynamicCache(), 0
        first, last = len(prompt) + segment.start - 1, len(prompt) + segment.end - 1
        logits = segment.model(ids[:, fed:last], past_key_values=cache, use_cache=True).logits[0]
        logprobs += _chosen(logits[first - fed :], ids[0, first + 1 : last + 1])
        fed = last
    return logprobs


def teacher_forced_after_swap(
    old: PreTrainedModel, new: PreTrainedModel, prompt: list[int], completion: list[int], swapped_at: int
) -> list[float]:
    """Log-probabilities when `new` replaced `old` after `swapped_at` completion tokens and the KV cache was kept."""
    segments = [Segment(old, 0, swapped_at, False), Segment(new, swapped_at, len(completion), True)]
    return teacher_forced_by_segments(segments, prompt, completion)


def _chosen(logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0) -> list[float]:
    """`logits` [N, vocab] and the N tokens drawn from them."""
    logprobs = (logits.double() / temperature).log_softmax(-1)
    return logprobs.gather(1, tokens[:, None]).squeeze(1).tolist()
