"""GAE and the value loss against plain loops in float64: ragged samples, gaps, empty masks, single tokens, edges."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.config.algorithm import AlgorithmConfig
from services.trainer.algorithms.estimators import Episodes, normalized, token_advantages
from services.trainer.algorithms.gae import generalised_advantages
from services.trainer.algorithms.process import ProcessRewards
from services.trainer.algorithms.value_loss import value_loss
from tests.kit import reference_advantages, reference_critic

FINITE = st.floats(-5, 5, allow_subnormal=False)
TOKEN = st.tuples(st.booleans(), FINITE, FINITE)
STEPS = st.lists(st.tuples(st.integers(0, 9), FINITE), max_size=3)
SAMPLES = st.lists(st.tuples(FINITE, st.lists(TOKEN, max_size=9), STEPS), min_size=1, max_size=9)
SHARES = st.sampled_from([0.0, 1.0, 0.95, 0.5])


def batch_of(samples):
    return [
        {
            "reward": reward,
            "mask": [m for m, _, _ in tokens],
            "kl": [k for _, k, _ in tokens],
            "values": [v for _, _, v in tokens],
            "process": sorted(step for step in steps if step[0] < len(tokens)),
        }
        for reward, tokens, steps in samples
    ]


def flat(batch, name):
    return np.array([x for sample in batch for m, x in zip(sample["mask"], sample[name], strict=True) if m], np.float64)


def episodes_of(batch):
    places = [np.flatnonzero(sample["mask"]) for sample in batch]
    earned = [(row, *step) for row, sample in enumerate(batch) for step in sample["process"]]
    process = None
    if earned:
        rows, positions, rewards = zip(*earned, strict=True)
        process = ProcessRewards(np.array(rows), np.array(positions), np.array(rewards))
    return Episodes(
        rewards=np.array([sample["reward"] for sample in batch]),
        group_ids=["g"] * len(batch),
        rows=np.repeat(np.arange(len(batch)), [len(each) for each in places]),
        positions=np.concatenate(places).astype(np.int64),
        kl=flat(batch, "kl"),
        process=process,
        values=flat(batch, "values"),
    )


@settings(max_examples=300, deadline=None)
@given(SAMPLES, st.sampled_from([0.0, 0.3]), st.sampled_from([1.0, 0.95, 0.01]), SHARES)
def test_ppo_matches_the_paper(samples, kl_coef, gamma, lambd):
    batch = batch_of(samples)
    config = AlgorithmConfig(name="ppo", kl_coef=kl_coef, gamma=gamma, lambd=lambd)
    wanted = reference_critic.gae(batch, kl_coef=kl_coef, gamma=gamma, lambd=lambd)
    numbers = [value for of_sample in wanted for value in of_sample if value is not None]
    got = token_advantages(episodes_of(batch), config)
    np.testing.assert_allclose(got, numbers, rtol=1e-9, atol=1e-9)
    # Rounding is magnified where all advantages are nearly equal, down to the variance's epsilon.
    np.testing.assert_allclose(normalized(got, config), reference_advantages.whitened(numbers), rtol=1e-6, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(SAMPLES, SHARES, SHARES)
def test_without_gaps_each_gamma_and_lambda_is_the_recursion(samples, gamma, lambd):
    """Also gamma = 0, which is no setting."""
    batch = [{**sample, "mask": [True] * len(sample["mask"])} for sample in batch_of(samples)]
    episodes = episodes_of(batch)
    earned = np.array([r for s in batch for r in reference_critic.rewards_of_tokens(s, kl_coef=0.3).values()], float)
    got = generalised_advantages(earned, episodes.values, episodes.rows, episodes.positions, gamma=gamma, lambd=lambd)
    wanted = []
    for row in range(len(batch)):
        rewards, values = earned[episodes.rows == row], episodes.values[episodes.rows == row]
        advantage, following = 0.0, 0.0
        of_sample = []
        for reward, value in zip(rewards[::-1], values[::-1], strict=True):
            advantage = reward + gamma * following - value + gamma * lambd * advantage
            following = value
            of_sample.append(advantage)
        wanted += of_sample[::-1]
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(SAMPLES)
def test_with_lambda_1_returns_are_those_of_reinforce_whatever_the_values(samples):
    episodes = episodes_of(batch_of(samples))
    config = AlgorithmConfig(name="ppo", gamma=0.9, kl_coef=0.3)
    plain = AlgorithmConfig(name="reinforce_plus_plus", gamma=0.9, kl_coef=0.3)
    wanted = token_advantages(replace(episodes, values=None), plain)
    np.testing.assert_allclose(token_advantages(episodes, config) + episodes.values, wanted, rtol=1e-9, atol=1e-9)


def test_a_batch_without_trained_tokens_has_no_advantages():
    episodes = episodes_of([{"reward": 1.0, "mask": [], "kl": [], "values": [], "process": []}] * 2)
    assert len(token_advantages(episodes, AlgorithmConfig(name="ppo", lambd=0.9))) == 0


@pytest.mark.parametrize("clip", [0.2, 0.001, float("inf")])
def test_the_value_loss_and_its_gradient_match_the_paper(clip):
    rng = np.random.default_rng(0)
    old, returns = rng.normal(size=(2, 500))
    moved = old + rng.normal(0, 0.3, 500)
    values = torch.tensor(moved, requires_grad=True)
    result = value_loss(values, torch.tensor(old), torch.tensor(returns), value_clip=clip)
    result.loss.sum().backward()
    ours, clipped = values.grad.numpy(), result.clipped.numpy()
    leaves = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in moved.tolist()]
    wanted = [
        reference_critic.value_loss(*each, clip=clip)
        for each in zip(leaves, old.tolist(), returns.tolist(), strict=True)
    ]
    sum(wanted).backward()
    gradients = np.array([leaf.grad.item() for leaf in leaves])
    np.testing.assert_allclose(result.loss.detach().numpy(), [loss.item() for loss in wanted], rtol=1e-12)
    np.testing.assert_allclose(ours, gradients, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(clipped == 1.0, (gradients == 0.0))
    assert clipped.any() == (clip < 1.0)
