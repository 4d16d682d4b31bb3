"""How a mixture of experts is computed: as transformers does by default, where the device does that right.

The default is "grouped_mm": one product over all experts, whose rows are the tokens of each in turn. It is exact, and
an expert without tokens has a gradient of 0. On CUDA in bfloat16 it is one kernel, elsewhere a loop within torch. Of
the others, "eager" makes a gradient of the whole stack for each expert (three times the time of a step, with 64 experts
in float32 on a CPU), and "batched_mm" copies the weights of an expert for each of its tokens.
"""

from __future__ import annotations

from typing import Any

import structlog
import torch
from torch.nn import functional

EAGER = "eager"

log = structlog.get_logger()


def choose_experts(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Leaves a model as it is, or has it compute its experts one by one: where the kernel refuses their shapes, and
    where the gradient of an expert without tokens has in it what was in memory (pytorch/pytorch 172439, on Blackwell).
    """
    stack = next((each for each in model.parameters() if each.dim() == 3), None)
    if stack is None or (problem := _problem(stack, device, dtype)) is None:
        return
    log.warning("experts_one_by_one", reason=problem)
    model.set_experts_implementation(EAGER)


def _problem(stack: torch.Tensor, device: torch.device, dtype: torch.dtype) -> str | None:
    """Of a product with experts of the shape of those in `stack`, of which the second and the last have no tokens."""
    weights = torch.ones(4, *stack.shape[1:], device=device, dtype=dtype, requires_grad=True)
    rows = torch.ones(6, stack.shape[2], device=device, dtype=dtype)
    ends = torch.tensor([2, 2, 6, 6], device=device, dtype=torch.int32)
    try:
        product = functional.grouped_mm(rows, weights.transpose(-2, -1), offs=ends)
        # Memory that the gradient will be made in.
        torch.full_like(weights, torch.nan)
        (gradient,) = torch.autograd.grad(product, weights, torch.ones_like(product))
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return "an expert without tokens has a gradient" if gradient[1::2].any() else None
