"""Advantages, clipped loss, reductions and KL estimators against independent float64 references."""

import math

import numpy as np
import pytest
import torch

from services.trainer.algorithms import kl
from services.trainer.algorithms.advantages import group_advantages
from services.trainer.algorithms.policy_loss import clipped_surrogate
from services.trainer.algorithms.reduction import sample_weights


def reference_advantages(rewards, group_ids, normalize_std):
    result = []
    for reward, group_id in zip(rewards, group_ids, strict=True):
        group = [r for r, g in zip(rewards, group_ids, strict=True) if g == group_id]
        mean = math.fsum(group) / len(group)
        if len(group) == 1:
            result.append(0.0)
            continue
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / (len(group) - 1))
        result.append((reward - mean) / (std + 1e-6) if normalize_std else reward - mean)
    return result


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_advantages_of_ragged_groups_match_the_reference(seed, normalize_std):
    rng = np.random.default_rng(seed)
    group_ids = [f"g{number}" for number in range(6) for _ in range(rng.integers(1, 9))]
    rng.shuffle(group_ids)
    rewards = rng.normal(size=len(group_ids))
    got = group_advantages(rewards, group_ids, normalize_std=normalize_std)
    np.testing.assert_allclose(got, reference_advantages(rewards, group_ids, normalize_std), rtol=1e-12, atol=1e-12)


def test_a_group_of_one_and_a_group_without_variance_have_no_advantage():
    got = group_advantages(np.array([1.0, 0.5, 0.5, 0.5]), ["a", "b", "b", "b"], normalize_std=True)
    np.testing.assert_array_equal(got, np.zeros(4))


def test_a_group_is_normalised_by_its_own_rewards_only():
    alone = group_advantages(np.array([0.0, 1.0, 1.0]), ["a"] * 3, normalize_std=True)
    beside = group_advantages(np.array([0.0, 7.0, 1.0, -3.0, 1.0]), ["a", "b", "a", "b", "a"], normalize_std=True)
    np.testing.assert_array_equal(alone, beside[[0, 2, 4]])


def reference_surrogate(logprob, old, advantage, low, high):
    ratio = math.exp(logprob - old)
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


@pytest.mark.parametrize("seed", range(5))
def test_the_clipped_surrogate_matches_the_reference(seed):
    rng = np.random.default_rng(seed)
    new, old, advantages = -rng.exponential(2, 200), -rng.exponential(2, 200), rng.normal(size=200)
    got = clipped_surrogate(
        torch.tensor(new), torch.tensor(old), torch.tensor(advantages), eps_clip=0.2, eps_clip_high=0.28
    )
    wanted = [reference_surrogate(*row, 0.2, 0.28) for row in zip(new, old, advantages, strict=True)]
    np.testing.assert_allclose(got.loss.numpy(), wanted, rtol=1e-12)
    np.testing.assert_allclose(got.ratio.numpy(), np.exp(new - old), rtol=1e-12)


def test_clipped_tokens_have_no_gradient_and_are_counted():
    logprobs = torch.tensor([0.5, -0.5, 0.5, -0.5, 0.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0])
    surrogate = clipped_surrogate(logprobs, torch.zeros(5), advantages, eps_clip=0.2, eps_clip_high=0.2)
    surrogate.loss.sum().backward()
    assert surrogate.clipped.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert logprobs.grad is not None
    assert (logprobs.grad == 0).tolist() == [True, True, False, False, False]


def test_an_absurd_ratio_stays_finite():
    logprobs = torch.tensor([0.0, 0.0], requires_grad=True)
    old = torch.tensor([-500.0, -500.0])
    surrogate = clipped_surrogate(logprobs, old, torch.tensor([1.0, -1.0]), eps_clip=0.2, eps_clip_high=0.2)
    surrogate.loss.sum().backward()
    assert torch.isfinite(surrogate.loss).all()
    assert torch.isfinite(logprobs.grad).all()


def test_per_sample_weights_average_the_token_means():
    counts = [3, 0, 1]
    losses = [[1.0, 2.0, 6.0], [], [5.0]]
    weights = sample_weights(counts, "per_sample")
    total = sum(weight * value for weight, row in zip(weights, losses, strict=True) for value in row)
    assert total == pytest.approx((3.0 + 0.0 + 5.0) / 3)


def test_per_token_weights_average_all_tokens():
    weights = sample_weights([3, 0, 1], "per_token")
    assert weights.tolist() == [0.25, 0.25, 0.25]
    assert sample_weights([0, 0], "per_token").tolist() == [1.0, 1.0]


def test_kl_estimators_average_to_the_true_divergence():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    log_p, log_q = torch.tensor(np.log(p)), torch.tensor(np.log(q))
    true = float((p * np.log(p / q)).sum())
    weights = torch.tensor(p)
    assert float((weights * kl.k1(log_p, log_q)).sum()) == pytest.approx(true, rel=1e-12)
    assert float((weights * kl.k3(log_p, log_q)).sum()) == pytest.approx(true, rel=1e-12)
    assert float((weights * kl.k2(log_p, log_q)).sum()) == pytest.approx(float((p * np.log(p / q) ** 2).sum()) / 2)
    assert (kl.k3(log_p, log_q) >= 0).all()
