"""In what form the engines take the weights: under which names, and which of them in fp8."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from services.common.errors import ConfigError
from services.common.model_files import FIELD, fp8_weights, stored_tensors

# Of a stack of experts in transformers, [experts, rows, columns]: which projections its rows are, one after the other.
_STACKS = {".experts.gate_up_proj": (0, 1), ".experts.down_proj": (2,)}


class _Naming(NamedTuple):
    """What a family of models stores under other names than transformers holds it."""

    projections: tuple[str, str, str]
    """Of one expert: gate, up, down."""
    block: str = ".mlp."
    """Instead of ".mlp.", before the names of router and experts."""


# That of nearly all models, and that of Mixtral and what came after it (MiniMax, PhiMoE).
_NAMINGS = (
    _Naming(("gate_proj", "up_proj", "down_proj")),
    _Naming(("w1", "w3", "w2"), ".block_sparse_moe."),
)


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

        Raises ConfigError when it has them under names that are not known.
        """
        naming = self._naming
        for held, tensor in weights:
            stored = held if held in self.names else held.replace(".mlp.", naming.block)
            stack = next((ending for ending in _STACKS if held.endswith(ending)), None)
            if stack is None or held in self.names or tensor.dim() != 3:
                yield (stored if stored in self.names else held), tensor
                continue
            prefix, parts = stored.removesuffix(stack), _STACKS[stack]
            if self.names and f"{prefix}.experts.0.{naming.projections[2]}.weight" not in self.names:
                raise ConfigError(f"the directory names the experts of {held} in a way that is not known", field=FIELD)
            for number, expert in enumerate(tensor):
                for part, rows in zip(parts, expert.chunk(len(parts)), strict=True):
                    yield f"{prefix}.experts.{number}.{naming.projections[part]}.weight", rows

    @cached_property
    def _naming(self) -> _Naming:
        blocks = (naming for naming in _NAMINGS if any(naming.block + "experts." in name for name in self.names))
        return next(blocks, _NAMINGS[0])
