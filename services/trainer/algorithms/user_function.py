"""A user's advantage function, in slime's signature: ``fn(args, rollout_data)`` puts "advantages" into the dict.

`rollout_data` has slime's keys, with one entry per segment (of single-turn samples, per sample): `tokens`,
`total_lengths`, `response_lengths`, `loss_masks` (what is trained), `rewards` (relative to the group where the
estimator of ``name`` has it so), `raw_reward`, `rollout_log_probs`, `log_probs` (old), `ref_log_probs` and `kl` (None
without a reference model), and ours: `group_ids`, `sample_ids`, `process_rewards` (what each token earns; None where
no sample has any). Per-token entries are tensors over the completion, 0 where nothing is trained. The advantages are
a list of tensors of the same lengths, left under "advantages" or returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from services.common.config import Config
from services.common.errors import ConfigError
from services.common.plugins import load_function
from services.trainer.algorithms.estimators import Episodes, outcome_rewards, relative_rewards
from services.trainer.batch.samples import TrainSample

FIELD = "trainer.algorithm.advantage_function"


class TokenLogprobs(NamedTuple):
    """[n] each, flat as in `Episodes`."""

    rollout: NDArray[np.float64]
    old: NDArray[np.float64]
    ref: NDArray[np.float64] | None
    kl: NDArray[np.float64] | None


def load_advantage_function(config: Config) -> Callable[..., Any] | None:
    """None when the advantages are built in. Raises ConfigError when the function does not import."""
    path = config.trainer.algorithm.advantage_function
    return load_function(path, field=FIELD, search=config.plugins.paths) if path else None


def user_advantages(
    samples: Sequence[TrainSample], episodes: Episodes, logprobs: TokenLogprobs, config: Config
) -> NDArray[np.float64]:
    """What the function gives at the trained tokens, float64[n].

    Raises ConfigError when it raises, or gives something else than finite numbers of the right lengths.
    """
    function = load_advantage_function(config)
    assert function is not None
    layout = _Layout(samples, episodes)
    data = _rollout_data(samples, episodes, logprobs, layout, config)
    try:
        returned = function(slime_args(config), data)
        given = data["advantages"] if returned is None else returned
        values = [np.asarray(torch.as_tensor(each).detach().cpu(), dtype=np.float64) for each in given]
    except Exception as error:  # a user's function may raise anything
        raise ConfigError(f"failed: {type(error).__name__}: {error}", field=FIELD) from error
    if [value.shape for value in values] != [(length,) for length in layout.lengths]:
        raise ConfigError("did not give one advantage for each completion token of each segment", field=FIELD)
    trained = np.concatenate([np.empty(0), *values])[layout.places]
    if not np.isfinite(trained).all():
        bad = int(episodes.rows[np.flatnonzero(~np.isfinite(trained))[0]])
        raise ConfigError(f"gave an advantage that is not finite to {samples[bad].sample_id}", field=FIELD)
    return trained


class _Layout:
    """Where the trained tokens stand among all completion tokens of all segments."""

    def __init__(self, samples: Sequence[TrainSample], episodes: Episodes) -> None:
        self.lengths = [segment.completion_length for sample in samples for segment in sample.segments]
        starts = np.cumsum([0, *(sample.completion_length for sample in samples)])
        self.places = starts[episodes.rows] + episodes.positions

    def spread(self, values: NDArray[Any] | None, dtype: torch.dtype = torch.float32) -> list[torch.Tensor] | None:
        """By segment, 0 where nothing is trained."""
        if values is None:
            return None
        whole = torch.zeros(sum(self.lengths), dtype=dtype)
        whole[torch.from_numpy(self.places)] = torch.from_numpy(values).to(dtype)
        return list(whole.split(self.lengths))


def _rollout_data(
    samples: Sequence[TrainSample], episodes: Episodes, logprobs: TokenLogprobs, layout: _Layout, config: Config
) -> dict[str, Any]:
    algorithm = config.trainer.algorithm
    relative = relative_rewards(outcome_rewards(episodes, algorithm), episodes.group_ids, algorithm)
    pairs = [(row, segment) for row, sample in enumerate(samples) for segment in sample.segments]
    return {
        "tokens": [torch.tensor(segment.token_ids.astype(np.int64)) for _, segment in pairs],
        "total_lengths": [len(segment.token_ids) for _, segment in pairs],
        "response_lengths": layout.lengths,
        "loss_masks": layout.spread(np.ones(len(episodes.rows)), torch.int32),
        "rewards": [float(relative[row]) for row, _ in pairs],
        "raw_reward": [float(episodes.rewards[row]) for row, _ in pairs],
        "rollout_log_probs": layout.spread(logprobs.rollout),
        "log_probs": layout.spread(logprobs.old),
        "ref_log_probs": layout.spread(logprobs.ref),
        "kl": layout.spread(logprobs.kl),
        "process_rewards": layout.spread(_process(episodes)),
        "sample_indices": [row for row, _ in pairs],
        "group_ids": [samples[row].group_id for row, _ in pairs],
        "sample_ids": [samples[row].sample_id for row, _ in pairs],
    }


def _process(episodes: Episodes) -> NDArray[np.float64] | None:
    return None if episodes.process is None else episodes.process.at_tokens(episodes.rows, episodes.positions)


def slime_args(config: Config) -> SimpleNamespace:
    """slime's `args`, as far as advantages and losses depend on them."""
    algorithm, batch = config.trainer.algorithm, config.batch
    return SimpleNamespace(
        hf_checkpoint=str(config.model.hf_checkpoint),
        advantage_estimator=algorithm.name,
        gamma=algorithm.gamma,
        lambd=algorithm.lambd,
        kl_coef=algorithm.kl_coef,
        kl_loss_coef=algorithm.kl_loss_coef,
        kl_loss_type=algorithm.kl_type,
        use_kl_loss=algorithm.use_kl_loss,
        normalize_advantages=algorithm.normalize_advantages,
        grpo_std_normalization=algorithm.normalize_std,
        n_samples_per_prompt=batch.n_samples_per_prompt,
        rollout_batch_size=batch.rollout_batch_size,
        global_batch_size=batch.global_batch_size,
        rollout_temperature=config.rollout.sampling.temperature,
        rollout_max_response_len=config.rollout.sampling.max_response_len,
    )
