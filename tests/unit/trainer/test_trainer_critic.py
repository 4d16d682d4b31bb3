"""The critic through the torch backend: values, loss and gradient against transformers in float64, and its life."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.common.config import Config
from services.common.errors import ConfigError
from services.common.versions import Version
from services.trainer.algorithms.reduction import sample_weights
from services.trainer.backends.torch import attention
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.backends.torch.critic import Critic
from services.trainer.backends.torch.model import load_critic
from services.trainer.backends.torch.sharding import Placement
from services.trainer.batch.samples import decode_groups
from services.trainer.batch.staleness import Clock
from services.trainer.checkpoint import CheckpointState, CheckpointStore
from services.trainer.metrics import training_metrics
from services.trainer.ranks.group import RankGroup
from services.trainer.step import train_batch
from tests.kit import reference_critic
from tests.kit.tiny_model import build_tiny_qwen3
from tests.kit.trainer_batch import make_batch
from tests.kit.trainer_ragged import ragged_samples

CLOCK = Clock(Version(1, 0), {1: 0})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"policy": build_tiny_qwen3(root / "a"), "critic": build_tiny_qwen3(root / "b", seed=1)}


def make_config(models, *, dtype="float32", critic=None, batch=None, max_tokens=4096, lr=1e-3, **algorithm):
    return Config(
        model={"hf_checkpoint": models["policy"], "critic_checkpoint": models["critic"], "dtype": dtype},
        batch=batch or {},
        trainer={
            "algorithm": {"name": "ppo", **algorithm},
            "critic": critic or {},
            "max_tokens_per_gpu": max_tokens,
            "optimizer": {"lr": lr, "clip_grad": 1e9},
        },
    )


def with_a_head(backend):
    """The critic's head, no longer 0."""
    generator = torch.Generator().manual_seed(0)
    head = backend.critic._root.model.value_head
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.2)
        head.bias.fill_(0.1)
    return head


def exact_values(models, head, samples):
    """By sample, of all completion tokens; with gradient, and the parameters it goes to."""
    body = AutoModelForCausalLM.from_pretrained(models["critic"], dtype=torch.float64).eval().base_model
    weight, bias = (p.detach().double().requires_grad_() for p in head.parameters())
    values = []
    for sample in samples:
        of_sample = []
        for segment in sample.segments:
            token_ids = torch.tensor(segment.token_ids.astype(np.int64))
            states = body(input_ids=token_ids[None], use_cache=False).last_hidden_state[0]
            of_sample.append((states @ weight.T + bias)[segment.prompt_length - 1 : -1, 0])
        values.append(torch.cat(of_sample))
    parameters = {f"base_model.{name}": p for name, p in body.named_parameters()}
    return values, parameters | {"value_head.weight": weight, "value_head.bias": bias}


@pytest.mark.parametrize("reduction", ["per_sample", "per_token"])
def test_loss_and_gradient_match_float64_under_any_packing(models, monkeypatch, reduction):
    samples = ragged_samples(0, segments=True)
    config = make_config(models, gamma=0.97, lambd=0.9, loss_reduction=reduction)
    backend = TorchBackend(config)
    values, parameters = exact_values(models, with_a_head(backend), samples)
    batch = [
        {
            "reward": sample.reward,
            "mask": [m for segment in sample.segments for m in segment.loss_mask.tolist()],
            "kl": [0.0] * len(of_sample),
            "values": of_sample.tolist(),
        }
        for sample, of_sample in zip(samples, values, strict=True)
    ]
    advantages = reference_critic.gae(batch, kl_coef=0.0, gamma=0.97, lambd=0.9)
    weights = sample_weights([sum(sample["mask"]) for sample in batch], reduction)
    loss, returns = torch.zeros((), dtype=torch.float64), []
    for row, of_sample in enumerate(advantages):
        for place, advantage in enumerate(of_sample):
            if advantage is not None:
                value = values[row][place]
                returns.append(advantage + value.item())
                loss = loss + weights[row] * reference_critic.value_loss(value, value.item(), returns[-1], clip=0.2)
    loss.backward()
    captured = {}

    def keep_gradients(self, micro_batches):
        result = self.accumulate(micro_batches)
        captured["gradients"] = {name: p.grad.clone() for name, p in self._root.model.named_parameters()}
        result.applied = True
        return result

    monkeypatch.setattr(Critic, "train", keep_gradients)
    monkeypatch.setattr(TorchBackend, "train", TorchBackend.accumulate)
    for max_tokens in (1, 120, 100_000):
        config.trainer.max_tokens_per_gpu = max_tokens
        (result,) = train_batch(backend, samples, CLOCK, config)
        assert result.critic.loss == pytest.approx(loss.item(), rel=1e-4)
        assert result.critic.returns == pytest.approx(math.fsum(returns), rel=1e-4)
        assert captured["gradients"].keys() == parameters.keys()
        for name, gradient in captured["gradients"].items():
            bound = 1e-4 * parameters[name].grad.abs().max().item() + 1e-9
            assert (gradient - parameters[name].grad).abs().max().item() <= bound, name


