"""What routers of transformers' models do with single sequences, in plain loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from services.trainer.batch.samples import TrainSample


def fed_sequences(samples: Sequence[TrainSample]) -> list[torch.Tensor]:
    """int64 tokens of each segment that has a trained one, up to and without the last of these."""
    sequences = []
    for sample in samples:
        for segment in sample.segments:
            trained = np.flatnonzero(segment.loss_mask)
            if len(trained):
                end = segment.prompt_length + int(trained[-1])
                sequences.append(torch.tensor(segment.token_ids[:end].astype(np.int64)))
    return sequences


def balance_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """DeepSeek-V3 (arXiv:2412.19437), eq. 17 to 20, with a softmax, added up over layers: token by token."""
    total = torch.zeros((), dtype=torch.float64)
    for logits in _router_logits(model, tokens):
        count, experts = logits.shape
        per_token = model.config.num_experts_per_tok
        chances = [torch.exp(row) / torch.exp(row).sum() for row in logits]
        for expert in range(experts):
            chosen = sum(expert in _chosen(row, per_token) for row in chances)
            share = experts / (per_token * count) * chosen
            total = total + share * sum(row[expert] for row in chances) / count
    return total


def load_max(model: Any, sequences: Sequence[torch.Tensor]) -> float:
    """Over all tokens of all sequences, the greatest share of an expert times the experts, mean over layers."""
    counts: list[dict[int, int]] = []
    for tokens in sequences:
        for layer, logits in enumerate(_router_logits(model, tokens)):
            counts += [{} for _ in range(layer + 1 - len(counts))]
            for row in logits:
                for expert in _chosen(row, model.config.num_experts_per_tok):
                    counts[layer][expert] = counts[layer].get(expert, 0) + 1
    experts = model.config.num_experts
    return float(np.mean([max(of_layer.values()) / sum(of_layer.values()) * experts for of_layer in counts]))


def _router_logits(model: Any, tokens: torch.Tensor) -> Sequence[torch.Tensor]:
    return model(input_ids=tokens[None], use_cache=False, output_router_logits=True).router_logits


def _chosen(row: torch.Tensor, per_token: int) -> list[int]:
    values = row.tolist()
    return sorted(range(len(values)), key=lambda expert: -values[expert])[:per_token]
