"""What rank 0 tells the others to do, by name, and what it sends along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

TRAIN = "train"
WEIGHTS = "weights"
OPTIMIZER = "optimizer"
CRITIC = "critic"
CRITIC_OPTIMIZER = "critic_optimizer"
LOAD = "load"

State = Mapping[str, Mapping[str, torch.Tensor]]

_RNG = "rng"


def outline(state: State, optimizer_steps: int) -> dict[str, Any]:
    """Of a checkpoint's tensors, for LOAD: shapes and dtypes, and all of the random number generators."""
    shapes = {
        part: {name: [_dtype(tensor), list(tensor.shape)] for name, tensor in tensors.items()}
        for part, tensors in state.items()
        if part != _RNG
    }
    rng = {name: tensor.numpy() for name, tensor in state[_RNG].items()}
    return {"optimizer_steps": optimizer_steps, "shapes": shapes, _RNG: rng}


def outlined(message: Mapping[str, Any]) -> tuple[dict[str, dict[str, torch.Tensor]], int]:
    """The state, its tensors without content, and `optimizer_steps`."""
    state = {
        part: {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for name, (dtype, shape) in tensors.items()
        }
        for part, tensors in message["shapes"].items()
    }
    state[_RNG] = {name: torch.tensor(array) for name, array in message[_RNG].items()}
    return state, message["optimizer_steps"]


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
