"""Low-rank adapters (LoRA, E. Hu et al., arXiv 2106.09685): a linear layer computes Wx + s·B(Ax), where W is frozen in
the model's dtype, and A [rank, in] and B [out, rank] are trained, with master copies in float32.

The layers are peft's. Outside of the model, adapters have the names that they have in peft's files, less the prefix:
``<layer>.lora_A.weight``. What leaves the trainer is the model that they make, W + s·B·A under the name of W.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from services.common.config.lora import FIELD, NEEDS_PEFT, LoraConfig
from services.common.errors import ConfigError
from services.trainer.backends.torch.sharding import gathered

_ADAPTER = "default"
_BASE = ".base_layer."
# What peft puts before the name of a layer of a Hugging Face model.
_FILE_PREFIX = "base_model.model."


class Adapters:
    """Those of a model that `add_adapters` was done to, wherever it has been placed."""

    def __init__(
        self, model: Any, settings: LoraConfig, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> None:
        """`tensors`: all of the model's, by the names that it has for them. It computes in `dtype`."""
        self.settings = settings
        self._dtype = dtype
        self.tensors = {
            name.replace(f".{_ADAPTER}.", "."): tensor for name, tensor in tensors.items() if _is_adapter(name)
        }
        """Theirs, by name."""
        self.base = {name.replace(_BASE, "."): tensor for name, tensor in tensors.items() if not _is_adapter(name)}
        """The frozen model's, by the names that they have in it without adapters."""
        self._layers = [module for module in model.modules() if isinstance(module, _peft().tuners.lora.LoraLayer)]

    @property
    def targets(self) -> list[str]:
        """`target_modules`, or what it is by default: the last parts of the names of all layers that have one."""
        layers = {name.rsplit(".", 3)[-3] for name in self.tensors}
        return sorted(self.settings.target_modules or layers)

    def merged(self, name: str, weight: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
        """`weight`, the base's tensor `name`, with what its adapter adds, if it has one. `weight` is None on the ranks
        that do not have it gathered, and so is what they get; each of them calls it, in the same order.
        """
        if factor_names(name)[0] not in self.tensors:
            return weight
        a, b = (gathered(self.tensors[factor], self._dtype, device) for factor in factor_names(name))
        if weight is None or a is None or b is None:
            return None
        return merged(weight, a, b, self.settings.scale)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is what it was without adapters."""
        scales = [layer.scaling[_ADAPTER] for layer in self._layers]
        for layer in self._layers:
            layer.scaling[_ADAPTER] = 0.0
        try:
            yield
        finally:
            for layer, scale in zip(self._layers, scales, strict=True):
                layer.scaling[_ADAPTER] = scale


def add_adapters(model: Any, settings: LoraConfig) -> None:
    """Freezes a whole model, and gives linear layers of it an adapter each. B begins as 0: the model computes what it
    did.

    Raises ConfigError, naming the key, for layers that it does not have, and without peft.
    """
    config = _peft().LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        use_rslora=settings.use_rslora,
        target_modules=_layers(model, settings.target_modules),
    )
    _peft().inject_adapter_in_model(config, model, _ADAPTER)


def factor_names(weight: str) -> tuple[str, str]:
    """Of A and B that are added to a weight."""
    layer = weight.removesuffix(".weight")
    return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"


def merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """W + scale·B·A, of [out, in], [rank, in] and [out, rank]: computed in float32, rounded once to the dtype of W."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)


def write_adapter(
    directory: Path, tensors: Mapping[str, torch.Tensor], settings: LoraConfig, targets: Sequence[str], base: Path
) -> None:
    """What peft loads onto the model in `base`: adapter_model.safetensors, adapter_config.json."""
    config = _peft().LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        inference_mode=True,
        r=settings.rank,
        lora_alpha=settings.alpha,
        use_rslora=settings.use_rslora,
        target_modules=list(targets),
    )
    config.save_pretrained(directory)
    named = {_FILE_PREFIX + name: tensor for name, tensor in tensors.items()}
    save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def _layers(model: Any, wanted: Sequence[str]) -> list[str]:
    """Full names. The head is none of them: log-probs are made straight from its weight, which may be the embedding."""
    head = model.get_output_embeddings()
    linear = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    ]
    for ending in wanted:
        if not any(_ends(name, ending) for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ConfigError(
                f"{ending!r} is no linear layer of {type(model).__name__} below its head: there are {known}",
                field=f"{FIELD}.target_modules",
            )
    return [name for name in linear if not wanted or any(_ends(name, ending) for ending in wanted)]


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _is_adapter(name: str) -> bool:
    return f".lora_A.{_ADAPTER}." in name or f".lora_B.{_ADAPTER}." in name


def _peft() -> Any:
    try:
        import peft
        import peft.tuners.lora
    except ImportError as error:
        raise ConfigError(NEEDS_PEFT, field=f"{FIELD}.rank") from error
    return peft
