"""A user's loss and reducer, SFT, and distillation: through the backend, beside what is built in or done by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.common.config import Config, load
from services.common.errors import ConfigError
from services.common.versions import Version
from services.trainer.advantages import with_advantages
from services.trainer.algorithms.advantages import group_advantages, whiten
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.batch.plan import Batching
from services.trainer.batch.prepare import prepare_step
from services.trainer.batch.staleness import Clock
from tests.kit import loss_functions
from tests.kit.tiny_model import build_tiny_qwen3
from tests.kit.trainer_ragged import plain_logprobs, ragged_samples

CLOCK = Clock(Version(1, 0), {1: 0})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_qwen3(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return build_tiny_qwen3(tmp_path_factory.mktemp("models") / "t", seed=1)


def near(samples, model):
    """With rollout log-probs near the model's own: some within the clip, some outside."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    rng = np.random.default_rng(0)
    moved = []
    for sample in samples:
        segments = []
        for number, segment in enumerate(sample.segments):
            with torch.no_grad():
                own = plain_logprobs(reference, sample, number)[0].numpy()
            drawn = (own + rng.normal(0, 0.2, len(own))).astype(np.float32)
            segments.append(dataclasses.replace(segment, rollout_logprobs=drawn))
        moved.append(dataclasses.replace(sample, segments=tuple(segments)))
    return moved


def configured(model, teacher=None, **algorithm):
    return Config(model={"hf_checkpoint": model, "teacher_checkpoint": teacher}, trainer={"algorithm": algorithm})


def prepared(backend, samples, config, max_tokens=4096):
    algorithm = config.trainer.algorithm
    step = prepare_step(
        samples,
        CLOCK,
        mask_above=None,
        reduction=algorithm.loss_reduction,
        constant=algorithm.loss_constant,
        batching=Batching(max_tokens),
    )
    (batches,) = with_advantages(backend, samples, [step], config)
    return step, batches


def outcome(config, samples, max_tokens=4096):
    """The result of a step, and its gradient as one vector."""
    backend = TorchBackend(config)
    result = backend.accumulate(prepared(backend, samples, config, max_tokens)[1])
    return result, torch.cat([parameter.grad.flatten() for parameter in backend.model.parameters()])


def assert_same(left, right, tolerance=1e-5):
    assert left[0].loss == pytest.approx(right[0].loss, abs=tolerance)
    torch.testing.assert_close(left[1], right[1], atol=tolerance, rtol=1e-3)


@pytest.mark.parametrize("reduction", ["per_sample", "per_token"])
def test_a_surrogate_by_hand_is_the_built_in_one_however_packed(model, reduction):
    samples = near(ragged_samples(0, segments=True), model)
    built_in = outcome(configured(model, loss_reduction=reduction), samples)
    path = {"policy_loss": "custom", "loss_function": "tests.kit.loss_functions:surrogate"}
    loss_functions.SEEN.clear()
    for max_tokens in (4096, 60):
        found = outcome(configured(model, loss_reduction=reduction, **path), samples, max_tokens)
        assert_same(found, built_in)
        assert found[0].figures["outside"] > 0
    seen = loss_functions.SEEN[0]
    assert seen["args"].rollout_max_response_len == 128
    assert seen["batch"]["response_lengths"] == [len(part) for part in seen["batch"]["advantages"]]
    assert seen["batch"]["ref_log_probs"] is None


def test_a_loss_may_be_of_entropies(model):
    samples = near(ragged_samples(0), model)
    path = {"policy_loss": "custom", "loss_function": "tests.kit.loss_functions:entropy_only"}
    wanted = outcome(configured(model, entropy_coef=1.0), [dataclasses.replace(s, reward=0.0) for s in samples])
    assert_same(outcome(configured(model, **path), samples), wanted)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", "did not give one number, a tensor with gradient"),
        ("per_token", "did not give one number"),
        ("short_metric", "did not give one short for each token"),
        ("failing", "failed: RuntimeError: on purpose"),
        ("missing", "has no function 'missing'"),
    ],
)
def test_mistakes_of_a_loss_are_told(model, name, message):
    config = configured(model, policy_loss="custom", loss_function=f"tests.kit.loss_functions:{name}")
    with pytest.raises(ConfigError, match=f"trainer.algorithm.loss_function: .*{message}"):
        outcome(config, ragged_samples(0))


def test_sums_over_a_constant_are_dr_grpos(model):
    samples = near(ragged_samples(0, segments=True), model)
    wanted = outcome(configured(model, loss_reduction="constant", loss_constant=100), samples)
    reducer = {"loss_reducer_function": "tests.kit.loss_functions:over_a_hundred"}
    for max_tokens in (4096, 60):
        assert_same(outcome(configured(model, **reducer), samples, max_tokens), wanted)