def test_it_begins_with_values_of_0_and_learns_what_the_returns_are(models):
    config = make_config(models, critic={"value_clip": math.inf, "lr": 3e-3})
    backend = TorchBackend(config)
    samples = decode_groups(make_batch(0), vocab_size=128)
    lines = [training_metrics(train_batch(backend, samples, CLOCK, config)) for _ in range(25)]
    first, last = lines[0], lines[-1]
    assert first["value_mean"] == first["explained_variance"] == 0.0
    assert first["value_loss"] == pytest.approx(0.5 * np.mean([sample.reward**2 for sample in samples]))
    assert last["value_loss"] < 0.5 * first["value_loss"]
    assert last["explained_variance"] > 0.5
    assert {line["critic_lr"] for line in lines} == {3e-3}
    assert {line["critic_only"] for line in lines} == {False}


def test_equal_returns_have_no_variance_to_explain(models):
    config = make_config(models)
    samples = decode_groups(make_batch(0, groups=1, size=2), vocab_size=128)
    samples = [
        type(sample)(**{n: getattr(sample, n) for n in sample.__slots__} | {"reward": 0.3}) for sample in samples
    ]
    line = training_metrics(train_batch(TorchBackend(config), samples, CLOCK, config))
    assert line["explained_variance"] is None
    assert line["return_mean"] == pytest.approx(0.3)


@pytest.mark.parametrize("value_clip", [1e-6, math.inf])
def test_the_clip_is_around_the_values_at_the_start_of_the_batch(models, value_clip):
    config = make_config(models, critic={"value_clip": value_clip}, batch={"num_steps_per_rollout": 4}, lr=1e-2)
    samples = decode_groups(make_batch(0), vocab_size=128)
    results = train_batch(TorchBackend(config), samples, CLOCK, config)
    assert [result.critic.values for result in results] == [0.0] * 4
    assert results[0].critic.clipped == 0.0
    assert (results[-1].critic.clipped > 0.0) == (value_clip < 1.0)


