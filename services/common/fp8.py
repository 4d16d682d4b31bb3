"""Block-wise fp8 turned back into plain weights. Needs torch: for the trainer and the in-house engine."""

from __future__ import annotations

import torch

from services.common.model_files import BLOCK


def dequantise(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight [n, k] that `values` float8_e4m3fn [n, k] and `scales` [ceil(n / 128), ceil(k / 128)] stand for."""
    n, k = values.shape
    spread = scales.float().repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
    return (values.float() * spread).to(dtype)
