"""Every loss, value and gradient, against one token at a time in float64, however the sequences are packed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.config.algorithm import AlgorithmConfig, CorrectionConfig
from services.trainer.algorithms.correction import importance_weights
from services.trainer.algorithms.objective import Tokens, objective
from services.trainer.algorithms.policy_loss import cispo, clipped_surrogate, sequence_surrogate
from services.trainer.algorithms.reduction import sample_weights
from tests.kit import reference_losses as reference

FIELDS = ("old", "rollout", "ref")


@st.composite
def algorithms(draw):
    """Any combination that the configuration allows."""
    loss = draw(st.sampled_from(["clip", "gspo", "cispo", "sft"]))
    level = st.sampled_from(["token", "sequence", "geometric"])
    weights = draw(st.sampled_from(["none", "clip", "mask"]))
    correction = CorrectionConfig(
        weights=weights,
        level=draw(level) if weights != "none" else "token",
        low=draw(st.sampled_from([0.0, 0.5])),
        high=draw(st.sampled_from([1.5, 2.0, math.inf])),
        reject=draw(st.sampled_from(["none", "token", "sequence", "geometric"])),
        veto=draw(st.sampled_from([0.0, 1e-4, 0.3])),
    )
    opsm_delta = draw(st.sampled_from([None, 1e-4, 0.3]))
    if loss == "sft":
        correction, opsm_delta = CorrectionConfig(), None
    use_kl = draw(st.booleans())
    low = draw(st.sampled_from([0.1, 0.2]))
    return AlgorithmConfig(
        policy_loss=loss,
        eps_clip=low,
        eps_clip_high=draw(st.sampled_from([None, 0.28])),
        eps_clip_c=draw(st.sampled_from([None, 3.0])) if loss in ("clip", "gspo") else None,
        old_logprobs="recomputed",
        correction=correction,
        opsm_delta=opsm_delta,
        use_kl_loss=use_kl,
        kl_loss_coef=0.1 if use_kl else 0.0,
        kl_type=draw(st.sampled_from(["k1", "k2", "k3", "low_var_kl"])),
        kl_unbiased=use_kl and draw(st.booleans()),
        entropy_coef=draw(st.sampled_from([0.0, 0.01])),
    )


def random_samples(rng, spread, *, impossible=False):
    """Samples of one or two sequences of 0 to 6 tokens, one advantage each; log-probs apart by about `spread`."""
    samples = []
    for _ in range(int(rng.integers(1, 6))):
        advantage = float(rng.choice([0.0, 1.0, -1.0, rng.normal()]))
        sample = []
        for _ in range(int(rng.integers(1, 3))):
            sequence = []
            for _ in range(int(rng.choice([0, 1, 1, 2, 6]))):
                new = -float(rng.exponential(3))
                token = {name: min(new + float(rng.normal(0, spread)), 0.0) for name in FIELDS}
                token |= {"new": new, "entropy": float(rng.exponential()), "advantage": advantage}
                token["factor"] = float(rng.choice([0.0, 0.5, 2.0]))
                if impossible and rng.random() < 0.2:
                    # Of what the engine sampled, the engine never says so.
                    names = [("new",), ("new", "old"), ("new", "old", "ref"), ("ref",)][int(rng.integers(4))]
                    token |= dict.fromkeys(names, -math.inf)
                sequence.append(token)
            sample.append(sequence)
        samples.append(sample)
    return samples


def ours(samples, algorithm, reduction, bins=1, dtype=torch.float64):
    """Loss and gradients, with the sequences dealt to `bins` micro-batches."""
    flat = [(row, sequence) for row, sample in enumerate(samples) for sequence in sample]
    weights = sample_weights([sum(map(len, sample)) for sample in samples], reduction, 7.0)
    total, leaves = torch.zeros((), dtype=dtype), {}
    for each in range(bins):
        members = flat[each::bins]
        tokens = [token for _, sequence in members for token in sequence]
        if not tokens:
            continue

        def column(name, tokens=tokens, grad=False):
            return torch.tensor([token[name] for token in tokens], dtype=dtype, requires_grad=grad)

        lengths = [len(sequence) for _, sequence in members]
        new, entropy = column("new", grad=True), column("entropy", grad=True)
        weight = torch.tensor(np.repeat([weights[row] for row, _ in members], lengths), dtype=dtype)
        inputs = Tokens(
            new,
            entropy,
            *(column(name) for name in FIELDS),
            teacher_logprobs=None,
            advantages=column("advantage"),
            weights=weight,
            policy_factors=column("factor"),
            sequences=torch.tensor(np.repeat(np.arange(len(members)), lengths)),
            sequence_count=len(members),
        )
        result = objective(inputs, algorithm)
        loss = (result.loss * weight).sum()
        loss.backward()
        total = total + loss.detach()
        gradients = zip(
            new.grad.tolist(),
            (entropy.grad if entropy.grad is not None else torch.zeros_like(new)).tolist(),
            strict=True,
        )
        leaves |= {id(token): pair for token, pair in zip(tokens, gradients, strict=True)}
    order = [leaves[id(token)] for _, sequence in flat for token in sequence]
    return total.item(), np.array(order).reshape(-1, 2)


def wanted(samples, algorithm, reduction):
    leaves, copies = [], []
    for sample in samples:
        copied = []
        for sequence in sample:
            copied.append([])
            for token in sequence:
                new = torch.tensor(token["new"], dtype=torch.float64, requires_grad=True)
                entropy = torch.tensor(token["entropy"], dtype=torch.float64, requires_grad=True)
                leaves += [new, entropy]
                copied[-1].append({**token, "new": new, "entropy": entropy})
        copies.append(copied)
    loss = reference.batch_loss(copies, reduction, reference.settings_of(algorithm, constant=7.0))
    gradients = (
        torch.autograd.grad(loss, leaves, allow_unused=True) if leaves and loss.requires_grad else [None] * len(leaves)
    )
    return loss.item(), np.array([0.0 if g is None else g.item() for g in gradients]).reshape(-1, 2)


@settings(max_examples=300, deadline=None)
@given(
    algorithms(),
    st.sampled_from(["per_sample", "per_token", "constant"]),
    st.integers(0, 1 << 32),
    st.sampled_from([0.01, 0.3, 3.0, 30.0]),
)
def test_any_objective_matches_the_reference_under_any_packing(algorithm, reduction, seed, spread):
    samples = random_samples(np.random.default_rng(seed), spread)
    loss, gradients = wanted(samples, algorithm, reduction)
    for bins in (1, 2, 5):
        got, got_gradients = ours(samples, algorithm, reduction, bins)
        assert got == pytest.approx(loss, rel=1e-9, abs=1e-9)
        np.testing.assert_allclose(got_gradients, gradients, rtol=1e-9, atol=1e-9)


RECOMPUTED = {"old_logprobs": "recomputed"}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"policy_loss": "gspo"},
        {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_type": "low_var_kl", "kl_unbiased": True},
        *({**RECOMPUTED, "correction": {"weights": "clip", "level": each}} for each in ("token", "sequence")),
        {**RECOMPUTED, "correction": {"weights": "mask", "level": "geometric", "veto": 1e-4}},
        {**RECOMPUTED, "correction": {"reject": "geometric"}, "opsm_delta": 0.1},
    ],
    ids=["clip", "gspo", "kl", "token-weights", "sequence-weights", "geometric-mask", "rejection"],
)
@pytest.mark.parametrize("seed", range(8))
def test_impossible_tokens_match_the_reference_and_stay_finite(keys, seed):
    samples = random_samples(np.random.default_rng(seed), 0.3, impossible=True)
    algorithm = AlgorithmConfig(**keys)
    loss, gradients = wanted(samples, algorithm, "per_sample")
    got, got_gradients = ours(samples, algorithm, "per_sample")
    assert math.isfinite(got)
    assert got == pytest.approx(loss, rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(got_gradients, np.nan_to_num(gradients), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "low_var_kl"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_gradients_are_those_of_finite_differences(kind, unbiased):
    algorithm = AlgorithmConfig(
        policy_loss="gspo", eps_clip=0.9, use_kl_loss=True, kl_loss_coef=0.3, kl_type=kind, kl_unbiased=unbiased
    )
    samples = random_samples(np.random.default_rng(3), 0.2)
    _, gradients = ours(samples, algorithm, "per_token")
    step = 1e-6
    for index, token in enumerate(token for sample in samples for sequence in sample for token in sequence):
        before = token["new"]
        losses = []
        for moved in (before - step, before + step):
            token["new"] = moved
            losses.append(ours(samples, algorithm, "per_token")[0])
        token["new"] = before
        assert (losses[1] - losses[0]) / (2 * step) == pytest.approx(gradients[index, 0], rel=1e-5, abs=1e-8)


def test_float32_is_near_the_reference():
    samples = random_samples(np.random.default_rng(5), 0.3)
    algorithm = AlgorithmConfig(use_kl_loss=True, kl_loss_coef=0.1, kl_type="k3", entropy_coef=0.01)
    loss, gradients = wanted(samples, algorithm, "per_sample")
    got, got_gradients = ours(samples, algorithm, "per_sample", dtype=torch.float32)
    assert got == pytest.approx(loss, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(got_gradients, gradients, rtol=1e-4, atol=1e-6)


def tensors(*rows):
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def test_clips_are_counted_by_side():
    new, old, advantages = tensors([0.5, -0.5, 2.0, 0.5, 0.0], [0.0] * 5, [1.0, -1.0, -1.0, -1.0, 1.0])
    got = clipped_surrogate(new, old, advantages, eps_clip=0.2, eps_clip_high=0.2, eps_clip_c=3.0)
    assert got.clipped.tolist() == [1, 1, 1, 0, 0]
    assert got.clipped_low.tolist() == [0, 1, 0, 0, 0]
    assert got.clipped_dual.tolist() == [0, 0, 1, 0, 0]
    assert got.loss[2] == 3.0
    got = cispo(new, old, advantages, eps_clip=0.2, eps_clip_high=0.2)
    assert got.clipped.tolist() == [1, 1, 1, 1, 0]
    assert got.clipped_low.tolist() == [0, 1, 0, 0, 0]


def test_the_ratio_of_gspo_is_that_of_the_sequence_and_an_empty_one_is_no_matter():
    new, old, advantages = tensors([0.2, 0.0, -0.3], [0.0] * 3, [1.0] * 3)
    got = sequence_surrogate(new, old, advantages, torch.tensor([0, 0, 2]), 3, eps_clip=0.2, eps_clip_high=0.2)
    np.testing.assert_allclose(got.ratio, np.exp([0.1, 0.1, -0.3]))


def test_weights_of_a_correction_are_counted():
    proximal, behaviour = tensors(np.log([3.0, 1.0, 0.1]), [0.0] * 3)
    sequences = torch.tensor([0, 0, 1])
    clip = importance_weights(proximal, behaviour, sequences, 2, kind="clip", level="token", low=0.5, high=2.0)
    np.testing.assert_allclose(clip.weights, [2.0, 1.0, 0.5])
    assert (clip.clipped.tolist(), clip.masked.tolist()) == ([1, 0, 1], [0, 0, 0])
    mask = importance_weights(proximal, behaviour, sequences, 2, kind="mask", level="sequence", low=0.5, high=5.0)
    np.testing.assert_allclose(mask.weights, [3.0, 3.0, 0.0])
    assert (mask.clipped.tolist(), mask.masked.tolist()) == ([0, 0, 0], [0, 0, 1])


def test_decoupled_ppo_is_the_unbounded_weight():
    samples = random_samples(np.random.default_rng(1), 0.5)
    algorithm = AlgorithmConfig(old_logprobs="recomputed", correction={"weights": "clip", "high": math.inf})
    total = 0.0
    for sample in samples:
        for token in (token for sequence in sample for token in sequence):
            ratio, behaviour = math.exp(token["new"] - token["old"]), math.exp(token["old"] - token["rollout"])
            gain = min(ratio * token["advantage"], min(max(ratio, 0.8), 1.2) * token["advantage"])
            total -= behaviour * gain
    tokens = sum(len(sequence) for sample in samples for sequence in sample)
    assert ours(samples, algorithm, "per_token")[0] == pytest.approx(total / tokens, rel=1e-12)
