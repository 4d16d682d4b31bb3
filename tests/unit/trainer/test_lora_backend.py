"""Adapters in the torch backend: what is trained, what it computes, and what leaves it, against peft and float64."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.common import wire
from services.common.config import Config
from services.common.versions import Version
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.batch.plan import Batching
from services.trainer.batch.samples import decode_groups
from services.trainer.batch.staleness import Clock
from services.trainer.step import train_batch
from services.trainer.weights.form import EngineForm
from services.trainer.weights.snapshot import Snapshot, build_manifest
from tests.kit.fp8_reference import quantise_reference, write_fp8_model
from tests.kit.lora import filled, peft_model, prepared
from tests.kit.tiny_model import build_tiny_llama, build_tiny_qwen2, build_tiny_qwen3
from tests.kit.trainer_batch import make_batch, make_group, make_sample
from tests.kit.trainer_ragged import plain_logprobs, ragged_samples

CLOCK = Clock(Version(1, 0), {1: 0})
CPU = torch.device("cpu")
ONE = Batching(4096)
BUILDERS = {"qwen3": build_tiny_qwen3, "qwen2": build_tiny_qwen2, "llama": build_tiny_llama}
SOME = {"rank": 3, "alpha": 7, "use_rslora": True, "target_modules": ["q_proj", "layers.1.mlp.down_proj"]}
KL = {"use_kl_loss": True, "kl_loss_coef": 0.1}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: build(root / name) for name, build in BUILDERS.items()}


def make_config(directory, dtype="float32", lora=None, reference=None, **trainer):
    return Config(
        model={"hf_checkpoint": directory, "dtype": dtype, "ref_checkpoint": reference},
        trainer={"lora": lora or {"rank": 4}, **trainer},
    )


def batch_of(seed=0):
    return decode_groups(make_batch(seed), vocab_size=128)


def micro_batches_of(seed=0, batching=ONE):
    return prepared(ragged_samples(seed), CLOCK, batching)


@pytest.mark.parametrize(("name", "dtype"), [("qwen3", "float32"), ("qwen2", "bfloat16"), ("llama", "bfloat16")])
def test_without_a_step_the_policy_is_the_base_model_bit_for_bit(models, name, dtype):
    adapted = TorchBackend(make_config(models[name], dtype))
    plain = TorchBackend(Config(model={"hf_checkpoint": models[name], "dtype": dtype}))
    for left, right in zip(adapted.logprobs(micro_batches_of()), plain.logprobs(micro_batches_of()), strict=True):
        assert np.array_equal(left, right)
    pushed, expected = dict(adapted.tensors()), dict(plain.tensors())
    assert list(pushed) == list(expected) == list(adapted.layout) == list(plain.layout)
    for key, tensor in pushed.items():
        assert tensor.dtype == adapted.layout[key].dtype == expected[key].dtype
        assert torch.equal(tensor, expected[key])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_alone_are_trained_with_float32_masters_and_alone_have_state(models, dtype):
    config = make_config(models["qwen3"], dtype, optimizer={"lr": 1e-3})
    backend = TorchBackend(config)
    before = {name: tensor.clone() for name, tensor in backend.weights().items()}
    adapters = {name: tensor.detach().clone() for name, tensor in backend.adapters.tensors.items()}
    for seed in range(2):
        assert train_batch(backend, batch_of(seed), CLOCK, config)[0].applied
    for name, tensor in backend.weights().items():
        assert tensor.dtype == getattr(torch, dtype)
        assert not backend.weights()[name].requires_grad
        assert torch.equal(tensor, before[name]), name
    layers = 7 * backend.model.config.num_hidden_layers
    assert len(adapters) == 2 * layers
    for name, tensor in backend.adapters.tensors.items():
        assert tensor.dtype == getattr(torch, dtype)
        assert not torch.equal(tensor, adapters[name]), name
    state = backend.state()
    assert state.keys() == {"adapter", "optimizer", "rng"}
    assert {name.partition("/")[2] for name in state["optimizer"]} == adapters.keys()
    masters = {"master"} if dtype == "bfloat16" else set()
    assert {name.partition("/")[0] for name in state["optimizer"]} == {"step", "exp_avg", "exp_avg_sq"} | masters
    assert {tensor.dtype for tensor in state["optimizer"].values()} == {torch.float32}
    held = sum(tensor.numel() * 4 for tensor in backend._optimizer.tensors() if tensor.numel() > 1)
    assert held == (12 if masters else 8) * sum(tensor.numel() for tensor in adapters.values())


@pytest.mark.parametrize(("name", "lora"), [("qwen3", {"rank": 4}), ("qwen2", SOME)])
def test_log_probs_and_gradients_are_those_of_peft_under_any_packing(models, name, lora):
    backend = filled(make_config(models[name], lora=lora, algorithm={"policy_loss": "sft"}))
    reference = peft_model(models[name], backend, torch.float64, lora.get("target_modules", "all-linear"))
    samples = ragged_samples(1)
    plain = [plain_logprobs(reference, sample)[0] for sample in samples]
    trained = [np.flatnonzero(sample.segments[0].loss_mask) for sample in samples]
    means = [-logprobs[rows].mean() for logprobs, rows in zip(plain, trained, strict=True) if len(rows)]
    wanted = torch.stack(means).sum() / len(samples)
    wanted.backward()
    gradients = {
        key.removeprefix("base_model.model.").replace(".default.", "."): parameter.grad
        for key, parameter in reference.named_parameters()
        if parameter.requires_grad
    }
    assert gradients.keys() == backend.adapters.tensors.keys()
    (batch,) = micro_batches_of(1)
    (logprobs,) = backend.logprobs([batch])
    for row, rows in enumerate(trained):
        expected = plain[row].detach()[rows]
        np.testing.assert_allclose(logprobs[batch.sample_rows == row], expected, atol=2e-5)
    for batching in (Batching(1), Batching(120), Batching(100_000), Batching(1, micro_batch_size=3)):
        result = backend.accumulate(micro_batches_of(1, batching))
        assert result.loss == pytest.approx(wanted.item(), abs=2e-5)
        for key, tensor in backend.adapters.tensors.items():
            np.testing.assert_allclose(tensor.grad, gradients[key], atol=5e-5, rtol=2e-3)
        assert all(parameter.grad is None for parameter in backend.weights().values())


@pytest.mark.parametrize(("name", "dtype"), [("qwen3", "bfloat16"), ("llama", "float32"), ("llama", "bfloat16")])
def test_what_leaves_is_the_sum_rounded_once(models, name, dtype):
    backend = filled(make_config(models[name], dtype))
    adapters, base = backend.adapters.tensors, backend.weights()
    scale, changed = 32 / 4, 0
    for key, tensor in backend.tensors():
        layer = key.removesuffix(".weight")
        wanted = base[key].double()
        if f"{layer}.lora_A.weight" in adapters:
            a, b = (adapters[f"{layer}.lora_{factor}.weight"].detach().double() for factor in "AB")
            wanted = wanted + scale * b @ a
            changed += not torch.equal(tensor, base[key])
        assert tensor.dtype == getattr(torch, dtype)
        assert not tensor.requires_grad
        # Half a unit in the last place of each, and what float32 adds to it.
        bound = torch.finfo(tensor.dtype).eps / 2 * wanted.abs() + 1e-6
        assert ((tensor.double() - wanted).abs() <= bound).all(), key
    assert changed == 7 * backend.model.config.num_hidden_layers
    assert ("lm_head.weight" in backend.layout) == (name == "llama")


def test_what_leaves_computes_what_is_trained(models):
    backend = filled(make_config(models["qwen3"]))
    merged = peft_model(models["qwen3"], backend, torch.float32).merge_and_unload()
    expected = merged.state_dict()
    for name, tensor in backend.tensors():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)
    merged.load_state_dict(dict(backend.tensors()), strict=False)
    (batch,) = micro_batches_of()
    (logprobs,) = backend.logprobs([batch])
    for row, sample in enumerate(ragged_samples(0)):
        rows = np.flatnonzero(sample.segments[0].loss_mask)
        plain = plain_logprobs(merged, sample)[0].detach()[rows]
        np.testing.assert_allclose(logprobs[batch.sample_rows == row], plain, atol=5e-5)


def test_engines_in_fp8_get_the_quantised_sum(tmp_path):
    base = build_tiny_qwen3(tmp_path / "base", hidden=80, num_attention_heads=6)
    engines = write_fp8_model(build_tiny_qwen3(tmp_path / "fp8", hidden=80, num_attention_heads=6))
    backend = filled(make_config(engines, reference=base))
    form = EngineForm.of_directory(engines)
    snapshot = Snapshot(build_manifest(backend.layout, 50_000, form), CPU, form)
    snapshot.fill(backend.tensors())
    merged = {name: tensor.clone() for name, tensor in backend.tensors()}
    assert len(form.fp8) == 14
    for name in form.fp8:
        codes, scales = quantise_reference(merged[name].numpy())
        assert np.array_equal(snapshot.views[name].view(torch.uint8).numpy(), codes)
        assert np.array_equal(snapshot.views[f"{name}_scale_inv"].numpy(), scales)


@pytest.mark.parametrize(("dtype", "named"), [("float32", True), ("bfloat16", False)])
def test_the_reference_is_the_model_without_its_adapters(models, dtype, named):
    reference = models["qwen3"] if named else None
    backend = filled(make_config(models["qwen3"], dtype, reference=reference, algorithm=KL))
    assert backend._reference is None
    loaded = TorchBackend(Config(model={"hf_checkpoint": models["qwen3"], "dtype": dtype}, trainer={"algorithm": KL}))
    assert loaded._reference is not None
    micro_batches, with_adapters = micro_batches_of(), backend.logprobs(micro_batches_of())
    mine, theirs = backend.ref_logprobs(micro_batches), loaded.ref_logprobs(micro_batches)
    for left, right, other in zip(mine, theirs, with_adapters, strict=True):
        assert np.array_equal(left, right)
        assert not np.allclose(left, other, atol=1e-2)
    for left, right in zip(backend.logprobs(micro_batches), with_adapters, strict=True):
        assert np.array_equal(left, right)


def test_another_reference_is_loaded(models, tmp_path):
    other = build_tiny_qwen3(tmp_path / "other", seed=1)
    backend = filled(make_config(models["qwen3"], reference=other, algorithm=KL))
    loaded = TorchBackend(Config(model={"hf_checkpoint": other}))
    for left, right in zip(backend.ref_logprobs(micro_batches_of()), loaded.logprobs(micro_batches_of()), strict=True):
        assert np.array_equal(left, right)


def test_layers_computed_again_and_a_critic_beside_change_nothing(models):
    settings = {"algorithm": {"name": "ppo"}, "optimizer": {"lr": 1e-3}}
    backends = [filled(make_config(models["qwen3"], **settings, recompute=recompute)) for recompute in (False, True)]
    for backend in backends:
        for seed in range(2):
            (result,) = train_batch(backend, batch_of(seed), CLOCK, make_config(models["qwen3"], **settings))
            assert result.applied
            assert result.critic.applied
    left, right = (backend.state() for backend in backends)
    assert left.keys() == {"adapter", "optimizer", "rng", "critic", "critic_optimizer"}
    assert all(torch.equal(tensor, right["adapter"][name]) for name, tensor in left["adapter"].items())


def test_an_engine_that_rounds_the_sum_is_hardly_further_than_one_of_weights_that_are_all_trained(models, tmp_path):
    """The trainer computes Wx + s·B(Ax), an engine round(W + s·BA)x. docs/lora.md has larger models and more tokens."""
    backend = filled(make_config(models["qwen3"], "bfloat16"))
    backend.save_pretrained(tmp_path)
    engine = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    whole = TorchBackend(Config(model={"hf_checkpoint": tmp_path, "dtype": "bfloat16"}))
    (batch,) = prepared(sampled_by(engine, sequences=64, length=16), CLOCK, Batching(4096))
    assert len(batch.targets) == 64 * 16
    found = [mismatch(each, batch) for each in (backend, whole)]
    assert 0 < found[0] < 2 * found[1], found


def mismatch(backend, batch):
    """k3, the mean over tokens."""
    (logprobs,) = backend.logprobs([batch])
    difference = logprobs.astype(np.float64) - batch.rollout_logprobs
    return float(np.mean(np.exp(difference) - 1 - difference))


@torch.no_grad()
def sampled_by(engine, sequences, length):
    """Samples whose tokens the engine drew, with its log-probs of them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 128, (sequences, 6), generator=generator)
    for _ in range(length):
        chances = engine(ids).logits[:, -1].float().softmax(dim=-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    logprobs = engine(ids).logits[:, 5:-1].float().log_softmax(dim=-1).gather(2, ids[:, 6:, None]).squeeze(2)
    samples, rng = [], np.random.default_rng(0)
    for number, (row, own) in enumerate(zip(ids, logprobs, strict=True)):
        sample = make_sample(rng, sample_id=f"g{number}-0", prompt=row[:6].tolist(), completion_length=length)
        sample.segments[0].token_ids = wire.encode_tokens(row.tolist())
        sample.segments[0].rollout_logprobs = wire.encode_logprobs(own.numpy())
        samples.append(sample)
    return decode_groups([make_group([sample], [1.0]) for sample in samples], vocab_size=128)
