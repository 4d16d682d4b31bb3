"""Mixtures of experts in the torch backend: against transformers in float64, each sequence by itself, its experts one
after the other."""

import numpy as np
import pytest
import torch
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from services.common.config import Config
from services.common.errors import ConfigError
from services.common.versions import Version
from services.trainer.algorithms.advantages import group_advantages
from services.trainer.backends.torch.attention import PackedLayout, Varlen
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.backends.torch.logprobs import to_device, token_logprobs
from services.trainer.backends.torch.routing import Routers, routing
from services.trainer.batch.plan import Batching
from services.trainer.batch.prepare import prepare_step
from services.trainer.batch.samples import decode_groups
from services.trainer.batch.staleness import Clock
from services.trainer.metrics import training_metrics
from services.trainer.step import train_batch
from tests.kit.hf_reference import load_reference
from tests.kit.moe_reference import balance_loss, fed_sequences, load_max
from tests.kit.tiny_model import (
    build_tiny_mixtral,
    build_tiny_olmoe,
    build_tiny_qwen2_moe,
    build_tiny_qwen3,
    build_tiny_qwen3_moe,
)
from tests.kit.trainer_batch import make_batch
from tests.kit.trainer_ragged import plain_logprobs, ragged_samples, reference_loss

CLOCK = Clock(Version(1, 0), {1: 0})
CPU = torch.device("cpu")
ONE = Batching(100_000)
BATCHINGS = {"one each": Batching(1), "all in one": ONE}
MODELS = {
    "qwen3_moe": (build_tiny_qwen3_moe, {}),
    "some layers dense": (build_tiny_qwen3_moe, {"layers": 3, "mlp_only_layers": [1], "norm_topk_prob": False}),
    "one of many experts": (build_tiny_qwen3_moe, {"num_experts": 40, "num_experts_per_tok": 1}),
    "qwen2_moe": (build_tiny_qwen2_moe, {}),
    "mixtral": (build_tiny_mixtral, {}),
    "olmoe": (build_tiny_olmoe, {}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("moe")
    return {name: build(root / name.replace(" ", "-"), **fields) for name, (build, fields) in MODELS.items()}


def make_config(directory, dtype="float32", **trainer):
    algorithm = {"eps_clip": 0.2, "eps_clip_high": 0.3, **trainer.pop("algorithm", {})}
    return Config(model={"hf_checkpoint": directory, "dtype": dtype}, trainer={"algorithm": algorithm, **trainer})


def prepare(samples, batching=ONE, reduction="per_sample"):
    rewards = np.array([sample.reward for sample in samples])
    advantages = group_advantages(rewards, [sample.group_id for sample in samples], normalize_std=True)
    step = prepare_step(samples, CLOCK, mask_above=None, reduction=reduction, batching=batching)
    return step.filled(advantages[step.rows])


def gradients_of(backend, micro_batches):
    result = backend.accumulate(micro_batches)
    return result, {name: parameter.grad.clone() for name, parameter in backend.model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "coefficient"),
    [
        ("qwen3_moe", 0.0),
        ("qwen3_moe", 0.05),
        ("mixtral", 0.05),
        ("olmoe", 0.0),
        pytest.param("olmoe", 0.05, marks=pytest.mark.long),
        pytest.param("qwen2_moe", 0.05, marks=pytest.mark.long),
        pytest.param("some layers dense", 0.05, marks=pytest.mark.long),
        pytest.param("one of many experts", 0.0, marks=pytest.mark.long),
    ],
)
def test_loss_and_gradient_match_float64_under_any_packing(models, name, coefficient):
    backend = TorchBackend(make_config(models[name], algorithm={"router_aux_loss_coef": coefficient}))
    assert backend.model.config._experts_implementation == "grouped_mm"
    reference = load_reference(models[name], torch.float64)
    samples = ragged_samples(0)
    wanted = reference_loss(reference, samples, "per_sample")
    trained = [sample for sample in samples if sample.segments[0].loss_mask.any()]
    balances = [balance_loss(reference, tokens) for tokens in fed_sequences(trained)]
    wanted = wanted + coefficient * torch.stack(balances).sum() / len(samples)
    wanted.backward()
    tokens = [int(sample.segments[0].loss_mask.sum()) for sample in trained]
    balance = sum(count * loss.item() for count, loss in zip(tokens, balances, strict=True)) / sum(tokens)
    layers = len(reference(torch.ones(1, 1, dtype=torch.long), output_router_logits=True).router_logits)
    for batching in BATCHINGS.values():
        result, gradients = gradients_of(backend, prepare(samples, batching))
        assert result.loss == pytest.approx(wanted.item(), abs=3e-5)
        for parameter, expected in reference.named_parameters():
            np.testing.assert_allclose(gradients[parameter], expected.grad, atol=5e-5, rtol=2e-3, err_msg=parameter)
        if coefficient:
            assert result.figures["router_aux_loss"] / result.tokens == pytest.approx(balance / layers, rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_packed_logprobs_are_those_of_each_sequence_by_itself(models, name):
    backend = TorchBackend(make_config(models[name]))
    reference = load_reference(models[name], torch.float64)
    samples = ragged_samples(1)
    (batch,) = prepare(samples)
    with torch.no_grad():
        packed = token_logprobs(backend.model, to_device(batch, CPU)).logprobs
        plain = [plain_logprobs(reference, sample)[0] for sample in samples]
    for row, (sample, logprobs) in enumerate(zip(samples, plain, strict=True)):
        trained = np.flatnonzero(sample.segments[0].loss_mask)
        np.testing.assert_allclose(packed[batch.sample_rows == row], logprobs[trained], atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_expert_without_tokens_has_a_gradient_of_zero(tmp_path, dtype):
    """Also in a dtype that keeps master weights; with memory full of NaN, from which a gradient might be made."""
    directory = build_tiny_qwen3_moe(tmp_path / "m", num_experts=48)
    backend = TorchBackend(make_config(directory, dtype, algorithm={"entropy_coef": 0.1}))
    samples = decode_groups(make_batch(0, groups=1, size=2), vocab_size=128)
    full = [torch.full((size,), float("nan")) for size in (100, 3_000, 30_000, 300_000) for _ in range(20)]
    del full
    chosen = experts_of(load_reference(directory), samples)
    backend.accumulate(prepare(samples, Batching(1)))
    names = [name for name in backend.weights() if ".experts." in name]
    assert len(names) == 4
    for name in names:
        gradient = backend._optimizer._masters[name].grad
        had = gradient.abs().amax(dim=(1, 2)) > 0
        assert torch.isfinite(gradient).all()
        assert 0 < had.sum() < 48
        if dtype == "float32":
            # In the last layer it is those of the tokens that predict one.
            layer, with_gradient = int(name.split(".")[2]), set(had.nonzero().flatten().tolist())
            assert with_gradient <= chosen[layer]
            assert layer == 1 or with_gradient == chosen[layer]


class _Leaving(torch.autograd.Function):
    """A product whose gradient is whatever was in memory where an expert has no tokens."""

    @staticmethod
    def forward(ctx, rows, weights, ends):
        ctx.save_for_backward(rows, weights, ends)
        starts = [0, *ends.tolist()]
        return torch.cat([rows[starts[n] : starts[n + 1]] @ weights[n] for n in range(len(weights))])

    @staticmethod
    def backward(ctx, gradient):
        rows, weights, ends = ctx.saved_tensors
        starts, left = [0, *ends.tolist()], torch.full_like(weights, torch.nan)
        for n in range(len(weights)):
            part = slice(starts[n], starts[n + 1])
            if part.start < part.stop:
                left[n] = rows[part].T @ gradient[part]
        return None, left, None


def _refusing(*_, **__):
    raise RuntimeError("strides should be multiple of 16 bytes\nand more")


@pytest.mark.parametrize("kernel", [lambda rows, weights, *, offs: _Leaving.apply(rows, weights, offs), _refusing])
def test_a_kernel_that_does_not_do_it_right_is_not_used(models, monkeypatch, kernel):
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "grouped_mm", kernel)
        backend = TorchBackend(make_config(models["qwen3_moe"]))
        assert backend.model.config._experts_implementation == "eager"
        _, gradients = gradients_of(backend, prepare(ragged_samples(0)))
    _, wanted = gradients_of(TorchBackend(make_config(models["qwen3_moe"])), prepare(ragged_samples(0)))
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-7)


def experts_of(model, samples):
    """By layer, the experts that any token has."""
    found = [set() for _ in model.model.layers]
    for tokens in fed_sequences(samples):
        output = model.model(input_ids=tokens[None], use_cache=False, output_router_logits=True)
        for layer, logits in zip(found, output.router_logits, strict=True):
            layer |= set(logits.topk(model.config.num_experts_per_tok).indices.flatten().tolist())
    return found


def test_the_balance_loss_of_one_sequence_is_switch_transformers_as_transformers_has_it(models):
    """By layer, over the experts of a token: theirs is as many where tokens are spread evenly."""
    model = load_reference(models["olmoe"])
    tokens = torch.arange(3, 60)[None]
    logits = model(input_ids=tokens, use_cache=False, output_router_logits=True).router_logits
    theirs = [load_balancing_loss_func((layer,), num_experts=6, top_k=3).item() / 3 for layer in logits]
    layout = PackedLayout(Varlen(None, None, starts := torch.tensor([0, 57]), 57, None, starts, 57))
    ours = routing(logits, layout, Routers(6, 3), wanted=True).balance()
    assert ours.item() == pytest.approx(sum(theirs), rel=1e-6)


def test_the_balance_loss_moves_nothing_that_only_logprobs_see(models):
    """Its gradient alone: that of the head is the same without it."""
    samples = ragged_samples(1)
    plain, weighed = (
        gradients_of(TorchBackend(make_config(models["qwen3_moe"], algorithm=algorithm)), prepare(samples))[1]
        for algorithm in ({}, {"router_aux_loss_coef": 1.0})
    )
    assert torch.equal(plain["lm_head.weight"], weighed["lm_head.weight"])
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.gate.weight"
        assert (plain[name] - weighed[name]).abs().max() > 1e-3


def test_a_sequence_weighs_what_its_trained_tokens_weigh_together(models):
    reference = load_reference(models["qwen3_moe"], torch.float64)
    samples = ragged_samples(0)
    losses = []
    for coefficient in (0.0, 1.0):
        backend = TorchBackend(make_config(models["qwen3_moe"], algorithm={"router_aux_loss_coef": coefficient}))
        step = prepare_step(samples, CLOCK, mask_above=None, reduction="per_token", batching=Batching(120))
        losses.append(backend.accumulate(step.batches).loss)
    counts = [int(sample.segments[0].loss_mask.sum()) for sample in samples]
    trained = [sample for sample, count in zip(samples, counts, strict=True) if count]
    weighed = [
        count / sum(counts) * balance_loss(reference, tokens).item()
        for count, tokens in zip(filter(None, counts), fed_sequences(trained), strict=True)
    ]
    assert losses[1] - losses[0] == pytest.approx(sum(weighed), rel=1e-5)


def test_layers_that_are_computed_again_give_the_same(models):
    samples = ragged_samples(0)
    algorithm = {"router_aux_loss_coef": 0.1}
    kept, again = (
        gradients_of(
            TorchBackend(make_config(models["qwen3_moe"], algorithm=dict(algorithm), **each)), prepare(samples)
        )
        for each in ({}, {"recompute": True})
    )
    assert kept[0] == again[0]
    for name, gradient in kept[1].items():
        torch.testing.assert_close(again[1][name], gradient, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe"])
def test_the_load_of_experts_is_reported_whatever_the_packing(models, name):
    reference = load_reference(models[name], torch.float64)
    samples = ragged_samples(2, segments=True)
    wanted = load_max(reference, fed_sequences(samples))
    backend = TorchBackend(make_config(models[name]))
    for batching in BATCHINGS.values():
        result = backend.accumulate(prepare(samples, batching))
        assert result.expert_load_max == pytest.approx(wanted, rel=1e-9)
    results = train_batch(backend, samples, CLOCK, make_config(models[name]))
    assert training_metrics(results)["expert_load_max"] == pytest.approx(wanted, rel=1e-9)
    assert "router_aux_loss" not in training_metrics(results)


def test_bfloat16_is_as_close_as_transformers_own(models):
    """On average: some tokens go to other experts than in float32, whoever computes them."""
    samples, directory = ragged_samples(0), models["qwen3_moe"]
    config = make_config(directory, "bfloat16", algorithm={"router_aux_loss_coef": 0.01})
    backend = TorchBackend(config)
    (batch,) = prepare(samples)
    exact, theirs = (load_reference(directory, dtype) for dtype in (torch.float64, torch.bfloat16))
    with torch.no_grad():
        packed = token_logprobs(backend.model, to_device(batch, CPU)).logprobs
    errors = []
    for row, sample in enumerate(samples):
        trained = np.flatnonzero(sample.segments[0].loss_mask)
        with torch.no_grad():
            expected, rounded = (plain_logprobs(model, sample)[0][trained].double() for model in (exact, theirs))
        errors.append(torch.stack([packed[batch.sample_rows == row] - expected, rounded - expected]))
    ours, of_theirs = torch.cat(errors, dim=1).abs().mean(dim=1).tolist()
    assert ours < 1.5 * of_theirs
    (result,) = train_batch(backend, samples, CLOCK, config)
    assert result.applied
    assert {tensor.dtype for tensor in backend.weights().values()} == {torch.bfloat16}


def test_a_model_without_such_routers_has_no_balance_loss(tmp_path):
    directory = build_tiny_qwen3(tmp_path / "m")
    backend = TorchBackend(make_config(directory))
    assert Routers.of(backend.model) is None
    assert backend.accumulate(prepare(ragged_samples(0))).expert_load_max is None
    with pytest.raises(ConfigError, match=r"trainer\.algorithm\.router_aux_loss_coef: .* not for Qwen3ForCausalLM"):
        TorchBackend(make_config(directory, algorithm={"router_aux_loss_coef": 0.1}))
