"""The settings of ``[trainer.algorithm]``. Formulas and sources: docs/algorithms.md."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from services.common.config.section import Section

Name = Literal["grpo", "dr_grpo", "gspo", "cispo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo"]
Level = Literal["token", "sequence", "geometric"]
NotNegative = Annotated[float, Field(ge=0)]

# What a name means for the other keys, where they are not given.
_MEANS: dict[str, dict[str, Any]] = {
    "dr_grpo": {"normalize_std": False, "loss_reduction": "constant"},
    "gspo": {"policy_loss": "gspo"},
    "cispo": {"policy_loss": "cispo"},
    "rloo": {"normalize_std": False},
    "reinforce_plus_plus": {"normalize_std": False, "normalize_advantages": True},
    "reinforce_plus_plus_baseline": {"normalize_std": False, "normalize_advantages": True},
    "ppo": {"normalize_std": False, "normalize_advantages": True},
}
_DIVIDES_BY_STD = ("grpo", "gspo", "cispo")
_CRITIC = "ppo"
_WHITENED = ("reinforce_plus_plus", "reinforce_plus_plus_baseline")
_TOKEN_LEVEL = (*_WHITENED, _CRITIC)
_KL_IN_REWARD = ("rloo", *_TOKEN_LEVEL)


class CorrectionConfig(Section):
    """For what the trainer's log-probs of a token differ from those it was sampled with. The ratio is
    recomputed / rollout, of a token, or over a segment's trained tokens their product (sequence) or geometric mean."""

    weights: Literal["none", "clip", "mask"] = "none"
    """clip: the policy loss is multiplied by the ratio, brought into [low, high] (slime: --use-tis). mask: by the ratio
    where it is within, else by 0 (IcePop)."""
    level: Level = "token"
    low: NotNegative = 0.0
    """slime: --tis-clip-low"""
    high: Annotated[float, Field(gt=0)] = 2.0
    """inf: no bound, which is plain decoupled PPO (slime: --tis-clip)."""
    reject: Literal["none", "token", "sequence", "geometric"] = "none"
    """Tokens, or all tokens of a segment, whose ratio is outside [reject_low, reject_high] are not trained."""
    reject_low: NotNegative = 0.5
    reject_high: Annotated[float, Field(gt=0)] = 2.0
    veto: NotNegative = 0.0
    """A segment with a token whose ratio is below is not trained."""

    @property
    def active(self) -> bool:
        return self.weights != "none" or self.reject != "none" or self.veto > 0

    @model_validator(mode="after")
    def _bounds_fit(self) -> CorrectionConfig:
        for low, high in (("low", "high"), ("reject_low", "reject_high")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(f"{low} = {getattr(self, low)} must be below {high} = {getattr(self, high)}")
        if self.level != "token" and self.weights == "none":
            raise ValueError(f"level = {self.level} is of the weights, and weights = none")
        return self


class AlgorithmConfig(Section):
    name: Name = "grpo"
    """How advantages are made of rewards, and the defaults of the keys below (slime: --advantage-estimator)."""
    advantage_function: str = ""
    """The dotted path of a function that makes the advantages instead, with slime's signature: pkg.mod:fn (slime:
    --custom-advantage-function-path)."""
    normalize_std: bool = True
    """Divide by the group's standard deviation: grpo, gspo, cispo (slime: not --disable-grpo-std-normalization)."""
    normalize_advantages: bool = False
    """Whiten the advantages over all trained tokens of the step. reinforce_plus_plus and its baseline always do,
    ppo by default (slime: --normalize-advantages)."""
    process_rewards: Literal["add", "only"] = "add"
    """Of samples whose scorer rewards spans of tokens. add: beside the reward of the whole. only: instead of it, as in
    DeepSeekMath."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount per completion token: reinforce_plus_plus and its baseline, ppo."""
    lambd: Annotated[float, Field(ge=0, le=1)] = 1.0
    """GAE's λ, of ppo: at 1 advantages are returns minus values, at 0 one-step errors of the critic."""
    policy_loss: Literal["clip", "gspo", "cispo", "sft", "custom"] = "clip"
    """clip: PPO's, by tokens. gspo: PPO's, by the ratio of whole segments. cispo: the clipped ratio as a weight. sft:
    the negative log-prob, whatever the rewards. custom: loss_function (slime: --loss-type)."""
    loss_function: str = ""
    """The dotted path of a function that makes the whole loss of a micro-batch: pkg.mod:fn, for policy_loss = custom
    (slime: --custom-loss-function-path)."""
    loss_reducer_function: str = ""
    """The dotted path of a function, with slime's signature, that weighs the policy losses of tokens instead of
    loss_reduction: pkg.mod:fn (slime: --custom-pg-loss-reducer-function-path)."""
    eps_clip: Annotated[float, Field(gt=0)] = 0.2
    eps_clip_high: Annotated[float, Field(gt=0)] | None = None
    """Default: eps_clip."""
    eps_clip_c: Annotated[float, Field(gt=1)] | None = None
    """Dual clip: the loss of a token with a negative advantage is at most this times its size. Default: none."""
    old_logprobs: Literal["rollout", "recomputed"] = "rollout"
    """The denominator of the ratio that is clipped: the log-probs recorded while sampling (slime:
    --use-rollout-logprobs), or the trainer's own at the start of the step, as in decoupled PPO."""
    correction: CorrectionConfig = Field(default_factory=CorrectionConfig)
    opsm_delta: NotNegative | None = None
    """A segment with a negative advantage is not trained when its mean of log(old / new) is above this: off-policy
    sequence masking. Default: off."""
    use_kl_loss: bool = False
    """Measure the KL to the reference model, and add kl_loss_coef times it to the loss (slime: --use-kl-loss)."""
    kl_loss_coef: NotNegative = 0.0
    kl_coef: NotNegative = 0.0
    """Of the KL in the reward: rloo, reinforce_plus_plus and its baseline, ppo (slime: --kl-coef)."""
    kl_type: Literal["k1", "k2", "k3", "low_var_kl"] = "k1"
    """The estimator. The gradient of k1 as a loss is 0 on average: use another, or kl_unbiased (slime:
    --kl-loss-type)."""
    kl_unbiased: bool = False
    """Weigh each token's KL in the loss by new / rollout probability (slime: --use-unbiased-kl)."""
    use_opd: bool = False
    """On-policy distillation: opd_kl_coef times log(policy / teacher) of each token is taken from its advantage; the
    teacher is model.teacher_checkpoint (slime: --use-opd)."""
    opd_kl_coef: NotNegative = 1.0
    """slime: --opd-kl-coef"""
    entropy_coef: float = 0.0
    """Of the entropy bonus (slime: --entropy-coef)."""
    router_aux_loss_coef: NotNegative = 0.0
    """Of the loss that spreads each sequence's tokens evenly over the experts of each layer, for mixtures of experts
    (slime: --moe-aux-loss-coeff)."""
    loss_reduction: Literal["per_sample", "per_token", "constant"] = "per_sample"
    """per_sample: mean over samples of the token mean. per_token: mean over all tokens of the batch. constant: the sum
    over tokens, divided by samples × loss_constant."""
    loss_constant: Annotated[float, Field(gt=0)] | None = None
    """Tokens per sample that `constant` divides by. Default: rollout.sampling.max_response_len."""

    @property
    def token_level(self) -> bool:
        """Whether tokens of one sample differ in their advantages by the estimator's nature."""
        return self.name in _TOKEN_LEVEL

    @property
    def has_critic(self) -> bool:
        """Whether a second model is trained, whose values the advantages are made with."""
        return self.name == _CRITIC

    @property
    def whole_completions(self) -> bool:
        """Whether all tokens of a sample have one advantage, whatever it was rewarded for."""
        return self.name == "rloo" or self.policy_loss == "gspo"

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen copy of a model scores every batch."""
        return self.use_kl_loss or self.kl_coef > 0

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_name(cls, given: Any) -> Any:
        return {**_MEANS.get(str(given.get("name")), {}), **given} if isinstance(given, dict) else given

    @field_validator("advantage_function", "loss_function", "loss_reducer_function")
    @classmethod
    def _function_is_a_path(cls, value: str) -> str:
        if value and not any(mark in value.strip(".:") for mark in ".:"):
            raise ValueError(f"{value!r} is not of the form pkg.mod:fn")
        return value

    @model_validator(mode="after")
    def _advantages_fit(self) -> AlgorithmConfig:
        if self.normalize_std and self.name not in _DIVIDES_BY_STD:
            raise ValueError(f"normalize_std = true is for {', '.join(_DIVIDES_BY_STD)}, and name = {self.name}")
        if self.name in _WHITENED and not self.normalize_advantages:
            raise ValueError(f"name = {self.name} needs normalize_advantages = true")
        if self.gamma != 1.0 and not self.token_level:
            raise ValueError(f"gamma = {self.gamma} is for {', '.join(_TOKEN_LEVEL)}, and name = {self.name}")
        if self.lambd != 1.0 and not self.has_critic:
            raise ValueError(f"lambd = {self.lambd} is of GAE, which needs a critic: name = {_CRITIC}, not {self.name}")
        if self.advantage_function and self.has_critic:
            raise ValueError(f"advantage_function makes the advantages, and name = {_CRITIC} does, with its critic")
        return self

    @model_validator(mode="after")
    def _loss_fits(self) -> AlgorithmConfig:
        wanted = self.name if self.name in ("gspo", "cispo") else self.policy_loss
        if self.policy_loss != wanted:
            raise ValueError(f"name = {self.name} needs policy_loss = {wanted}, not {self.policy_loss}")
        if self.policy_loss == "gspo" and self.token_level:
            raise ValueError(f"policy_loss = gspo needs one advantage per segment, and name = {self.name} has many")
        if self.eps_clip_high is not None and self.eps_clip_high < self.eps_clip:
            raise ValueError(f"eps_clip_high = {self.eps_clip_high} must be at least eps_clip = {self.eps_clip}")
        if self.eps_clip_c is not None and self.policy_loss == "cispo":
            raise ValueError("eps_clip_c is for policy_loss = clip or gspo: cispo never loses a gradient by clipping")
        if self.correction.active and self.old_logprobs == "rollout":
            raise ValueError("correction needs old_logprobs = recomputed: the ratio to rollout log-probs has it in it")
        if bool(self.loss_function) != (self.policy_loss == "custom"):
            raise ValueError("policy_loss = custom and loss_function: give both or neither")
        if self.policy_loss in ("sft", "custom") and (self.correction.active or self.opsm_delta is not None):
            raise ValueError(f"correction and opsm_delta are for policy losses by ratios, not {self.policy_loss}")
        if self.policy_loss == "custom" and self.loss_reducer_function:
            raise ValueError("loss_reducer_function is for built-in policy losses, and loss_function makes all of it")
        if self.use_opd and self.policy_loss == "gspo":
            raise ValueError("policy_loss = gspo needs one advantage per segment, and use_opd makes many")
        if self.loss_constant is not None and self.loss_reduction != "constant":
            raise ValueError(f"loss_constant is for loss_reduction = constant, not {self.loss_reduction}")
        return self

    @model_validator(mode="after")
    def _kl_fits(self) -> AlgorithmConfig:
        if self.kl_loss_coef and not self.use_kl_loss:
            raise ValueError(f"kl_loss_coef = {self.kl_loss_coef} needs use_kl_loss = true")
        if self.kl_loss_coef and self.kl_coef:
            raise ValueError("kl_coef and kl_loss_coef: the KL is in the reward or in the loss, not in both")
        if self.kl_coef and self.name not in _KL_IN_REWARD and not self.advantage_function:
            raise ValueError(
                f"kl_coef = {self.kl_coef} is for {', '.join(_KL_IN_REWARD)}; {self.name} has its KL in the loss: "
                "use_kl_loss, kl_loss_coef"
            )
        if self.kl_unbiased and not self.use_kl_loss:
            raise ValueError("kl_unbiased is of the KL in the loss: it needs use_kl_loss = true")
        coefficients = (self.kl_loss_coef, self.kl_coef, self.entropy_coef, self.router_aux_loss_coef)
        if not all(map(math.isfinite, coefficients)):
            raise ValueError("kl_loss_coef, kl_coef, entropy_coef and router_aux_loss_coef must be finite")
        return self
