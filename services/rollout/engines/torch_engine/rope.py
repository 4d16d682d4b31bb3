"""Rotary position embeddings (Su et al., 2021), with the scalings that Llama and Qwen checkpoints use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from services.common.errors import ConfigError


def rope_table(rope: Mapping[str, Any], head_dim: int, length: int) -> torch.Tensor:
    """float32 [length, 2, head_dim]: cosines, and sines with the sign of the first half turned.

    With ``x`` a head and ``roll`` half a turn of it, the rotated head is ``x * table[p, 0] + roll(x) * table[p, 1]``.
    Raises ConfigError for a `rope_type` that is not default, linear or llama3.
    """
    kind = rope["rope_type"]
    if kind not in _SCALINGS:
        raise ConfigError(f"{kind!r} is not supported; supported are {', '.join(_SCALINGS)}", field="rope_type")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    frequencies = _SCALINGS[kind](1.0 / (rope["rope_theta"] ** exponents), rope)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    cosines, sines = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cosines, cosines), -1), torch.cat((-sines, sines), -1)), dim=1)


def _linear(frequencies: torch.Tensor, rope: Mapping[str, Any]) -> torch.Tensor:
    return frequencies / float(rope["factor"])


def _llama3(frequencies: torch.Tensor, rope: Mapping[str, Any]) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    factor, low, high = float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = float(rope["original_max_position_embeddings"])
    wavelengths = 2 * math.pi / frequencies
    blend = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / factor + blend * frequencies


_SCALINGS: dict[str, Callable[[torch.Tensor, Mapping[str, Any]], torch.Tensor]] = {
    "default": lambda frequencies, _: frequencies,
    "linear": _linear,
    "llama3": _llama3,
}
