"""A checkpoint as a Hugging Face directory, without a GPU and without the optimizer's state."""

from __future__ import annotations

from pathlib import Path

import torch

from services.common.errors import ConfigError
from services.trainer import model_dir
from services.trainer.backends.torch.backend import MODEL
from services.trainer.backends.torch.model import outline, save_pretrained
from services.trainer.checkpoint import CheckpointState, problem, read


def convert(directory: Path, target: Path, model: Path | None = None) -> CheckpointState:
    """Writes what the run would export with the weights of this checkpoint, of however many ranks. They are held in the
    host's memory once, where several ranks wrote them; where one did, they are read from its file as they are written.

    `model`: the Hugging Face directory that the run began with, if it is not where it was.

    Raises ConfigError for a checkpoint that is damaged, a model that is not there, and a `target` that exists.
    """
    if (reason := problem(directory)) is not None:
        raise ConfigError(f"{directory} is no whole checkpoint: {reason}", field="CHECKPOINT_DIR")
    if target.exists():
        raise ConfigError(f"{target} exists", field="OUT")
    checkpoint = read(directory)
    state = checkpoint.state
    source = model or Path(state.model)
    if not source.is_dir():
        raise ConfigError(f"{source}, where the run began, is no directory: name it", field="--hf-checkpoint")
    dtype = getattr(torch, state.dtype)
    skeleton = outline(source, dtype)
    weights = {name: stored[...] for name, stored in checkpoint.tensors[MODEL].items()}

    def save_model(into: Path) -> None:
        save_pretrained(skeleton, weights, dtype, into)

    model_dir.export(target, source, state.version, save_model)
    return state
