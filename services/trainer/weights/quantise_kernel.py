"""Block-wise fp8 on a GPU: each program of the kernel reads one block, and writes its values and its scale."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.common.model_files import BLOCK

_WARPS = 8


# Triton has no types, and compiles the function by its source: its arguments are no Python values.
@triton.jit  # type: ignore[untyped-decorator]
def _quantise_block(weight, values, scales, n, k, stride, columns, block: tl.constexpr):  # type: ignore[no-untyped-def]
    number = tl.program_id(0)
    row_block, column_block = number // columns, number % columns
    rows = (row_block * block + tl.arange(0, block)).to(tl.int64)[:, None]
    cols = (column_block * block + tl.arange(0, block))[None, :]
    inside = (rows < n) & (cols < k)
    x = tl.load(weight + rows * stride + cols, mask=inside, other=0.0).to(tl.float32)
    # As integers, magnitudes have the order of the numbers, with infinities and then NaN above all.
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(tl.max(magnitude, axis=1), axis=0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, 448.0)
    # Written so that NaN stays.
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
    scaled = tl.div_rn(x, tl.broadcast_to(scale, (block, block)))
    scaled = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
    tl.store(values + rows * k + cols, scaled.to(tl.float8e4nv), mask=inside)
    tl.store(scales + number, scale)


def quantise_on_gpu(weight: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
    """`quantise` for tensors of one GPU; returns when it is enqueued. `values` and `scales` are contiguous."""
    n, k = weight.shape
    if weight.stride(1) != 1 or not (values.is_contiguous() and scales.is_contiguous()):
        raise ValueError("rows must lie one after the other")
    with torch.cuda.device(weight.device):
        _quantise_block[(scales.numel(),)](
            weight, values, scales, n, k, weight.stride(0), scales.shape[1], block=BLOCK, num_warps=_WARPS
        )
