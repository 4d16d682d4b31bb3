"""Losses and reducers as users write them."""

from __future__ import annotations

from typing import Any

import torch

SEEN: list[dict[str, Any]] = []


def surrogate(args: Any, batch: dict[str, Any], log_probs: list[torch.Tensor], sum_of_sample_mean: Any) -> Any:
    """PPO's, by hand, with the fraction of clipped tokens."""
    SEEN.append({"args": args, "batch": batch})
    ratio = torch.cat([(new - old).exp() for new, old in zip(log_probs, batch["log_probs"], strict=True)])
    advantages = torch.cat(batch["advantages"])
    bounded = ratio.clamp(0.8, 1.2)
    losses = torch.maximum(-ratio * advantages, -bounded * advantages)
    return sum_of_sample_mean(losses), {"outside": (ratio != bounded).float()}


def entropy_only(args: Any, batch: dict[str, Any], log_probs: Any, sum_of_sample_mean: Any) -> Any:
    return -sum_of_sample_mean(torch.cat(batch["entropy"]))


def number(args: Any, batch: Any, log_probs: Any, sum_of_sample_mean: Any) -> float:
    return 1.0


def per_token(args: Any, batch: Any, log_probs: list[torch.Tensor], sum_of_sample_mean: Any) -> torch.Tensor:
    return torch.cat(log_probs)


def short_metric(args: Any, batch: Any, log_probs: list[torch.Tensor], sum_of_sample_mean: Any) -> Any:
    return sum_of_sample_mean(torch.cat(log_probs)), {"short": torch.zeros(1)}


def failing(*_: Any) -> None:
    raise RuntimeError("on purpose")


def over_a_hundred(total_lengths: Any, response_lengths: Any, loss_masks: list[torch.Tensor], _: bool) -> Any:
    """Dr. GRPO's: sums over a constant."""
    mask = torch.cat(loss_masks)
    return lambda losses: (losses * mask).sum() / 100.0


def first_halves(total_lengths: Any, response_lengths: list[int], loss_masks: list[torch.Tensor], _: bool) -> Any:
    """Means over the first half of each response."""

    def reduce(losses: torch.Tensor) -> torch.Tensor:
        parts = zip(losses.split(response_lengths), loss_masks, strict=True)
        halves = [(part * mask)[: (len(part) + 1) // 2] for part, mask in parts]
        return sum((half.sum() / max(len(half), 1) for half in halves), torch.zeros(()))

    return reduce


def squares(total_lengths: Any, response_lengths: Any, loss_masks: Any, _: bool) -> Any:
    return lambda losses: losses.square().sum()
