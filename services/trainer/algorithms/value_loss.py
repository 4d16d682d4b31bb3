"""The loss of a critic per token. All tensors are float[n], of one dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ValueLoss(NamedTuple):
    loss: torch.Tensor
    clipped: torch.Tensor
    """1 where the clip decides, else 0. Without gradient."""


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *, value_clip: float
) -> ValueLoss:
    """``0.5 * max((V - R)^2, (clip(V, V_old - value_clip, V_old + value_clip) - R)^2)``.

    The squared error of PPO (arXiv:1707.06347, equation 9) with the clip of its reference implementation
    (arXiv:2005.12729, section 3): a value that has come nearer to its return than `value_clip` from `old_values`
    leads has no gradient.
    """
    unclipped = (values - returns) ** 2
    clipped = (values.clamp(old_values - value_clip, old_values + value_clip) - returns) ** 2
    loss = 0.5 * torch.maximum(unclipped, clipped)
    return ValueLoss(loss, (clipped > unclipped).to(values.dtype))
