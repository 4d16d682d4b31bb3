"""A user's loss, and a user's way of making one number of the policy losses of tokens. Signatures near slime's.

* The loss: ``fn(args, batch, log_probs, sum_of_sample_mean) -> loss``, or ``-> (loss, metrics)``, per micro-batch.
  Where slime passes logits, which exist here for a few tokens at a time, it gets log-probs. `log_probs` and the lists
  in `batch` have a tensor for each sequence, over its trained tokens: `log_probs` (old), `rollout_log_probs`,
  `ref_log_probs` and `teacher_log_probs` (None without such a model), `advantages`, `entropy`, `loss_masks` (ones) and
  `response_lengths`. `sum_of_sample_mean` takes all of them, joined, to this micro-batch's part of ``loss_reduction``:
  a loss made with it does not depend on packing. `metrics` are values per token, joined, by name; their means are
  reported.
* The reducer: ``fn(total_lengths, response_lengths, loss_masks, calculate_per_token_loss)``, once per optimizer step
  with a number or tensor for each segment, gives a function of the joined losses of all completion tokens. That has to
  be linear, like any mean: then it is a weight per token, and packing changes nothing. What it gives is divided by the
  samples, or tokens, of the optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from services.common.config import Config
from services.common.errors import ConfigError
from services.common.plugins import load_function
from services.trainer.algorithms.objective import Objective, Tokens, objective, policy_ratio
from services.trainer.algorithms.user_function import slime_args
from services.trainer.batch.samples import TrainSample

LOSS_FIELD = "trainer.algorithm.loss_function"
REDUCER_FIELD = "trainer.algorithm.loss_reducer_function"
# How far from linear rounding may bring a reducer.
TOLERANCE = 1e-4


def load_loss(config: Config) -> Callable[[Tokens], Objective]:
    """The loss of a micro-batch's tokens. Raises ConfigError when a user's does not import."""
    algorithm = config.trainer.algorithm
    if algorithm.policy_loss != "custom":
        return partial(objective, algorithm=algorithm)
    function = load_function(algorithm.loss_function, field=LOSS_FIELD, search=config.plugins.paths)
    return partial(_user_loss, function, slime_args(config))


def load_reducer(config: Config) -> Callable[..., Any] | None:
    """None when the reduction is built in. Raises ConfigError when the function does not import."""
    path = config.trainer.algorithm.loss_reducer_function
    return load_function(path, field=REDUCER_FIELD, search=config.plugins.paths) if path else None


def _user_loss(function: Callable[..., Any], args: Any, tokens: Tokens) -> Objective:
    """Raises ConfigError when the function raises, or does not give one number and metrics of the right lengths."""
    counts = torch.bincount(tokens.sequences, minlength=tokens.sequence_count).tolist()

    def split(values: torch.Tensor | None) -> list[torch.Tensor] | None:
        return None if values is None else list(values.split(counts))

    batch = {
        "log_probs": split(tokens.old_logprobs),
        "rollout_log_probs": split(tokens.rollout_logprobs),
        "ref_log_probs": split(tokens.ref_logprobs),
        "teacher_log_probs": split(tokens.teacher_logprobs),
        "advantages": split(tokens.advantages),
        "entropy": split(tokens.entropy),
        "loss_masks": split(torch.ones_like(tokens.advantages)),
        "response_lengths": counts,
    }
    try:
        result = function(args, batch, split(tokens.logprobs), lambda values: (tokens.weights * values).sum())
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        figures = {name: torch.as_tensor(values).detach().to(loss) for name, values in metrics.items()}
    except Exception as error:  # a user's function may raise anything
        raise ConfigError(f"failed: {type(error).__name__}: {error}", field=LOSS_FIELD) from error
    if not isinstance(loss, torch.Tensor) or loss.shape:
        raise ConfigError("did not give one number, a tensor with gradient", field=LOSS_FIELD)
    for name, values in figures.items():
        if values.shape != tokens.weights.shape:
            raise ConfigError(f"did not give one {name} for each token", field=LOSS_FIELD)
    # Spread over the tokens so that their weighted sum is the loss.
    of_token = (loss / tokens.weights.sum()).expand_as(tokens.weights)
    ratio = policy_ratio(tokens)
    return Objective(of_token, ratio, torch.zeros_like(ratio), figures, {"ratio_max": ratio})


def reducer_weights(
    reducer: Callable[..., Any],
    samples: Sequence[TrainSample],
    rows: NDArray[np.int64],
    positions: NDArray[np.int64],
    *,
    per_token: bool,
) -> NDArray[np.float64]:
    """The weight of the policy loss of each trained token of an optimizer step, float64[n].

    `rows` and `positions` say which tokens are trained, as in `Episodes`. Raises ConfigError when the reducer raises,
    or is not linear.
    """
    segments = [segment for sample in samples for segment in sample.segments]
    lengths = [segment.completion_length for segment in segments]
    starts = np.cumsum([0, *(sample.completion_length for sample in samples)])
    places = torch.from_numpy(starts[rows] + positions)
    masks = torch.zeros(sum(lengths), dtype=torch.float64)
    masks[places] = 1.0
    losses = torch.linspace(-1.0, 2.0, len(masks), dtype=torch.float64).requires_grad_()
    totals = [len(segment.token_ids) for segment in segments]
    try:
        reduce = reducer(totals, lengths, list(masks.split(lengths)), per_token)
        value = reduce(losses)
        (weights,) = torch.autograd.grad(value, losses)
    except Exception as error:  # a user's function may raise anything
        raise ConfigError(f"failed: {type(error).__name__}: {error}", field=REDUCER_FIELD) from error
    linear = (weights * losses.detach()).sum()
    if abs(float(value.detach() - linear)) > TOLERANCE * (1.0 + abs(float(linear))):
        raise ConfigError("is not linear in the losses: it cannot be a weight per token", field=REDUCER_FIELD)
    return weights[places].numpy() / max(len(places) if per_token else len(samples), 1)
