"""What Hugging Face's models say about the same tokens: the independent judge of the engine's numbers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def load_reference(model_path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).eval()


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
    return _chosen(model(ids).logits[0], ids[0], len(prompt), temperature)


@torch.no_grad()
def teacher_forced_after_swap(
    old: PreTrainedModel, new: PreTrainedModel, prompt: list[int], completion: list[int], swapped_at: int
) -> list[float]:
    """Log-probabilities when `new` replaced `old` after `swapped_at` completion tokens and the KV cache was kept.

    The last token drawn by `old` had not been fed yet, so it is the first that `new` computes.
    """
    ids = torch.tensor([[*prompt, *completion]])
    boundary = len(prompt) + swapped_at - 1
    before = old(ids[:, :boundary], use_cache=True)
    after = new(ids[:, boundary:], past_key_values=before.past_key_values, use_cache=True)
    return _chosen(torch.cat((before.logits[0], after.logits[0])), ids[0], len(prompt), 1.0)


def _chosen(logits: torch.Tensor, ids: torch.Tensor, start: int, temperature: float) -> list[float]:
    logprobs = (logits[start - 1 : -1].double() / temperature).log_softmax(-1)
    return logprobs.gather(1, ids[start:, None]).squeeze(1).tolist()
