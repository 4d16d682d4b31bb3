"""What stays in float32 in a model that computes in half precision: the sum that runs through its layers.

Each layer adds its share to the residual stream. Rounded to bfloat16 after each addition, that sum has lost as much by
the last layer as all products within the layers (docs/algorithms.md): engines do so, the trainer need not.
"""

from __future__ import annotations

from typing import Any

import torch

HALF = (torch.bfloat16, torch.float16)


def widen_residuals(model: Any, dtype: torch.dtype) -> None:
    """Embeddings give float32, and norms give `dtype` back: what layers add up in between is float32, what they
    multiply is not.

    Nothing happens to a model that computes in `dtype` float32, or whose norms are torch's LayerNorm, which takes no
    other dtype than its weight's.
    """
    if dtype not in HALF or any(isinstance(module, torch.nn.LayerNorm) for module in model.modules()):
        return
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.float())
    for module in model.modules():
        if _is_norm(module):
            module.register_forward_hook(lambda _module, _inputs, output: output.to(dtype))


def _is_norm(module: torch.nn.Module) -> bool:
    parameters = list(module.parameters(recurse=False))
    return bool(parameters) and not list(module.children()) and all(each.ndim == 1 for each in parameters)
