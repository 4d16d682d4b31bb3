"""The frozen model that KL terms are measured against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from services.common.config import Config
from services.common.errors import ConfigError
from services.trainer.backends.torch.logprobs import score
from services.trainer.backends.torch.model import REFERENCE_FIELD, load_model
from services.trainer.backends.torch.sharding import Placement
from services.trainer.batch.packing import PackedBatch
from services.trainer.ranks.group import RankGroup


class Reference:
    """Loaded once. With `trainer.offload_reference` it is on a GPU only while it scores; one that is sharded, only the
    layer that computes.
    """

    def __init__(self, config: Config, vocab_size: int, placement: Placement, group: RankGroup) -> None:
        """Raises ConfigError when `model.ref_checkpoint` does not load, or has another vocabulary than the policy."""
        directory = config.model.ref_checkpoint or config.model.hf_checkpoint
        offload = config.trainer.offload_reference
        self._group = group
        self._device = placement.device
        self._sharded = placement.mesh is not None
        placement = placement._replace(offload=offload and self._device.type == "cuda", recompute=False)
        self._root = load_model(directory, config.model.dtype, placement, REFERENCE_FIELD, trained=False)
        self._idle = torch.device("cpu") if offload else self._device
        own = int(self._root.model.get_input_embeddings().weight.shape[0])
        if own != vocab_size:
            raise ConfigError(
                f"{directory} has {own} tokens, and the trained model {vocab_size}", field=REFERENCE_FIELD
            )
        self._move(self._idle)

    def logprobs(self, micro_batches: Sequence[PackedBatch]) -> list[NDArray[np.float32]]:
        """Of the trained tokens, float32[n] for each micro-batch."""
        self._move(self._device)
        try:
            return score(self._root, micro_batches, self._device, self._group)
        finally:
            self._move(self._idle)

    def _move(self, device: torch.device) -> None:
        """Nothing happens where it is there already, or where FSDP moves it."""
        if not self._sharded:
            self._root.to(device)