def test_a_reducer_weighs_the_policy_loss_and_nothing_else(model):
    samples = near(ragged_samples(1), model)
    config = configured(model, entropy_coef=0.1, loss_reducer_function="tests.kit.loss_functions:first_halves")
    backend = TorchBackend(config)
    _, batches = prepared(backend, samples, config)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    advantages = group_advantages(
        np.array([s.reward for s in samples]), [s.group_id for s in samples], normalize_std=True
    )
    total = 0.0
    for sample, advantage in zip(samples, advantages, strict=True):
        (segment,) = sample.segments
        with torch.no_grad():
            new, distribution = plain_logprobs(reference, sample)
        ratio = np.exp(new.numpy() - segment.rollout_logprobs)
        loss = np.maximum(-ratio * advantage, -ratio.clip(0.8, 1.2) * advantage) * segment.loss_mask
        half = (len(loss) + 1) // 2
        entropy = -(distribution.exp() * distribution).sum(-1).numpy() * segment.loss_mask
        total += loss[:half].sum() / max(half, 1) - 0.1 * entropy.sum() / max(segment.loss_mask.sum(), 1)
    assert backend.accumulate(batches).loss == pytest.approx(total / len(samples), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "message"), [("squares", "is not linear"), ("failing", "failed: RuntimeError"), ("none", "no function")]
)
def test_mistakes_of_a_reducer_are_told(model, name, message):
    config = configured(model, loss_reducer_function=f"tests.kit.loss_functions:{name}")
    with pytest.raises(ConfigError, match=f"trainer.algorithm.loss_reducer_function: .*{message}"):
        outcome(config, ragged_samples(0))


@pytest.mark.parametrize("reduction", ["per_sample", "per_token"])
def test_sft_is_transformers_cross_entropy(model, reduction):
    samples = [dataclasses.replace(sample, temperature=1.0) for sample in ragged_samples(0)]
    found = outcome(configured(model, policy_loss="sft", loss_reduction=reduction), samples)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for sample in samples:
        (segment,) = sample.segments
        labels = np.concatenate([np.full(segment.prompt_length, -100), np.where(segment.loss_mask, 0, -100)])
        labels = np.where(labels == 0, segment.token_ids, -100)
        trained = int(segment.loss_mask.sum())
        if not trained:
            continue
        ids = torch.from_numpy(segment.token_ids.astype(np.int64))[None]
        mean = reference(input_ids=ids, labels=torch.from_numpy(labels.astype(np.int64))[None]).loss
        total, tokens = total + mean * (trained if reduction == "per_token" else 1), tokens + trained
    wanted = total / (tokens if reduction == "per_token" else len(samples))
    wanted.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in reference.parameters()])
    assert found[0].loss == pytest.approx(wanted.item(), abs=2e-5)
    torch.testing.assert_close(found[1].double(), gradient, atol=5e-5, rtol=2e-3)


@pytest.mark.parametrize("old", ["rollout", "recomputed"])
@pytest.mark.parametrize("extra", [{}, {"name": "reinforce_plus_plus"}])
def test_distillation_takes_the_reverse_kl_from_each_advantage(model, teacher, old, extra):
    samples = near(ragged_samples(0), model)
    config = configured(model, teacher, use_opd=True, opd_kl_coef=0.5, old_logprobs=old, **extra)
    backend = TorchBackend(config)
    step, batches = prepared(backend, samples, config, max_tokens=60)
    student, tutor = (AutoModelForCausalLM.from_pretrained(m, dtype=torch.float64).eval() for m in (model, teacher))
    rewards, ids = np.array([sample.reward for sample in samples]), [sample.group_id for sample in samples]
    base = rewards if extra else group_advantages(rewards, ids, normalize_std=True)
    wanted, kls = [], []
    for sample, advantage in zip(samples, base, strict=True):
        (segment,) = sample.segments
        with torch.no_grad():
            own, theirs = (plain_logprobs(each, sample)[0].numpy() for each in (student, tutor))
        behaviour = segment.rollout_logprobs if old == "rollout" else own
        mask = segment.loss_mask.astype(bool)
        wanted += (advantage - 0.5 * (behaviour - theirs))[mask].tolist()
        kls += (own - theirs)[mask].tolist()
    expected = whiten(np.array(wanted)) if extra else np.array(wanted)
    np.testing.assert_allclose(step.flat([batch.advantages for batch in batches]), expected, atol=1e-4)
    result = backend.accumulate(batches)
    assert result.figures["opd_reverse_kl"] / result.tokens == pytest.approx(np.mean(kls), abs=1e-4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"policy_loss": "custom"}, "policy_loss = custom and loss_function: give both or neither"),
        ({"loss_function": "a:b"}, "policy_loss = custom and loss_function: give both or neither"),
        ({"policy_loss": "sft", "opsm_delta": 0.1}, "correction and opsm_delta are for policy losses by ratios"),
        ({"use_opd": True}, "use_opd and model.teacher_checkpoint: give both or neither"),
        ({"use_opd": True, "policy_loss": "gspo"}, "one advantage per segment, and use_opd makes many"),
        ({"loss_function": "plain"}, "'plain' is not of the form"),
    ],
)
def test_what_does_not_fit_is_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        load(None, {f"trainer.algorithm.{key}": value for key, value in keys.items()})


def test_a_teacher_of_another_vocabulary_is_refused(model, tmp_path):
    other = build_tiny_qwen3(tmp_path / "m", vocab_size=64)
    with pytest.raises(ConfigError, match=r"model\.teacher_checkpoint: .* has 64 tokens, and the trained model 128"):
        TorchBackend(configured(model, other, use_opd=True))


def test_infinities_of_the_teacher_name_the_sample(model, teacher):
    config = configured(model, teacher, use_opd=True)
    backend = TorchBackend(config)
    _, (batch,) = prepared(backend, ragged_samples(0), config)
    bad = int(batch.sample_rows[-1])
    batch.advantages[batch.sample_rows == bad] = math.inf
    assert backend.accumulate([batch]).offenders == [bad]
