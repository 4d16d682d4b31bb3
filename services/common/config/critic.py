"""The settings of ``[trainer.critic]``: the model of values that ``trainer.algorithm.name = "ppo"`` has."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from services.common.config.optimizer import OptimizerConfig
from services.common.config.section import Section


class CriticConfig(Section):
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Its highest learning rate. Default: trainer.optimizer.lr. What else trainer.optimizer says, but for the warm-up,
    is the critic's too (slime: --critic-lr)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Its optimizer steps over which the learning rate rises (slime: --critic-lr-warmup-iters)."""
    value_clip: Annotated[float, Field(gt=0)] = 0.2
    """How far a value may move from what it was at the start of the step before its loss stops falling. inf: no bound
    (slime: --value-clip)."""
    only_steps: Annotated[int, Field(ge=0)] = 0
    """The first so many training steps train the critic, and leave the policy as it is (slime:
    --num-critic-only-steps)."""

    def optimizer(self, of_policy: OptimizerConfig) -> OptimizerConfig:
        """Raises ValueError where this learning rate does not go with the rest of the policy's schedule."""
        own = {"lr": self.lr or of_policy.lr, "warmup_steps": self.warmup_steps, "warmup_fraction": None}
        return OptimizerConfig(**{**of_policy.model_dump(), **own})
