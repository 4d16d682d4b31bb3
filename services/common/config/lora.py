"""The settings of ``[trainer.lora]``: low-rank adapters, trained instead of the model's weights (docs/lora.md)."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, field_validator

from services.common.config.section import Positive, Section

FIELD = "trainer.lora"
NEEDS_PEFT = "adapters are peft's, which is not installed: pip install 'polyhead[lora]'"


class LoraConfig(Section):
    rank: Annotated[int, Field(ge=0)] = 0
    """Of each adapter. 0: none, all weights are trained."""
    alpha: Positive = 32
    """What an adapter adds is multiplied by alpha / rank."""
    use_rslora: bool = False
    """By alpha / sqrt(rank) instead."""
    target_modules: list[str] = Field(default_factory=list)
    """Linear layers that get one, by their names or the ends of these: ["q_proj", "layers.0.mlp.up_proj"]. Default: all
    but the head."""

    @property
    def scale(self) -> float:
        """What an adapter adds is multiplied by; of `rank` above 0."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @field_validator("target_modules")
    @classmethod
    def _names_are_names(cls, value: list[str]) -> list[str]:
        if not all(name.strip(".") for name in value):
            raise ValueError("holds an empty name")
        return value
