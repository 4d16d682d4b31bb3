"""A batch with everything in it that is uneven, and its log-probs as transformers gives them, unpacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from services.trainer.batch.samples import TrainSample, decode_groups
from tests.kit.trainer_batch import make_group, make_sample


def ragged_samples(seed: int, *, segments: bool = False) -> list[TrainSample]:
    """Prompts of several lengths, completions from 1 to 90 tokens, masks with holes, an empty one, a group of one.

    With `segments`, every other sample has a second segment with a prompt of its own.
    """
    rng = np.random.default_rng(seed)
    groups = []
    for number, size in enumerate((4, 1, 3)):
        prompt = rng.integers(3, 128, rng.integers(1, 40)).tolist()
        samples = []
        for index in range(size):
            length = 1 if index == 0 else int(rng.integers(2, 90))
            mask = np.zeros(length) if index == 2 else (rng.random(length) < 0.8) | (np.arange(length) == length - 1)
            fields: dict[str, Any] = {"sample_id": f"g{number}-{index}", "temperature": 0.7 + 0.2 * index}
            sample = make_sample(rng, prompt=prompt, completion_length=length, loss_mask=mask.tolist(), **fields)
            if segments and index % 2:
                other = make_sample(rng, prompt=prompt[:1] * 3, completion_length=int(rng.integers(1, 20)), **fields)
                sample.segments.append(other.segments[0])
            samples.append(sample)
        groups.append(make_group(samples, rng.normal(size=size).tolist()))
    return decode_groups(groups, vocab_size=128)


def plain_logprobs(model: Any, sample: TrainSample, segment: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all completion tokens of one segment, in the model's dtype: the token's, and the whole distribution."""
    trained = sample.segments[segment]
    token_ids = torch.tensor(trained.token_ids.astype(np.int64))
    logits = model(input_ids=token_ids[None], use_cache=False).logits[0]
    scaled = torch.log_softmax(logits / sample.temperature, dim=-1)
    positions = torch.arange(trained.prompt_length, len(token_ids))
    return scaled[positions - 1, token_ids[positions]], scaled[positions - 1]


def reference_loss(model: Any, samples: Sequence[TrainSample], reduction: str) -> torch.Tensor:
    """The definition of the clipped loss of GRPO, one token at a time, in float64: of first segments, with clips of 0.2
    and 0.3.
    """
    rewards = np.array([sample.reward for sample in samples])
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for sample in samples:
        group = [r for r, other in zip(rewards, samples, strict=True) if other.group_id == sample.group_id]
        advantage = 0.0
        if len(group) > 1:
            advantage = (sample.reward - np.mean(group)) / (np.std(group, ddof=1) + 1e-6)
        segment = sample.segments[0]
        logprobs, _ = plain_logprobs(model, sample)
        terms = []
        for index in np.flatnonzero(segment.loss_mask):
            ratio = torch.exp(logprobs[index] - float(segment.rollout_logprobs[index]))
            terms.append(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage))
        tokens += len(terms)
        if terms:
            mean = 1 if reduction == "per_token" else len(terms)
            total = total + torch.stack(terms).sum() / mean
    return total / (max(tokens, 1) if reduction == "per_token" else len(samples))