def test_in_critic_only_steps_the_policy_stays_as_it_is(models):
    config = make_config(models, critic={"only_steps": 2})
    backend = TorchBackend(config)
    samples = decode_groups(make_batch(0), vocab_size=128)
    start = {name: weight.clone() for name, weight in backend.weights().items()}
    for step in range(3):
        before = backend.state()["critic"]
        clock = Clock(Version(1, step), {1: 0})
        results = train_batch(backend, samples, clock, config)
        line = training_metrics(results)
        assert results[0].applied
        assert line["critic_only"] == (step < 2)
        assert line["trained_tokens"] > 0
        assert any(not torch.equal(tensor, before[name]) for name, tensor in backend.state()["critic"].items())
        same = all(torch.equal(weight, start[name]) for name, weight in backend.weights().items())
        assert same == (step < 2)
    assert (backend.optimizer_steps, backend.critic.optimizer_steps) == (1, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_goes_on_bit_for_bit(models, tmp_path, dtype):
    config = make_config(models, dtype=dtype, critic={"only_steps": 1, "lr": 2e-3, "warmup_steps": 4}, lambd=0.9)

    def train(backend, first, count):
        for step in range(first, first + count):
            samples = decode_groups(make_batch(step, groups=2, size=4), vocab_size=128)
            train_batch(backend, samples, Clock(Version(1, step), {1: 0}), config)

    straight = TorchBackend(config)
    train(straight, 0, 5)
    before = TorchBackend(config)
    train(before, 0, 3)
    store = CheckpointStore(tmp_path, keep_last=1)
    state = CheckpointState(3, Version(1, 3), before.optimizer_steps, "/models/m", dtype, "c", None)
    store.save(state, before.state(), store.temporary(3), RankGroup())
    assert (tmp_path / "checkpoints" / "step_00000003" / "critic-00000.safetensors").exists()
    resumed, checkpoint = TorchBackend(config), store.load_newest()
    resumed.load_state(checkpoint.tensors, checkpoint.state.optimizer_steps)
    train(resumed, 3, 2)
    left, right = straight.state(), resumed.state()
    assert (straight.optimizer_steps, straight.critic.optimizer_steps) == (4, 5)
    assert (resumed.optimizer_steps, resumed.critic.optimizer_steps) == (4, 5)
    for part in ("model", "optimizer", "critic", "critic_optimizer"):
        assert left[part].keys() == right[part].keys()
        assert all(torch.equal(left[part][name], right[part][name]) for name in left[part]), part
    assert left["critic"]["value_head.weight"].dtype == torch.float32
    assert {t.dtype for n, t in left["critic"].items() if "value_head" not in n} == {getattr(torch, dtype)}


def test_it_is_neither_pushed_nor_exported(models, tmp_path):
    backend = TorchBackend(make_config(models))
    assert not [name for name in backend.layout if "value_head" in name]
    backend.save_pretrained(tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    policy = AutoModelForCausalLM.from_pretrained(models["policy"]).state_dict()
    assert all(torch.equal(exported[name], tensor) for name, tensor in policy.items())


def test_a_step_that_is_not_finite_leaves_it_as_it_was(models):
    config = make_config(models)
    backend = TorchBackend(config)
    samples = decode_groups(make_batch(0, groups=2, size=2), vocab_size=128)
    bad = {name: getattr(samples[1], name) for name in samples[1].__slots__} | {"reward": math.inf}
    before = backend.state()
    (result,) = train_batch(backend, [samples[0], type(samples[1])(**bad), *samples[2:]], CLOCK, config)
    assert not result.applied
    assert not result.critic.applied
    assert result.critic.offenders == [1]
    after = backend.state()
    assert all(torch.equal(after["critic"][name], tensor) for name, tensor in before["critic"].items())
    assert training_metrics([result])["critic_steps_skipped"] == 1


def test_another_vocabulary_is_refused(models, tmp_path):
    config = make_config(models | {"critic": build_tiny_qwen3(tmp_path / "c", vocab_size=99)})
    with pytest.raises(ConfigError, match=r"model\.critic_checkpoint: .* has 99 tokens, and the trained model 128"):
        TorchBackend(config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_architecture_that_cannot_be_packed_is_refused(models, monkeypatch, dtype):
    def leaky(*args, **kwargs):
        output, _ = attention.packed_attention(*args, **kwargs)
        return output + output.mean(dim=1, keepdim=True), None

    placement = Placement(torch.device("cpu"))
    monkeypatch.setattr(attention, "register", lambda: attention.AttentionInterface.register(attention.NAME, leaky))
    try:
        with pytest.raises(ConfigError, match="Qwen3Model cannot be trained packed: states differ by"):
            load_critic(models["critic"], dtype, placement, "model.critic_checkpoint")
    finally:
        attention.AttentionInterface.register(attention.NAME, attention.packed_attention)


def test_a_checkpoint_without_one_starts_one_and_another_ones_is_refused(models, tmp_path):
    plain = TorchBackend(Config(model={"hf_checkpoint": models["policy"]}))
    backend = TorchBackend(make_config(models))
    backend.load_state(plain.state(), 0)
    other = TorchBackend(make_config(models | {"critic": build_tiny_qwen3(tmp_path / "c", intermediate_size=40)}))
    with pytest.raises(ConfigError, match=r"model\.critic_checkpoint: .* another critic"):
        other.load_state(backend.state(), 0)
