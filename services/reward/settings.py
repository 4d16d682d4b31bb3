"""What a pool process is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from services.common.config import Config

_SHARE_OF_SCORE = 0.8


@dataclass(frozen=True)
class ScorerSettings:
    """Plain values only: they travel as msgpack."""

    name: str
    paths: list[str]
    args: dict[str, Any]
    filter: str = ""
    """The dotted path of the dynamic-sampling filter; empty without one of the user's."""
    buffer_filter: str = ""
    buffer_address: str = ""
    """Where the buffer filter's samples fetch their tokens."""
    reward_key: str = ""
    code_timeout_s: float = 6.0
    code_memory_mb: int = 512
    group_rm: bool = False
    """The scorer is a function that scores whole groups."""
    weights: dict[str, float] = field(default_factory=dict)
    """Of several scorers; empty where there is one."""
    shaping: str = ""
    """The dotted path of the user's shaping of rewards; empty without one."""
    overlong: dict[str, Any] = field(default_factory=dict)
    """The fields of `Overlong`; empty without a penalty."""
    send_tokens: bool = False
    """Items have their token ids."""


def scorer_settings(config: Config) -> ScorerSettings:
    """The scorer of a run. `args` is what user functions get as slime's `args`, under slime's names."""
    sampling = config.rollout.sampling
    args = {
        "hf_checkpoint": str(config.model.hf_checkpoint),
        "prompt_data": config.data.prompt_data,
        "input_key": config.data.input_key,
        "label_key": config.data.label_key,
        "metadata_key": config.data.metadata_key,
        "rollout_seed": config.data.seed,
        "num_rollout": config.run.num_rollout,
        "rollout_batch_size": config.batch.rollout_batch_size,
        "n_samples_per_prompt": config.batch.n_samples_per_prompt,
        "over_sampling_batch_size": config.batch.over_sampling_batch_size or config.batch.rollout_batch_size,
        "global_batch_size": config.batch.global_batch_size,
        "rollout_temperature": sampling.temperature,
        "rollout_top_p": sampling.top_p,
        "rollout_top_k": sampling.top_k,
        "rollout_max_response_len": sampling.max_response_len,
        "reward_key": config.reward.reward_key or None,
    }
    paths = [str(path) for path in config.plugins.paths]
    code = config.reward.code
    return ScorerSettings(
        config.reward.scorer,
        paths,
        args,
        config.batch.user_filter,
        config.reward.buffer_filter,
        config.buffer.address,
        config.reward.reward_key,
        # A program that runs for ever has failed its tests; the pool must not end the scorer before that is said.
        min(code.timeout_s, _SHARE_OF_SCORE * config.reward.score_timeout_s),
        code.memory_mb,
        config.reward.group_rm,
        config.reward.weights,
        config.reward.shaping,
        _overlong(config),
        config.reward.send_tokens,
    )


def _overlong(config: Config) -> dict[str, Any]:
    reward = config.reward
    if not reward.overlong_buffer_len:
        return {}
    return {
        "max_len": config.rollout.sampling.max_response_len,
        "buffer_len": reward.overlong_buffer_len,
        "factor": reward.overlong_penalty_factor,
    }
