"""Advantage functions as users write them, in slime's signature."""

from __future__ import annotations

from typing import Any

import torch

SEEN: list[tuple[Any, dict[str, Any]]] = []


def centred(args: Any, rollout_data: dict[str, Any]) -> None:
    """Reward minus the mean of the batch, less the KL; leaves it in the dict."""
    SEEN.append((args, rollout_data))
    mean = sum(rollout_data["raw_reward"]) / len(rollout_data["raw_reward"])
    kl = rollout_data["kl"] or [torch.zeros(length) for length in rollout_data["response_lengths"]]
    rollout_data["advantages"] = [
        torch.full((length,), reward - mean) - args.kl_coef * of_segment
        for length, reward, of_segment in zip(
            rollout_data["response_lengths"], rollout_data["raw_reward"], kl, strict=True
        )
    ]


def returned(args: Any, rollout_data: dict[str, Any]) -> list[list[float]]:
    """The place of each token, as plain numbers."""
    return [[float(place) for place in range(length)] for length in rollout_data["response_lengths"]]


def forgetful(args: Any, rollout_data: dict[str, Any]) -> None:
    """Makes nothing."""


def short(args: Any, rollout_data: dict[str, Any]) -> list[torch.Tensor]:
    return [torch.zeros(1) for _ in rollout_data["tokens"]]


def endless(args: Any, rollout_data: dict[str, Any]) -> list[torch.Tensor]:
    return [torch.full((length,), float("inf")) for length in rollout_data["response_lengths"]]
