"""Block-wise fp8: e4m3 values with one float32 scale for each 128 × 128 block, as SGLang's engines take them.

For a block x: scale = max(|x|) / 448, at least the smallest normal float32, and values = e4m3(x / scale), rounded to
the nearest, ties to even. Both divisions are those of float32 (DeepSeek-V3, arXiv:2412.19437, section 3.3.2, with
blocks of weights; 448 is the largest e4m3).
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from services.common.model_files import BLOCK, scale_shape

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SCALE_MIN = torch.finfo(torch.float32).tiny


def quantise(weight: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
    """Writes a `weight` [n, k], bfloat16 or float32 with rows one after the other, as `values` float8_e4m3fn [n, k] and
    `scales` float32 [ceil(n / 128), ceil(k / 128)].

    It is computed where `weight` is: on a GPU by one kernel that reads each element once, and writes straight into
    `values` where these are on the same device. A block with an element that is not finite gets a scale that is not.
    """
    if scales.shape != scale_shape(tuple(weight.shape)) or values.shape != weight.shape:
        raise ValueError(f"{list(weight.shape)} into {list(values.shape)} with scales {list(scales.shape)}")
    if weight.device != values.device:
        there = torch.empty_like(values, device=weight.device), torch.empty_like(scales, device=weight.device)
        quantise(weight, *there)
        values.copy_(there[0])
        scales.copy_(there[1])
    elif weight.is_cuda:
        from services.trainer.weights.quantise_kernel import quantise_on_gpu

        quantise_on_gpu(weight, values, scales)
    else:
        quantise_plain(weight, values, scales)


def quantise_plain(weight: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
    """The same in torch's own operations, on any device, with several float32 copies of the weight."""
    (n, k), (rows, columns) = weight.shape, scales.shape
    padded = pad(weight.float(), (0, columns * BLOCK - k, 0, rows * BLOCK - n))
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    # As a tensor: torch multiplies by the reciprocal of a number.
    largest = torch.full((1, 1), FP8_MAX, device=weight.device)
    scales.copy_((blocks.abs().amax(dim=(1, 3)) / largest).clamp_min(SCALE_MIN))
    scaled = (blocks / scales[:, None, :, None]).clamp_(-FP8_MAX, FP8_MAX)
    values.copy_(scaled.view(rows * BLOCK, columns * BLOCK)[:n, :k])
