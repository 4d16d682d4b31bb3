"""What a SGLang that runs block-wise fp8 in tests is given at the start of each of its processes. Loading is its own.

On a CPU, fp8 needs AMX and kernels that no CPU build has: instead, as on a Hopper GPU with Triton kernels, nothing is
done to the weights after loading, and a linear layer multiplies by what its values and scales stand for, without
quantising activations. On a GPU, activations are quantised by SGLang's Triton kernel in the place of one that nvcc
would have to compile.
"""

import importlib.abc
import importlib.util
import os
import runpy
import sys
from pathlib import Path


def _on_cpu(module):
    import torch

    def apply(self, layer, x, bias=None):
        (n, k), block = layer.weight.shape, self.weight_block_size[0]
        scales = layer.weight_scale_inv.repeat_interleave(block, 0)[:n].repeat_interleave(block, 1)[:, :k]
        return torch.nn.functional.linear(x, (layer.weight.float() * scales).to(x.dtype), bias)

    module.Fp8LinearMethod.process_weights_after_loading = lambda self, layer: None
    module.Fp8LinearMethod.apply = apply


def _on_gpu(module):
    module.per_token_group_quant_fp8 = module._per_token_group_quant_8bit_raw


class _Finder(importlib.abc.MetaPathFinder):
    """Calls `patch` with the module of this name, once it has been imported."""

    def __init__(self, name, patch):
        self._name, self._patch = name, patch

    def find_spec(self, name, path, target=None):
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self._patch(module)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("SGLANG_USE_CPU_ENGINE"):
    runpy.run_path(str(Path(__file__).parents[3] / "services/rollout/engines/sglang_cpu/sitecustomize.py"))
    sys.meta_path.insert(0, _Finder("sglang.srt.layers.quantization.fp8", _on_cpu))
else:
    sys.meta_path.insert(0, _Finder("sglang.kernels.ops.quantization.fp8_kernel", _on_gpu))
