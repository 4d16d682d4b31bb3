"""Block-wise fp8, as engines read it from DeepSeek's and Qwen's FP8 checkpoints: e4m3 values, a scale for each block.

No push uses it: engines are sent what the trainer trains.
"""

from __future__ import annotations

import torch

BLOCK = 128
E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max


def quantise_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` [..., n, k] of any floating-point dtype: its e4m3 values [..., n, k], and the float32 scales
    [..., ceil(n / 128), ceil(k / 128)] that they are to be multiplied by (``weight_scale_inv`` in a checkpoint).

    A scale is the block's largest magnitude / 448, at least the smallest normal float32; values are rounded to the
    nearest, ties to even. Blocks at the edges are cut off, not padded. A block with a value that is not finite gets a
    scale that is not finite. Peak memory: 8 bytes for each value beside the results.
    """
    *batch, rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # [..., n / 128, 128, k / 128, 128]
    largest = blocks.abs().amax(dim=(-3, -1), keepdim=True)
    scales = (largest / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    values = (blocks / scales).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
    values = values.reshape(*batch, *padded.shape[-2:])[..., :rows, :columns]
    return values.contiguous(), scales.squeeze(-1).squeeze(-2)


def dequantise_blocks(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What an engine computes with, in float32. Shapes as `quantise_blocks` returns them."""
    rows, columns = values.shape[-2:]
    spread = scales.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return values.float() * spread[..., :rows, :columns]
