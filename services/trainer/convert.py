"""A checkpoint as a Hugging Face directory, or its adapters as one of peft, without a GPU and without the optimizer's
state.
"""

from __future__ import annotations

from pathlib import Path

import torch

from services.common.errors import ConfigError
from services.trainer import model_dir
from services.trainer.backends.torch.backend import ADAPTER, MODEL
from services.trainer.backends.torch.lora import factor_names, merged, write_adapter
from services.trainer.backends.torch.model import from_directory, outline, save_pretrained
from services.trainer.backends.torch.sharding import unique_tensors
from services.trainer.checkpoint import Checkpoint, CheckpointState, problem, read
from services.trainer.files import write_directory
from services.trainer.lora import LoraState

MODEL_FIELD = "--hf-checkpoint"


def convert(directory: Path, target: Path, model: Path | None = None, *, adapter: bool = False) -> CheckpointState:
    """Writes what the run would export with the weights of this checkpoint, of however many ranks. They are held in the
    host's memory once, where several ranks wrote them; where one did, they are read from its file as they are written.
    Those of the model that adapters were trained on are held once, too.

    `model`: the Hugging Face directory that the run began with, if it is not where it was. `adapter`: the adapters
    alone, as peft writes them.

    Raises ConfigError for a checkpoint that is damaged, a model that is not there or another one than adapters were
    trained on, and a `target` that exists.
    """
    if (reason := problem(directory)) is not None:
        raise ConfigError(f"{directory} is no whole checkpoint: {reason}", field="CHECKPOINT_DIR")
    if target.exists():
        raise ConfigError(f"{target} exists", field="OUT")
    checkpoint = read(directory)
    state = checkpoint.state
    source = model or Path(state.model)
    if adapter:
        _write_adapter(checkpoint, target, source)
        return state
    if not source.is_dir():
        raise ConfigError(f"{source}, where the run began, is no directory: name it", field=MODEL_FIELD)
    dtype = getattr(torch, state.dtype)
    skeleton = outline(source, dtype)
    if state.lora is None:
        weights = {name: stored[...] for name, stored in checkpoint.tensors[MODEL].items()}
    else:
        weights = _merged(checkpoint, state.lora, source)

    def save_model(into: Path) -> None:
        save_pretrained(skeleton, weights, dtype, into)

    model_dir.export(target, source, state.version, save_model)
    return state


def _merged(checkpoint: Checkpoint, lora: LoraState, base: Path) -> dict[str, torch.Tensor]:
    if model_dir.weights_digest(base) != lora.base:
        raise ConfigError(f"{base} holds other weights than those that the adapters were trained on", field=MODEL_FIELD)
    scale, factors = lora.settings().scale, checkpoint.tensors[ADAPTER]
    weights = unique_tensors(from_directory(base, checkpoint.state.dtype, MODEL_FIELD))
    with torch.no_grad():
        for name, weight in weights.items():
            a, b = factor_names(name)
            if a in factors:
                weight.copy_(merged(weight, factors[a][...], factors[b][...], scale))
    return {name: weight.detach() for name, weight in weights.items()}


def _write_adapter(checkpoint: Checkpoint, target: Path, base: Path) -> None:
    lora = checkpoint.state.lora
    if lora is None:
        raise ConfigError(f"{checkpoint.directory} has all weights, and no adapters", field="--adapter")
    settings = lora.settings()
    tensors = {name: stored[...] for name, stored in checkpoint.tensors[ADAPTER].items()}
    write_directory(target, lambda into: write_adapter(into, tensors, settings, lora.target_modules, base))
