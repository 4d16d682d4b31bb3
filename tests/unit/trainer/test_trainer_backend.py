"""The torch backend: packed log-probs against transformers, loss and gradient against a float64 reference."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from services.common.config import Config
from services.common.errors import ConfigError
from services.common.versions import Version
from services.trainer.algorithms.advantages import group_advantages
from services.trainer.backends.torch import attention
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.backends.torch.logprobs import MAX_LOGITS, to_device, token_logprobs
from services.trainer.batch.flops import sequence_flops
from services.trainer.batch.plan import Batching
from services.trainer.batch.prepare import prepare_step
from services.trainer.batch.samples import decode_groups
from services.trainer.batch.staleness import Clock
from services.trainer.step import train_batch
from tests.kit.tiny_model import build_tiny_llama, build_tiny_qwen2, build_tiny_qwen3
from tests.kit.trainer_batch import make_batch
from tests.kit.trainer_ragged import plain_logprobs, ragged_samples, reference_loss
from tests.kit.varlen import varlen_by_hand

CLOCK = Clock(Version(1, 0), {1: 0})
ONE = Batching(4096)
BUILDERS = {"qwen3": build_tiny_qwen3, "qwen2": build_tiny_qwen2, "llama": build_tiny_llama}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: build(root / name) for name, build in BUILDERS.items()}


def make_config(directory, **trainer):
    return Config(model={"hf_checkpoint": directory}, trainer=trainer)


def prepare(samples, reduction="per_sample", batching=ONE):
    rewards = np.array([sample.reward for sample in samples])
    advantages = group_advantages(rewards, [sample.group_id for sample in samples], normalize_std=True)
    step = prepare_step(samples, CLOCK, mask_above=None, reduction=reduction, batching=batching)
    return step.filled(advantages[step.rows])


@pytest.mark.parametrize("name", BUILDERS)
def test_packed_logprobs_and_entropy_equal_those_of_transformers_unpacked(models, name):
    backend = TorchBackend(make_config(models[name]))
    reference = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float64).eval()
    samples = ragged_samples(0)
    (batch,) = prepare(samples)
    with torch.no_grad():
        packed = token_logprobs(backend.model, to_device(batch, torch.device("cpu")))
        chunked = token_logprobs(backend.model, to_device(batch, torch.device("cpu")), max_logits=128 * 7)
        plain = [plain_logprobs(reference, sample) for sample in samples]
    for row, (sample, (logprobs, distribution)) in enumerate(zip(samples, plain, strict=True)):
        mine = batch.sample_rows == row
        trained = np.flatnonzero(sample.segments[0].loss_mask)
        assert mine.sum() == len(trained)
        np.testing.assert_allclose(packed.logprobs[mine], logprobs[trained], atol=2e-5)
        entropy = -(distribution.exp() * distribution).sum(-1)
        np.testing.assert_allclose(packed.entropy[mine], entropy[trained], atol=2e-5)
    np.testing.assert_allclose(chunked.logprobs, packed.logprobs, atol=1e-5)
    np.testing.assert_allclose(chunked.entropy, packed.entropy, atol=1e-5)


def test_a_sliding_window_is_kept_when_packed(tmp_path):
    directory = build_tiny_qwen2(
        tmp_path / "m", use_sliding_window=True, sliding_window=5, max_window_layers=0, attn_implementation="sdpa"
    )
    backend = TorchBackend(make_config(directory))
    assert "sliding_attention" in backend.model.config.layer_types
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    samples = ragged_samples(1)
    (batch,) = prepare(samples)
    with torch.no_grad():
        packed = token_logprobs(backend.model, to_device(batch, torch.device("cpu"))).logprobs
        plain = plain_logprobs(reference, samples[1])[0]
    trained = np.flatnonzero(samples[1].segments[0].loss_mask)
    np.testing.assert_allclose(packed[batch.sample_rows == 1], plain[trained], atol=2e-5)


@pytest.mark.parametrize("reduction", ["per_sample", "per_token"])
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradient_match_float64_under_any_packing(models, reduction, seed):
    config = make_config(models["qwen3"], algorithm={"eps_clip": 0.2, "eps_clip_high": 0.3})
    backend = TorchBackend(config)
    reference = AutoModelForCausalLM.from_pretrained(models["qwen3"], dtype=torch.float64).eval()
    samples = ragged_samples(seed)
    wanted = reference_loss(reference, samples, reduction)
    wanted.backward()
    gradients = dict(reference.named_parameters())
    balanced = Batching(120, flops=sequence_flops(backend.model.config.to_dict()))
    for batching in (Batching(1), Batching(120), Batching(100_000), Batching(1, micro_batch_size=3), balanced):
        micro_batches = prepare(samples, reduction, batching)
        result = backend.accumulate(micro_batches)
        assert result.loss == pytest.approx(wanted.item(), abs=2e-5)
        for name, parameter in backend.model.named_parameters():
            np.testing.assert_allclose(parameter.grad, gradients[name].grad, atol=5e-5, rtol=2e-3)


def test_chunked_logits_give_the_same_gradient(models, monkeypatch):
    backend = TorchBackend(make_config(models["llama"]))
    micro_batches = prepare(ragged_samples(2))
    backend.accumulate(micro_batches)
    whole = [parameter.grad.clone() for parameter in backend.model.parameters()]
    monkeypatch.setitem(MAX_LOGITS, "cpu", 128 * 5)
    backend.accumulate(micro_batches)
    for before, parameter in zip(whole, backend.model.parameters(), strict=True):
        np.testing.assert_allclose(parameter.grad, before, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("shared", [True, False])
def test_the_varlen_kernel_is_given_the_sequences(tmp_path, monkeypatch, window, shared):
    settings = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0} if window else {}
    directory = build_tiny_qwen2(tmp_path / "m", attn_implementation="sdpa", **settings)
    backend = TorchBackend(make_config(directory))
    micro_batches = prepare(ragged_samples(3), batching=ONE if shared else Batching(1))
    assert any(len(batch.order) > len(batch.token_ids) for batch in micro_batches) == shared
    results = []
    for kernel in (False, True):
        monkeypatch.setattr(attention, "_has_kernel", lambda *_, kernel=kernel: kernel)
        monkeypatch.setattr(attention, "varlen_attn", varlen_by_hand)
        backend.accumulate(micro_batches)
        gradients = [parameter.grad.clone() for parameter in backend.model.parameters()]
        results.append([*map(torch.from_numpy, backend.logprobs(micro_batches)), *gradients])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("recompute", [{}, {"recompute": True, "recompute_layers": 1}, {"recompute": True}])
def test_layers_are_compiled_whether_or_not_they_are_recomputed(models, monkeypatch, recompute):
    runs = []

    def compiled(forward, dynamic):
        assert dynamic
        return lambda *args, **named: (runs.append(forward.__self__), forward(*args, **named))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    backend = TorchBackend(make_config(models["qwen3"], compile=True, **recompute))
    runs.clear()
    (batch,) = prepare(ragged_samples(2))
    backend.accumulate([batch])
    layers = list(backend.model.model.layers)
    again = layers[: recompute.get("recompute_layers", len(layers) if recompute else 0)]
    assert runs == [*layers, *reversed(again)]


@pytest.mark.parametrize("trainer", [{"recompute": True, "recompute_layers": 1}, {"recompute": True}])
def test_recomputed_layers_give_the_same_gradient(models, trainer, monkeypatch):
    runs = []
    forward = Qwen3MLP.forward
    monkeypatch.setattr(Qwen3MLP, "forward", lambda self, x: (runs.append(self), forward(self, x))[1])
    gradients, counts = [], []
    for settings in ({}, trainer):
        backend = TorchBackend(make_config(models["qwen3"], **settings))
        runs.clear()
        backend.accumulate(prepare(ragged_samples(2)))
        gradients.append([parameter.grad for parameter in backend.model.parameters()])
        counts.append(len(runs))
    layers = backend.model.config.num_hidden_layers
    assert counts == [layers, layers + trainer.get("recompute_layers", layers)]
    for before, after in zip(*gradients, strict=True):
        np.testing.assert_allclose(after, before, atol=1e-7)


def test_training_raises_the_probability_of_what_was_rewarded(models):
    backend = TorchBackend(make_config(models["qwen3"], optimizer={"lr": 3e-3}))
    samples = decode_groups(make_batch(0), vocab_size=128)
    advantages = group_advantages(
        np.array([s.reward for s in samples]), [s.group_id for s in samples], normalize_std=True
    )

    def mean_logprob(sign):
        (batch,) = prepare(samples)
        with torch.no_grad():
            logprobs = token_logprobs(backend.model, to_device(batch, torch.device("cpu"))).logprobs
        return float(logprobs[np.sign(advantages)[batch.sample_rows] == sign].mean())

    # Behaviour log-probs far below the model's would be clipped at once: take the model's own.
    before = mean_logprob(1), mean_logprob(-1)
    for _ in range(3):
        (batch,) = prepare(samples)
        with torch.no_grad():
            own = token_logprobs(backend.model, to_device(batch, torch.device("cpu"))).logprobs.numpy()
        batch.rollout_logprobs[:] = own
        result = backend.train([batch])
        assert result.applied
        assert result.mismatch_kl == pytest.approx(0.0, abs=1e-6)
        assert result.ratio == pytest.approx(result.tokens, rel=1e-5)
    assert mean_logprob(1) > before[0]
    assert mean_logprob(-1) < before[1]


def test_a_step_that_is_not_finite_changes_nothing_and_names_the_sample(models):
    backend = TorchBackend(make_config(models["qwen3"], optimizer={"lr": 1e-2}))
    before = {name: weight.clone() for name, weight in backend.weights().items()}
    (batch,) = prepare(ragged_samples(0))
    bad = int(batch.sample_rows[-1])
    batch.advantages[batch.sample_rows == bad] = math.inf
    result = backend.train([batch])
    assert not result.applied
    assert result.offenders == [bad]
    assert backend.optimizer_steps == 0
    for name, weight in backend.weights().items():
        assert torch.equal(weight, before[name])


def test_a_batch_without_trained_tokens_is_no_failure(models):
    backend = TorchBackend(make_config(models["qwen3"]))
    result = backend.train([])
    assert result.applied
    assert backend.optimizer_steps == 0


def test_bfloat16_models_take_small_steps_in_their_master_weights(models):
    config = make_config(models["qwen3"], optimizer={"lr": 1e-5, "clip_grad": 1e9})
    config.model.dtype = "bfloat16"
    backend = TorchBackend(config)
    start = {name: weight.clone() for name, weight in backend.weights().items()}
    assert {weight.dtype for weight in start.values()} == {torch.bfloat16}
    samples = decode_groups(make_batch(0), vocab_size=128)
    for _ in range(3):
        assert all(result.applied for result in train_batch(backend, samples, CLOCK, config))
    state = backend.state()
    name = "model.embed_tokens.weight"
    moved = state["optimizer"][f"master/{name}"] - start[name].float()
    assert 1e-5 < moved.abs().max() < 1e-4
    restored = TorchBackend(config)
    restored.load_state(state, backend.optimizer_steps)
    for left, right in ((backend, restored), (restored, backend)):
        assert left.state()["optimizer"].keys() == right.state()["optimizer"].keys()
    assert all(torch.equal(restored.weights()[key], weight) for key, weight in backend.weights().items())


def test_the_learning_rate_is_that_of_the_optimizer_steps_taken(models):
    optimizer = {"lr": 1e-3, "lr_decay_style": "linear", "warmup_steps": 2, "decay_steps": 4}
    config = make_config(models["qwen3"], optimizer=optimizer)
    backend = TorchBackend(config)
    samples = decode_groups(make_batch(0, groups=1, size=4), vocab_size=128)
    rates = [train_batch(backend, samples, CLOCK, config)[0].lr for _ in range(6)]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 5e-4, 0, 0])


def test_without_a_clip_the_gradient_is_as_it_is(models):
    samples = decode_groups(make_batch(0, groups=1, size=4), vocab_size=128)
    norms = {}
    for clip in (0.0, 1e-3):
        backend = TorchBackend(make_config(models["qwen3"], optimizer={"clip_grad": clip}))
        backend.accumulate(prepare(samples))
        norms[clip] = backend._optimizer.clip(), backend._optimizer.clip()
    assert norms[0.0][0] == norms[0.0][1] == norms[1e-3][0] > 1e-2
    assert norms[1e-3][1] == pytest.approx(1e-3, rel=1e-3)


def test_a_batch_of_several_optimizer_steps_takes_them_all(models):
    config = Config(
        model={"hf_checkpoint": models["qwen3"]},
        batch={"rollout_batch_size": 8, "n_samples_per_prompt": 8, "num_steps_per_rollout": 4},
    )
    backend = TorchBackend(config)
    results = train_batch(backend, decode_groups(make_batch(0), vocab_size=128), CLOCK, config)
    assert backend.optimizer_steps == len(results) == 4


def test_deterministic_runs_are_equal_bit_for_bit(models):
    config = make_config(models["qwen3"], optimizer={"lr": 1e-3})
    config.run.deterministic = True
    samples = decode_groups(make_batch(0), vocab_size=128)
    try:
        backends = [TorchBackend(config) for _ in range(2)]
        for backend in backends:
            for _ in range(3):
                train_batch(backend, samples, CLOCK, config)
    finally:
        torch.use_deterministic_algorithms(False)
    left, right = (backend.weights() for backend in backends)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_directory_with_missing_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    directory = build_tiny_llama(tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.hf_checkpoint: .* lacks .* 1 weights, for example model\.layers\.0"):
        TorchBackend(make_config(directory))


def test_an_unknown_architecture_is_one_line(tmp_path):
    directory = build_tiny_llama(tmp_path / "m")
    (directory / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(ConfigError, match=r"model\.hf_checkpoint: .* does not load") as caught:
        TorchBackend(make_config(directory))
    assert "\n" not in str(caught.value)


def test_an_architecture_that_cannot_be_packed_is_refused(models, monkeypatch):
    from services.trainer.backends.torch import attention

    def leaky(*args, **kwargs):
        output, _ = attention.packed_attention(*args, **kwargs)
        return output + output.mean(dim=1, keepdim=True), None

    monkeypatch.setattr(attention, "register", lambda: attention.AttentionInterface.register(attention.NAME, leaky))
    try:
        with pytest.raises(ConfigError, match="Qwen3ForCausalLM cannot be trained packed: log-probs differ by"):
            TorchBackend(make_config(models["qwen3"]))
    finally:
        attention.AttentionInterface.register(attention.NAME, attention.packed_attention)


def test_tied_weights_are_listed_once_under_the_embedding(models):
    assert "lm_head.weight" not in TorchBackend(make_config(models["qwen3"])).weights()
    assert "lm_head.weight" in TorchBackend(make_config(models["llama"])).weights()
