"""In what form the engines take the weights: under which names, and which of them in fp8."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from services.common.model_files import fp8_weights, stored_tensors

# A stack of experts in transformers [experts, rows, columns] -> the projections that its rows are, one after the other.
_STACKS = {".experts.gate_up_proj": ("gate_proj", "up_proj"), ".experts.down_proj": ("down_proj",)}


@dataclass(frozen=True)
class EngineForm:
    """That of the directory which the engines load."""

    names: frozenset[str] = frozenset()
    """Of every tensor that is stored there."""
    fp8: frozenset[str] = frozenset()
    """Of those weights that have scales beside them. The others stay in the dtype that they are trained in."""

    @classmethod
    def of_directory(cls, directory: Path) -> EngineForm:
        """Raises ConfigError for a quantisation other than block-wise fp8."""
        return cls(frozenset(stored_tensors(directory)), fp8_weights(directory))

    def named(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights under the engines' names: experts that transformers holds as one stack are views of it, where the
        directory has each by itself.
        """
        for held, tensor in weights:
            stack = next((ending for ending in _STACKS if held.endswith(ending)), None)
            if stack is None or held in self.names or tensor.dim() != 3:
                yield held, tensor
                continue
            prefix, projections = held.removesuffix(stack), _STACKS[stack]
            for number, expert in enumerate(tensor):
                for projection, rows in zip(projections, expert.chunk(len(projections)), strict=True):
                    yield f"{prefix}.experts.{number}.{projection}.weight", rows
