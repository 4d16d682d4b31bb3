"""Adapters of which something is to be seen, B not being 0, and peft's own model with the same ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from services.common.config import Config
from services.trainer.algorithms.advantages import group_advantages
from services.trainer.backends.torch import model as model_module
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.batch.packing import PackedBatch
from services.trainer.batch.plan import Batching
from services.trainer.batch.prepare import prepare_step
from services.trainer.batch.samples import TrainSample
from services.trainer.batch.staleness import Clock

_add_adapters = model_module.add_adapters


def prepared(samples: list[TrainSample], clock: Clock, batching: Batching) -> list[PackedBatch]:
    """Micro-batches with GRPO's advantages."""
    rewards = np.array([sample.reward for sample in samples])
    advantages = group_advantages(rewards, [sample.group_id for sample in samples], normalize_std=True)
    step = prepare_step(samples, clock, mask_above=None, reduction="per_sample", batching=batching)
    return step.filled(advantages[step.rows])


def filled(config: Config, seed: int = 0) -> TorchBackend:
    """A backend whose every B is random."""
    backend = TorchBackend(config)
    assert backend.adapters is not None
    draw_b(backend.adapters.tensors, seed)
    return backend


def draw_b(tensors: dict[str, torch.Tensor], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.normal_(std=0.02, generator=generator)


def begin_filled() -> None:
    """From here on in this process, models are given adapters whose every B is random: before they are sharded. They
    are seen to compute in the model's dtype.
    """

    def add(model: Any, settings: Any) -> None:
        _add_adapters(model, settings)
        draw_b(dict(model.named_parameters()))
        dtype = model.dtype

        def is_as_wide(_: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            assert inputs[0].dtype == output.dtype == dtype

        for name, module in model.named_modules():
            if name.endswith(("lora_A.default", "lora_B.default")):
                module.register_forward_hook(is_as_wide)

    model_module.add_adapters = add


def begin_plain() -> None:
    model_module.add_adapters = _add_adapters


def peft_model(directory: Path, backend: TorchBackend, dtype: torch.dtype, targets: Any = "all-linear") -> Any:
    """peft's own, on the model that transformers loads, with the backend's adapters in `dtype`."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict  # seconds, which not every rank has to take

    assert backend.adapters is not None
    settings = backend.adapters.settings
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        use_rslora=settings.use_rslora,
        target_modules=targets,
    )
    wrapped = get_peft_model(model, config)
    tensors = {f"base_model.model.{name}": tensor.detach() for name, tensor in backend.adapters.tensors.items()}
    result = set_peft_model_state_dict(wrapped, tensors)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    return wrapped.to(dtype).eval()
