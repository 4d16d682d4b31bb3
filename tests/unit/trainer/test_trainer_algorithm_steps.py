"""Every algorithm through the torch backend: loss and gradient against float64, whatever the packing."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.common.config import Config
from services.common.errors import ConfigError
from services.common.versions import Version
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.batch.samples import decode_groups
from services.trainer.batch.staleness import Clock
from services.trainer.metrics import training_metrics
from services.trainer.step import train_batch
from tests.kit import reference_advantages, reference_losses
from tests.kit.tiny_model import build_tiny_qwen3
from tests.kit.trainer_batch import make_batch
from tests.kit.trainer_ragged import plain_logprobs, ragged_samples

CLOCK = Clock(Version(1, 0), {1: 0})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"policy": build_tiny_qwen3(root / "a"), "reference": build_tiny_qwen3(root / "b", seed=1)}


def make_config(models, *, max_tokens=4096, batch=None, plugins=None, **algorithm):
    return Config(
        model={"hf_checkpoint": models["policy"], "ref_checkpoint": models["reference"]},
        batch=batch or {},
        rollout={"sampling": {"max_response_len": 50}},
        trainer={"algorithm": algorithm, "max_tokens_per_gpu": max_tokens, "optimizer": {"clip_grad": 1e9}},
        plugins=plugins or {},
    )


@pytest.fixture(scope="module")
def exact(models):
    """The models in float64, as transformers runs them."""
    return [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval() for path in models.values()]


@pytest.fixture(scope="module")
def samples(exact):
    """Sampled by a policy that is not far from the trained one."""
    rng = np.random.default_rng(0)

    def recorded(sample, number, segment):
        with torch.no_grad():
            logprobs = plain_logprobs(exact[0], sample, number)[0].numpy()
        near = np.minimum(logprobs + rng.normal(0, 0.4, len(logprobs)), 0.0).astype(np.float32)
        return replace(segment, rollout_logprobs=near)

    return [
        replace(sample, segments=tuple(recorded(sample, *each) for each in enumerate(sample.segments)))
        for sample in ragged_samples(0, segments=True)
    ]


def reference_loss(exact, samples, algorithm):
    """From the weights to the loss in float64, with the advantages and losses of tests/kit."""
    policy, ref = exact
    policy.zero_grad()
    batch, nested = [], []
    for sample in samples:
        tokens, masks = [], []
        for number, segment in enumerate(sample.segments):
            logprobs, distribution = plain_logprobs(policy, sample, number)
            with torch.no_grad():
                ref_logprobs, _ = plain_logprobs(ref, sample, number)
            entropy = -(distribution.exp() * distribution).sum(-1)
            for place in range(segment.completion_length):
                rollout, new = float(segment.rollout_logprobs[place]), logprobs[place]
                old = rollout if algorithm.old_logprobs == "rollout" else new.item()
                token = {"new": new, "entropy": entropy[place], "old": old, "rollout": rollout, "factor": 1.0}
                tokens.append({**token, "ref": ref_logprobs[place].item(), "segment": number})
            masks += segment.loss_mask.tolist()
        estimates = [reference_losses.kl(algorithm.kl_type, torch.tensor(t["old"]).double(), t["ref"]) for t in tokens]
        batch.append(
            {"reward": sample.reward, "group": sample.group_id, "mask": masks, "kl": [float(e) for e in estimates]}
        )
        nested.append(tokens)
    advantages = reference_values(batch, algorithm)
    for tokens, of_sample in zip(nested, advantages, strict=True):
        for token, advantage in zip(tokens, of_sample, strict=True):
            token["advantage"] = advantage
    trained = [
        [
            [t for t, m in zip(tokens, sample["mask"], strict=True) if m and t["segment"] == number]
            for number in range(max(t["segment"] for t in tokens) + 1)
        ]
        for tokens, sample in zip(nested, batch, strict=True)
    ]
    loss = reference_losses.batch_loss(
        trained, algorithm.loss_reduction, reference_losses.settings_of(algorithm, constant=50.0)
    )
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in policy.named_parameters()}


def reference_values(batch, algorithm):
    """Advantages by sample and completion token, None where nothing is trained."""
    if algorithm.name.startswith("reinforce"):
        baseline = algorithm.name.endswith("baseline")
        values = reference_advantages.returns(
            batch, kl_coef=algorithm.kl_coef, gamma=algorithm.gamma, baseline=baseline
        )
    else:
        per_sample = (
            reference_advantages.rloo(batch, kl_coef=algorithm.kl_coef)
            if algorithm.name == "rloo"
            else reference_advantages.grpo(batch, std=algorithm.normalize_std)
        )
        values = [[a if m else None for m in s["mask"]] for a, s in zip(per_sample, batch, strict=True)]
    if not algorithm.normalize_advantages:
        return values
    white = iter(reference_advantages.whitened([v for of_sample in values for v in of_sample if v is not None]))
    return [[None if v is None else next(white) for v in of_sample] for of_sample in values]


ALGORITHMS = {
    "grpo-dual-clip-kl-entropy": {
        "eps_clip_high": 0.28,
        "eps_clip_c": 3.0,
        "use_kl_loss": True,
        "kl_loss_coef": 0.1,
        "kl_type": "k3",
        "kl_unbiased": True,
        "entropy_coef": 0.01,
    },
    "dr_grpo": {"name": "dr_grpo"},
    "gspo": {"name": "gspo", "eps_clip": 0.4, "loss_reduction": "per_sample"},
    "cispo": {"name": "cispo", "eps_clip": 1.0, "eps_clip_high": 2.0, "loss_reduction": "per_token"},
    "rloo-kl-in-reward": {"name": "rloo", "kl_coef": 0.05},
    "reinforce_plus_plus-kl-in-reward": {"name": "reinforce_plus_plus", "kl_coef": 0.05, "gamma": 0.97},
    "reinforce_plus_plus_baseline-recomputed": {
        "name": "reinforce_plus_plus_baseline",
        "kl_coef": 0.05,
        "kl_type": "k2",
        "old_logprobs": "recomputed",
    },
    "tis": {"old_logprobs": "recomputed", "correction": {"weights": "clip"}, "loss_reduction": "per_token"},
    "icepop-and-rejection": {
        "old_logprobs": "recomputed",
        "correction": {"weights": "mask", "low": 0.5, "high": 3.0, "reject": "geometric", "reject_low": 0.9},
    },
    "sequence-weights-veto-opsm": {
        "old_logprobs": "recomputed",
        "correction": {"weights": "clip", "level": "sequence", "veto": 0.35},
        "opsm_delta": 0.0,
    },
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_loss_and_gradient_match_float64_under_any_packing(models, exact, samples, monkeypatch, name):
    config = make_config(models, **ALGORITHMS[name])
    loss, gradients = reference_loss(exact, samples, config.trainer.algorithm)
    backend = TorchBackend(config)
    captured = {}

    def keep_gradients(self, micro_batches):
        result = self.accumulate(micro_batches)
        captured["gradients"] = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        result.applied = True
        return result

    monkeypatch.setattr(TorchBackend, "train", keep_gradients)
    for max_tokens in (1, 120, 100_000):
        config.trainer.max_tokens_per_gpu = max_tokens
        (result,) = train_batch(backend, samples, CLOCK, config)
        assert result.micro_batches > 1 or max_tokens == 100_000
        assert result.loss == pytest.approx(loss, abs=5e-5, rel=1e-4)
        for key, gradient in captured["gradients"].items():
            np.testing.assert_allclose(gradient, gradients[key], atol=1e-4, rtol=5e-3)
    line = training_metrics([result])
    assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))


def test_what_an_algorithm_does_is_in_the_metrics(models, samples):
    config = make_config(
        models,
        old_logprobs="recomputed",
        eps_clip_c=3.0,
        correction={"weights": "mask", "low": 0.5, "reject": "token", "reject_low": 0.4, "reject_high": 2.5},
        use_kl_loss=True,
    )
    line = training_metrics(train_batch(TorchBackend(config), samples, CLOCK, config))
    assert line["ratio_max"] == line["ratio_mean"] == pytest.approx(1.0)
    for name in ("clip_fraction", "clip_fraction_low", "clip_fraction_high", "clip_fraction_dual"):
        assert line[name] == 0.0
    assert line["kl"] != 0.0
    assert 0.0 < line["rejected_fraction"] < line["correction_mask_fraction"] < 1.0
    assert line["correction_clip_fraction"] == 0.0
    assert 0.0 < line["correction_weight_mean"] < line["correction_weight_max"] <= 2.0


def test_old_logprobs_and_whitening_are_of_the_whole_batch_however_many_optimizer_steps(models, monkeypatch):
    batch = {"rollout_batch_size": 8, "n_samples_per_prompt": 8, "num_steps_per_rollout": 4}
    config = make_config(models, batch=batch, name="reinforce_plus_plus", old_logprobs="recomputed")
    config.trainer.optimizer.lr = 1e-2
    backend, samples = TorchBackend(config), decode_groups(make_batch(0), vocab_size=128)
    seen, train = [], TorchBackend.train

    def spy(self, micro_batches):
        seen.append(micro_batches)
        return train(self, micro_batches)

    start = {key: weight.clone() for key, weight in backend.weights().items()}
    monkeypatch.setattr(TorchBackend, "train", spy)
    results = train_batch(backend, samples, CLOCK, config)
    assert len(seen) == 4
    assert results[0].ratio == pytest.approx(results[0].tokens, rel=1e-4)
    assert results[3].maxima["ratio_max"] > 1.01
    advantages = np.concatenate([batch.advantages for micro_batches in seen for batch in micro_batches])
    assert advantages.mean() == pytest.approx(0.0, abs=1e-5)
    assert advantages.std(ddof=1) == pytest.approx(1.0, rel=1e-4)
    with torch.no_grad():
        for key, weight in backend.weights().items():
            weight.copy_(start[key])
    for micro_batches in seen:
        for recorded, own in zip(micro_batches, backend.logprobs(micro_batches), strict=True):
            np.testing.assert_allclose(recorded.old_logprobs, own, atol=1e-5)


def test_by_default_the_reference_is_where_training_began(models, samples):
    config = make_config(models, use_kl_loss=True, kl_loss_coef=0.1, kl_type="k3")
    config.model.ref_checkpoint = None
    config.trainer.optimizer.lr = 1e-2
    backend = TorchBackend(config)
    first, second = (train_batch(backend, samples, CLOCK, config)[0].figures["kl"] for _ in range(2))
    assert first == pytest.approx(0.0, abs=1e-6)
    assert second > 1e-4


def test_a_reference_that_is_not_there_or_speaks_another_language_is_named(models, tmp_path):
    config = make_config(models, use_kl_loss=True)
    config.model.ref_checkpoint = tmp_path / "none"
    with pytest.raises(ConfigError, match=r"model\.ref_checkpoint: .*none does not load"):
        TorchBackend(config)
    config.model.ref_checkpoint = build_tiny_qwen3(tmp_path / "m", vocab_size=256)
    with pytest.raises(ConfigError, match=r"model\.ref_checkpoint: .* has 256 tokens, and the trained model 128"):
        TorchBackend(config)
