"""Draws follow the softmax, depend on (seed, position) alone, and never on neighbours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from services.common.errors import InvalidArgumentError
from services.rollout.engines.torch_engine.sampling import SamplingBatch, mix, sample, uniforms
from services.rollout.engines.torch_engine.sampling_params import SamplingParams, parse_sampling_params

DRAWS = 40_000


def batch(rows: int, seed: int = 0, **fields: Any) -> SamplingBatch:
    seeds = mix(np.arange(rows, dtype=np.uint64) + np.uint64(1000 * seed))
    neutral: dict[str, Any] = dict.fromkeys(("inverse_temperatures", "greedy", "top_p", "top_k", "forbidden"))
    return SamplingBatch(**{"uniforms": uniforms(seeds, np.full(rows, 7)), **neutral, **fields})


def chi_square(tokens: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Per degree of freedom: about 1 when the draws come from `probabilities`."""
    possible = probabilities > 0
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * len(tokens)
    return float(((counts[possible] - expected) ** 2 / expected).sum() / (possible.sum() - 1))


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(16, generator=torch.Generator().manual_seed(0)) * 1.5


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
def test_draws_follow_the_scaled_softmax(logits: torch.Tensor, temperature: float) -> None:
    inverse = np.full(DRAWS, 1 / temperature, np.float32) if temperature != 1 else None
    tokens, logprobs = sample(logits.expand(DRAWS, -1), batch(DRAWS, inverse_temperatures=inverse))
    expected = (logits.double() / temperature).log_softmax(-1)
    torch.testing.assert_close(logprobs[0].double(), expected, atol=1e-6, rtol=1e-6)
    assert chi_square(tokens, expected.exp()) < 2.5


def test_successive_positions_of_one_seed_are_independent_draws(logits: torch.Tensor) -> None:
    seeds = np.full(DRAWS, mix(np.array([5], np.uint64))[0])
    tokens, _ = sample(logits.expand(DRAWS, -1), batch(DRAWS, uniforms=uniforms(seeds, np.arange(DRAWS))))
    probabilities = logits.double().softmax(-1)
    assert chi_square(tokens, probabilities) < 2.5
    pairs = tokens[:-1] * 16 + tokens[1:]
    assert chi_square(pairs[::2], torch.outer(probabilities, probabilities).flatten()) < 1.5


@pytest.mark.parametrize(("top_p", "top_k"), [(0.7, 16), (1.0, 3), (0.8, 6)])
def test_truncation_renormalises_and_leaves_logprobs_alone(logits: torch.Tensor, top_p: float, top_k: int) -> None:
    fields = {"top_p": np.full(DRAWS, top_p), "top_k": np.full(DRAWS, top_k)}
    tokens, logprobs = sample(logits.expand(DRAWS, -1), batch(DRAWS, **fields))
    expected = torch.zeros(16, dtype=torch.float64)
    ordered, order = logits.double().softmax(-1).sort(descending=True)
    ordered = ordered[:top_k] / ordered[:top_k].sum()
    kept = int((ordered.cumsum(0) - ordered < top_p).sum())
    expected[order[:kept]] = ordered[:kept] / ordered[:kept].sum()
    assert chi_square(tokens, expected) < 2.5
    torch.testing.assert_close(logprobs[0], logits.log_softmax(-1))


def test_a_row_does_not_depend_on_its_neighbours(logits: torch.Tensor) -> None:
    many = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    plain = sample(many, batch(8))
    mixed = sample(
        many,
        batch(
            8,
            inverse_temperatures=np.array([1] * 4 + [2] * 4, np.float32),
            greedy=np.array([False] * 6 + [True] * 2),
            top_p=np.array([1.0] * 4 + [0.3] * 4),
            top_k=np.array([16] * 5 + [2] * 3),
            forbidden=(np.array([7]), np.array([3])),
        ),
    )
    assert torch.equal(plain[0][:4], mixed[0][:4])
    assert torch.equal(plain[1][:4], mixed[1][:4])


def test_greedy_and_forbidden(logits: torch.Tensor) -> None:
    best = int(logits.argmax())
    rows = logits.expand(4, -1)
    greedy = np.ones(4, np.bool_)
    assert sample(rows, batch(4, greedy=greedy))[0].tolist() == [best] * 4
    tokens, logprobs = sample(rows, batch(4, greedy=greedy, forbidden=(np.array([1]), np.array([best]))))
    assert [token == best for token in tokens.tolist()] == [True, False, True, True]
    torch.testing.assert_close(logprobs[1], logits.log_softmax(-1))


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    logits = torch.full((3, 5), -torch.inf)
    logits[:, 2] = 0.0
    extremes = np.array([0.0, 0.5, 1 - 2.0**-52])
    assert sample(logits, batch(3, uniforms=extremes))[0].tolist() == [2, 2, 2]


def test_uniforms_are_a_function_of_seed_and_position() -> None:
    seeds = mix(np.array([1, 1, 2, 2**64 - 1], np.uint64))
    values = uniforms(seeds, np.array([3, 4, 3, 3]))
    assert len(set(values.tolist())) == 4
    assert uniforms(seeds[1:2], np.array([4])).tolist() == [values[1]]
    # SplitMix64 of seed 0, first output, is a published constant.
    assert int(mix(np.array([0x9E3779B97F4A7C15], np.uint64))[0]) == 0xE220A8397B1DCDAF


def test_parameters_take_null_for_absent_and_neutral_foreign_keys() -> None:
    raw = {"temperature": None, "stop": "x", "top_k": 5, "n": 1, "min_p": 0.0, "repetition_penalty": 1.0, "regex": None}
    assert parse_sampling_params(raw) == SamplingParams(stop=("x",), top_k=5)
    assert parse_sampling_params({"temperature": 1e-9}).temperature == 0


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        ({"temprature": 1}, "temprature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop_token_ids": 3}, "stop_token_ids"),
        ({"sampling_seed": 2**63}, "sampling_seed"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"n": 2}, "n"),
    ],
)
def test_wrong_parameters_are_refused_by_name(raw: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_sampling_params(raw)
    assert caught.value.field == f"sampling_params.{field}"
