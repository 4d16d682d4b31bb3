"""The settings of ``[trainer.optimizer]``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from services.common.config.section import Positive, Section

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class OptimizerConfig(Section):
    """AdamW. The learning rate of a step is Megatron-LM's, a function of the optimizer steps taken before it."""

    name: Literal["adam"] = "adam"
    """With decoupled weight decay (slime: --optimizer)."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-6
    """The highest learning rate."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "constant"
    """How it falls after the warm-up, from lr to min_lr at decay_steps. WSD: not before its last wsd_decay_steps
    (slime: --lr-decay-style)."""
    min_lr: NotNegative = 0.0
    """Where it falls to; of every style but constant (slime: --min-lr)."""
    decay_steps: Positive | None = None
    """Optimizer steps after which it has fallen, the warm-up among them. Default: those of the whole run (slime:
    --lr-decay-iters)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which it rises linearly from warmup_init; the first step is made with warmup_init (slime:
    --lr-warmup-iters)."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The same as a share of decay_steps, instead (slime: --lr-warmup-fraction)."""
    warmup_init: NotNegative = 0.0
    """slime: --lr-warmup-init"""
    wsd_decay_steps: Positive | None = None
    """slime: --lr-wsd-decay-iters"""
    wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """slime: --lr-wsd-decay-style"""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: NotNegative = 0.0
    """Of matrices; norms and biases have none."""
    clip_grad: NotNegative = 1.0
    """The largest norm of the gradient. 0: any."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> OptimizerConfig:
        if self.warmup_steps and self.warmup_fraction is not None:
            raise ValueError("warmup_steps and warmup_fraction: give one of them")
        if self.min_lr and self.lr_decay_style == "constant":
            raise ValueError(f"min_lr = {self.min_lr:g} is for an lr_decay_style that decays, and it is constant")
        for name in ("min_lr", "warmup_init"):
            if getattr(self, name) > self.lr:
                raise ValueError(f"{name} = {getattr(self, name):g} is above lr = {self.lr:g}")
        if (self.wsd_decay_steps is None) == (self.lr_decay_style == "WSD"):
            raise ValueError("lr_decay_style = WSD and wsd_decay_steps: give both or neither")
        return self

    def span(self, total: int) -> tuple[float, float]:
        """Optimizer steps at which the warm-up and the decay end, in a run of `total`.

        Raises ValueError when the warm-up, or the decay of WSD, does not fit in.
        """
        end = float(self.decay_steps or total)
        warmup = float(self.warmup_steps) if self.warmup_fraction is None else self.warmup_fraction * end
        if self.lr_decay_style == "constant":
            return warmup, end
        if warmup >= end:
            raise ValueError(
                f"trainer.optimizer: a warm-up of {warmup:g} steps leaves nothing of {end:g} for lr to decay over"
            )
        if (self.wsd_decay_steps or 0) > end - warmup:
            after = f"the {end - warmup:g} steps after the warm-up"
            raise ValueError(f"trainer.optimizer.wsd_decay_steps = {self.wsd_decay_steps} is more than {after}")
        return warmup, end
