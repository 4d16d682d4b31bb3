"""A plain model out of a directory that holds fp8: its weights times their scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from services.common.fp8 import dequantise
from services.common.model_files import SCALE_SUFFIX, fp8_weights


def load_dequantised(directory: Path, dtype: torch.dtype, **options: Any) -> Any:
    """What transformers' `from_pretrained` gives with `options`, its parameters in `dtype`, and its configuration
    without the quantisation. Takes memory of the host for two copies of the weights.
    """
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    del config.quantization_config
    with torch.device("meta"):
        model_class = type(transformers.AutoModelForCausalLM.from_config(config))
    return model_class.from_pretrained(
        None, config=config, state_dict=_plain_weights(directory, dtype), dtype=dtype, **options
    )


def _plain_weights(directory: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    fp8 = fp8_weights(directory)
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping: it cannot be iterated)
    for name in fp8:
        stored[name] = dequantise(stored[name], stored.pop(name + SCALE_SUFFIX), dtype)
    return stored
