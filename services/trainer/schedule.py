"""The learning rate as a pure function of the optimizer steps taken: the schedules of Megatron-LM.

Megatron counts samples, and so does slime; with a fixed number of samples a step, both give what is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from services.common.config import Config
from services.common.config.optimizer import OptimizerConfig

# Of the share x of the decay that is over, in [0, 1], to the share of ``lr - min_lr`` that is left.
_LEFT: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (math.cos(math.pi * x) + 1.0),
    "exponential": lambda x: 2.0 * 0.5**x - 1.0,
    "minus_sqrt": lambda x: 1.0 - math.sqrt(x),
}


@dataclass(frozen=True)
class Schedule:
    """Steps are optimizer steps, as numbers that need not be whole."""

    config: OptimizerConfig
    warmup: float
    """Steps of the warm-up."""
    end: float
    """The step at which `min_lr` is reached."""

    def __call__(self, steps: int) -> float:
        """The learning rate of the optimizer step that comes after `steps` others."""
        config = self.config
        if self.warmup > 0 and steps <= self.warmup:
            return config.warmup_init + (config.lr - config.warmup_init) * steps / self.warmup
        if config.lr_decay_style == "constant":
            return config.lr
        if steps > self.end:
            return config.min_lr
        if config.lr_decay_style == "inverse-square-root":
            return max(config.min_lr, config.lr * math.sqrt(max(self.warmup, 1.0) / max(steps, 1)))
        return config.min_lr + self._left(steps) * (config.lr - config.min_lr)

    def _left(self, steps: int) -> float:
        if self.config.lr_decay_style != "WSD":
            return _LEFT[self.config.lr_decay_style]((steps - self.warmup) / (self.end - self.warmup))
        assert self.config.wsd_decay_steps is not None
        over = (steps - (self.end - self.config.wsd_decay_steps)) / self.config.wsd_decay_steps
        return _LEFT[self.config.wsd_decay_style](max(over, 0.0))


def learning_rate(config: Config) -> Schedule:
    """That of a run's policy."""
    return Schedule(config.trainer.optimizer, *config.trainer.optimizer.span(config.policy_steps))


def critic_learning_rate(config: Config) -> Schedule:
    """That of its critic, which trains in every step of the run."""
    optimizer = config.trainer.critic.optimizer(config.trainer.optimizer)
    return Schedule(optimizer, *optimizer.span(config.optimizer_steps))
