"""An independent block-wise fp8 quantiser in numpy's float64, and model directories written with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

_BLOCK = 128
_LARGEST = 448.0


def e4m3_values() -> NDArray[np.float64]:
    """What the codes 0 to 126 stand for: one sign bit, 4 bits of exponent with bias 7, 3 of mantissa; 127 is NaN."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    normal = (8 + mantissa) * 2.0 ** (exponent - 10.0)
    return np.where(exponent == 0, mantissa * 2.0**-9, normal)


def round_to_e4m3(x: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The code of the nearest value; of two as near, the one whose code is even."""
    table = e4m3_values()
    magnitude = np.abs(x)
    above = np.clip(np.searchsorted(table, magnitude), 1, 126)
    middle = (table[above - 1] + table[above]) / 2
    up = (magnitude > middle) | ((magnitude == middle) & (above % 2 == 0))
    code = np.where(up, above, above - 1)
    return (code | (np.signbit(x) << 7)).astype(np.uint8)


def quantise_reference(weight: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes [n, k] and scales [ceil(n / 128), ceil(k / 128)], block after block."""
    n, k = weight.shape
    codes = np.zeros((n, k), dtype=np.uint8)
    scales = np.zeros((-(-n // _BLOCK), -(-k // _BLOCK)), dtype=np.float32)
    for row, column in np.ndindex(*scales.shape):
        place = np.s_[row * _BLOCK : (row + 1) * _BLOCK, column * _BLOCK : (column + 1) * _BLOCK]
        block = weight[place].astype(np.float64)
        scale = np.float32(max(np.abs(block).max() / _LARGEST, 2.0**-126))
        scales[row, column] = scale
        # The quotient of two float32, rounded once to float32: float64 holds enough digits not to round twice.
        codes[place] = round_to_e4m3((block / np.float64(scale)).astype(np.float32).astype(np.float64))
    return codes, scales


def write_fp8_model(directory: Path, marks: Sequence[str] = ("_proj",), **config: Any) -> Path:
    """Turns the plain model in `directory` into one whose projections, matrices with one of the `marks` in their name,
    are fp8; `config` goes to quantization_config.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if tensor.dim() == 2 and any(mark in name for mark in marks):
            codes, scales = quantise_reference(tensor.float().numpy())
            tensors[name] = torch.from_numpy(codes).view(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = torch.from_numpy(scales)
        else:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    quantisation = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [_BLOCK, _BLOCK]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantisation | config}))
    return directory
