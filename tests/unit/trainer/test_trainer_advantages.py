"""Every advantage against plain loops in float64: ragged groups, empty masks, groups of one, equal rewards."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.config.algorithm import AlgorithmConfig
from services.trainer.algorithms.advantages import whiten
from services.trainer.algorithms.estimators import Episodes, normalized, token_advantages
from services.trainer.algorithms.process import ProcessRewards
from tests.kit import reference_advantages as reference

REWARDS = st.one_of(st.sampled_from([0.0, 1.0, 0.1]), st.floats(-1e3, 1e3))
TOKEN = st.tuples(st.booleans(), st.floats(-5, 5))
SAMPLES = st.lists(st.tuples(st.sampled_from("abcd"), REWARDS, st.lists(TOKEN, max_size=7)), min_size=1, max_size=14)


def batch_of(samples):
    return [
        {"group": group, "reward": reward, "mask": [m for m, _ in tokens], "kl": [k for _, k in tokens]}
        for group, reward, tokens in samples
    ]


def episodes_of(batch, *, kl):
    places = [np.flatnonzero(sample["mask"]) for sample in batch]
    return Episodes(
        rewards=np.array([sample["reward"] for sample in batch]),
        group_ids=[sample["group"] for sample in batch],
        rows=np.repeat(np.arange(len(batch)), [len(each) for each in places]),
        positions=np.concatenate(places).astype(np.int64),
        kl=np.array([k for sample in batch for m, k in zip(sample["mask"], sample["kl"], strict=True) if m])
        if kl
        else None,
    )


def spread(per_sample, batch):
    """One number per sample, at each of its trained tokens."""
    return [value for value, sample in zip(per_sample, batch, strict=True) for m in sample["mask"] if m]


def advantages(batch, *, kl=False, **algorithm):
    config = AlgorithmConfig(**algorithm)
    return normalized(token_advantages(episodes_of(batch, kl=kl), config), config)


@settings(max_examples=200, deadline=None)
@given(SAMPLES)
def test_those_of_the_grpo_family_match_the_paper(samples):
    batch = batch_of(samples)
    with_std, without = (spread(reference.grpo(batch, std=std), batch) for std in (True, False))
    for name in ("grpo", "gspo", "cispo"):
        np.testing.assert_allclose(advantages(batch, name=name), with_std, rtol=1e-9, atol=1e-7)
        np.testing.assert_allclose(advantages(batch, name=name, normalize_std=False), without, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(advantages(batch, name="dr_grpo"), without, rtol=1e-9, atol=1e-9)


@settings(max_examples=200, deadline=None)
@given(SAMPLES, st.sampled_from([0.0, 0.3]))
def test_rloo_matches_the_paper(samples, kl_coef):
    batch = batch_of(samples)
    wanted = spread(reference.rloo(batch, kl_coef=kl_coef), batch)
    np.testing.assert_allclose(
        advantages(batch, name="rloo", kl_coef=kl_coef, kl=kl_coef > 0), wanted, rtol=1e-9, atol=1e-9
    )


@settings(max_examples=200, deadline=None)
@given(SAMPLES, st.sampled_from([0.0, 0.3]), st.sampled_from([1.0, 0.9, 0.01]), st.booleans())
def test_reinforce_plus_plus_matches_the_paper(samples, kl_coef, gamma, baseline):
    batch = batch_of(samples)
    name = "reinforce_plus_plus_baseline" if baseline else "reinforce_plus_plus"
    config = AlgorithmConfig(name=name, kl_coef=kl_coef, gamma=gamma)
    wanted = reference.returns(batch, kl_coef=kl_coef, gamma=gamma, baseline=baseline)
    flat = [value for of_sample in wanted for value in of_sample if value is not None]
    got = token_advantages(episodes_of(batch, kl=kl_coef > 0), config)
    np.testing.assert_allclose(got, flat, rtol=1e-9, atol=1e-9)
    # Rounding is magnified where all returns are nearly equal, down to the variance's epsilon.
    np.testing.assert_allclose(normalized(got, config), reference.whitened(flat), rtol=1e-6, atol=1e-5)


STEPS = st.lists(st.tuples(st.integers(0, 6), st.floats(-3, 3)), max_size=4)
WITH_STEPS = st.lists(
    st.tuples(st.sampled_from("abc"), REWARDS, st.lists(TOKEN, min_size=1, max_size=7), STEPS), min_size=1, max_size=10
)


def with_process(samples):
    """The batch, and its episodes: process rewards stand within their completions, in order."""
    batch = batch_of([sample[:3] for sample in samples])
    for sample, (*_, steps) in zip(batch, samples, strict=True):
        sample["process"] = sorted((min(place, len(sample["mask"]) - 1), reward) for place, reward in steps)
    earned = [(row, *each) for row, sample in enumerate(batch) for each in sample["process"]]
    rows, positions, rewards = (np.array([each[column] for each in earned]) for column in range(3))
    process = ProcessRewards(rows.astype(np.int64), positions.astype(np.int64), rewards.astype(np.float64))
    return batch, process


@settings(max_examples=200, deadline=None)
@given(WITH_STEPS, st.booleans(), st.booleans())
def test_process_rewards_of_the_grpo_family_match_the_paper(samples, only, std):
    batch, process = with_process(samples)
    config = AlgorithmConfig(name="grpo", normalize_std=std, process_rewards="only" if only else "add")
    got = token_advantages(replace(episodes_of(batch, kl=False), process=process), config)
    outcome = [reference.process_outcome(sample, only=only, whole=False) for sample in batch]
    pairs = zip(reference.grpo(outcome, std=std), reference.process_supervision(batch, std=std), batch, strict=True)
    wanted = [
        relative + value
        for relative, steps, sample in pairs
        for value, m in zip(steps, sample["mask"], strict=True)
        if m
    ]
    np.testing.assert_allclose(got, wanted, rtol=1e-7, atol=1e-5)


@settings(max_examples=200, deadline=None)
@given(WITH_STEPS, st.booleans())
def test_whole_completions_are_rewarded_with_the_sum_of_their_parts(samples, only):
    batch, process = with_process(samples)
    episodes = replace(episodes_of(batch, kl=False), process=process)
    outcome = [reference.process_outcome(sample, only=only, whole=True) for sample in batch]
    extra = {"process_rewards": "only" if only else "add"}
    got = token_advantages(episodes, AlgorithmConfig(name="rloo", **extra))
    np.testing.assert_allclose(got, spread(reference.rloo(outcome, kl_coef=0.0), batch), rtol=1e-9, atol=1e-9)
    got = token_advantages(episodes, AlgorithmConfig(name="gspo", normalize_std=False, **extra))
    np.testing.assert_allclose(got, spread(reference.grpo(outcome, std=False), batch), rtol=1e-9, atol=1e-9)


@settings(max_examples=200, deadline=None)
@given(WITH_STEPS, st.sampled_from([1.0, 0.9]), st.booleans(), st.booleans())
def test_process_rewards_are_in_the_returns_of_reinforce_plus_plus(samples, gamma, baseline, only):
    batch, process = with_process(samples)
    name = "reinforce_plus_plus_baseline" if baseline else "reinforce_plus_plus"
    config = AlgorithmConfig(name=name, gamma=gamma, process_rewards="only" if only else "add")
    outcome = [reference.process_outcome(sample, only=only, whole=False) for sample in batch]
    wanted = reference.returns(outcome, kl_coef=0.0, gamma=gamma, baseline=baseline)
    got = token_advantages(replace(episodes_of(batch, kl=False), process=process), config)
    flat = [value for of_sample in wanted for value in of_sample if value is not None]
    np.testing.assert_allclose(got, flat, rtol=1e-9, atol=1e-9)


def test_whitened_tokens_have_mean_zero_and_variance_one():
    values = np.random.default_rng(0).normal(3.0, 5.0, 1000)
    assert whiten(values).mean() == pytest.approx(0.0, abs=1e-12)
    assert whiten(values).std(ddof=1) == pytest.approx(1.0, rel=1e-8)


@pytest.mark.parametrize("values", [[], [3.0], [0.5] * 4])
def test_nothing_one_token_and_equal_tokens_whiten_to_zero(values):
    assert whiten(np.array(values)).tolist() == [0.0] * len(values)


def test_a_group_of_one_has_no_advantage_but_for_plain_reinforce_plus_plus():
    batch = batch_of([("a", 5.0, [(True, 0.0)] * 2), ("b", 1.0, [(True, 0.0)]), ("b", 2.0, [(True, 0.0)])])
    for name in ("grpo", "dr_grpo", "gspo", "cispo", "rloo"):
        assert advantages(batch, name=name)[:2].tolist() == [0.0, 0.0]
    assert token_advantages(episodes_of(batch, kl=False), AlgorithmConfig(name="reinforce_plus_plus"))[0] == 5.0
    baseline = AlgorithmConfig(name="reinforce_plus_plus_baseline")
    assert token_advantages(episodes_of(batch, kl=False), baseline)[:2].tolist() == [0.0, 0.0]


def test_time_passes_on_tokens_that_are_not_trained():
    batch = batch_of([("a", 8.0, [(True, 0.0), (False, 0.0), (False, 0.0), (True, 0.0), (False, 0.0)])])
    config = AlgorithmConfig(name="reinforce_plus_plus", gamma=0.5)
    assert token_advantages(episodes_of(batch, kl=False), config).tolist() == [1.0, 8.0]
