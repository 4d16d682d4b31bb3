"""I10 over ranks: a batch gives the same loss and gradient on 1, 2 and 4 of them, however it is cut up or shared."""

import math
import os

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.backends.torch.optimizer import Optimizer
from services.trainer.checkpoint import CheckpointStore
from services.trainer.convert import convert
from services.trainer.step import train_batch
from services.trainer.weights.form import EngineForm
from tests.kit.lora import begin_filled, begin_plain
from tests.kit.tiny_model import build_tiny_llama, build_tiny_qwen2, build_tiny_qwen3, build_tiny_qwen3_moe
from tests.kit.trainer_ranks import CASES, CLOCK, RESUMED, go_on, noted_gradients, run_case, spawn, start_of

# Four take longer than the lane has: make ranks.
RANKS = tuple(map(int, os.environ.get("POLYHEAD_RANKS", "2").split(",")))
# Of a state: what is compared.
PARTS = {
    "twice": ("model", "optimizer"),
    "adapters": ("adapter", "optimizer"),
    "ppo": ("model", "optimizer", "critic", "critic_optimizer"),
}
# Of a critic's results: sums of terms of both signs, none of which is much larger than a return.
SIGNED = ("values", "returns", "errors")
# Of the largest component of a tensor's gradient, and of the loss.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    # Sizes that neither 2 nor 4 divides: shards are uneven, and some are empty.
    build_tiny_qwen3(root / "qwen3", intermediate_size=99)
    build_tiny_qwen3(root / "other", seed=1)
    build_tiny_llama(root / "llama", intermediate_size=101)
    build_tiny_qwen2(root / "window", use_sliding_window=True, sliding_window=5, max_window_layers=0)
    build_tiny_qwen3_moe(root / "experts")
    return root


@pytest.fixture(scope="module")
def alone(directory):
    """What every case comes to on one rank, in this process."""
    clip, gradients, outcomes = Optimizer.clip, noted_gradients(), {}
    begin_filled()
    try:
        for name, case in CASES.items():
            gradients.clear()
            config = case.config(directory, 1, 0)
            backend = TorchBackend(config)
            outcomes[name] = run_case(case, backend, config, gradients)
            if name in RESUMED:
                outcomes[name] |= go_on(name, backend, config, directory)
    finally:
        Optimizer.clip = clip
        begin_plain()
    return outcomes


@pytest.fixture(scope="module")
def together(directory, alone):
    return {ranks: spawn(directory, ranks) for ranks in RANKS}


pytestmark = pytest.mark.timeout(1200)
EXACT = [name for name, case in CASES.items() if case.dtype == "float32" and name != "not finite"]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("ranks", RANKS)
def test_loss_and_gradient_do_not_depend_on_the_number_of_ranks(alone, together, ranks, name):
    one, several = alone[name], together[ranks][name]
    assert len(one["results"]) == len(several["results"]) > 0
    for left, right in zip(one["results"], several["results"], strict=True):
        for key in ("loss", "grad_norm", "entropy", "ratio", "mismatch_kl"):
            assert right[key] == pytest.approx(left[key], rel=TOLERANCE, abs=1e-6), key
        assert right["figures"] == pytest.approx(left["figures"], rel=TOLERANCE, abs=1e-6)
        assert (right["expert_load_max"] or 0.0) == pytest.approx(left["expert_load_max"] or 0.0, rel=1e-9)
        assert right["maxima"] == pytest.approx(left["maxima"], rel=TOLERANCE, abs=1e-6)
        assert {key: right[key] for key in ("tokens", "fresh_tokens", "clipped", "applied", "lr")} == {
            key: left[key] for key in ("tokens", "fresh_tokens", "clipped", "applied", "lr")
        }
        critics = left["critic"], right["critic"]
        assert (critics[0] is None) == (critics[1] is None) == ("ppo" not in name)
        for key, value in (critics[0] or {}).items():
            # A sum of terms of both signs is as exact as its terms are: at most this large together.
            terms = math.sqrt(critics[0]["tokens"] * critics[0]["squared_returns"]) if key in SIGNED else 0.0
            bound = max(1e-6, TOLERANCE * terms)
            assert critics[1][key] == pytest.approx(value, rel=TOLERANCE, abs=bound), key
    assert len(one["gradients"]) == len(several["gradients"])
    for left, right in zip(one["gradients"], several["gradients"], strict=True):
        assert left.keys() == right.keys()
        for parameter, gradient in left.items():
            bound = TOLERANCE * gradient.abs().max().item() + 1e-9
            assert (right[parameter] - gradient).abs().max().item() <= bound, parameter


@pytest.mark.parametrize("ranks", RANKS)
def test_all_ranks_skip_a_step_that_is_not_finite_on_one(together, directory, ranks):
    outcome = together[ranks]["not finite"]
    (result,) = outcome["results"]
    assert not result["applied"]
    assert not math.isfinite(result["loss"])
    assert 5 in result["offenders"]
    assert outcome["optimizer_steps"] == 0
    untouched = AutoModelForCausalLM.from_pretrained(directory / "qwen3", dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in outcome["state"]["model"].items())


@pytest.mark.parametrize("ranks", RANKS)
def test_what_is_pushed_and_exported_is_what_is_saved(together, directory, ranks):
    outcome = together[ranks]["twice"]
    flat = np.concatenate([outcome["state"]["model"][name].numpy().ravel() for name in outcome["layout"]])
    assert outcome["pushed"].numpy().tobytes() == flat.tobytes()
    target = directory / f"exported-twice-{ranks}"
    exported = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).state_dict()
    saved = outcome["went_on"][ranks]["state"]["model"]
    assert "lm_head.weight" not in saved
    assert all(torch.equal(tensor, exported[name]) for name, tensor in saved.items())


@pytest.mark.parametrize("ranks", RANKS)
def test_stacks_of_experts_that_are_sharded_unevenly_are_saved_and_pushed_whole(alone, together, ranks):
    one, several = (outcomes["experts"] for outcomes in (alone, together[ranks]))
    # The first step of Adam is a learning rate long, whichever way it goes.
    assert differences(one["state"], several["state"], of=("model",)) < 2.1e-5
    weights = {name: several["state"]["model"][name] for name in several["layout"]}
    named = [tensor.numpy().ravel() for _, tensor in EngineForm().named(weights.items())]
    assert len(named) == len(weights) + 2 * (3 * 7 - 2)
    assert several["pushed"].numpy().tobytes() == np.concatenate(named).tobytes()


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("ranks", [1, *RANKS])
def test_a_checkpoint_converts_to_what_is_exported(together, directory, ranks, name):
    checkpoint = CheckpointStore(directory / f"end-{name}-{ranks}", 1).load_newest()
    target, exported = directory / f"converted-{name}-{ranks}", directory / f"exported-{name}-{ranks}"
    convert(checkpoint.directory, target)
    for path in exported.iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("ranks", [1, *RANKS])
def test_a_checkpoint_goes_on_bit_for_bit_on_as_many_ranks(alone, together, ranks, name):
    went_on = {1: alone, **together}[ranks][name]["went_on"]
    assert went_on[ranks]["losses"] == went_on[0]["losses"]
    assert differences(went_on[0]["state"], went_on[ranks]["state"], of=(*PARTS[name], "rng")) == 0.0


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize(("wrote", "ranks"), [(one, other) for one in (1, *RANKS) for other in RANKS if one < other])
def test_a_checkpoint_goes_on_on_more_ranks(alone, together, wrote, ranks, name):
    before = {1: alone, **together}[wrote][name]["went_on"][wrote]
    after = together[ranks][name]["went_on"][wrote]
    assert after["losses"] == pytest.approx(before["losses"], rel=TOLERANCE, abs=1e-6)
    assert differences(before["state"], after["state"], of=PARTS[name][::2]) < 2e-6


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("wrote", RANKS)
def test_a_checkpoint_goes_on_on_one_rank(together, directory, wrote, name):
    case, went_on = CASES[name], together[wrote][name]["went_on"][wrote]
    config = case.config(directory, 1, 0)
    backend, start = TorchBackend(config), start_of(directory, name, wrote)
    for part in PARTS[name]:
        assert sorted(path.name for path in start.directory.glob(f"{part}-*")) == [
            f"{part}-{rank:05d}.safetensors" for rank in range(wrote)
        ]
    backend.load_state(start.tensors, start.state.optimizer_steps)
    for part, tensors in backend.state().items():
        assert all(torch.equal(tensor, start.tensors[part][key][...]) for key, tensor in tensors.items()), part
    losses = [result.loss for result in train_batch(backend, case.samples(), CLOCK, config)]
    assert losses == pytest.approx(went_on["losses"], rel=TOLERANCE, abs=1e-6)
    assert differences(backend.state(), went_on["state"], of=PARTS[name][::2]) < 2e-6
    assert backend.optimizer_steps == start.state.optimizer_steps + case.steps
    if backend.critic is not None:
        assert backend.critic.optimizer_steps == backend.optimizer_steps


def test_a_rank_that_no_rank_was_before_takes_the_generator_of_another(together, directory):
    kept = start_of(directory, "twice", 1).tensors["rng"]
    ranks = max(RANKS)
    after = together[ranks]["twice"]["went_on"][1]["state"]["rng"]
    assert sorted(after) == [f"torch/{rank}" for rank in range(ranks)]
    assert all(torch.equal(state, kept["torch/0"][...]) for state in after.values())


@pytest.mark.parametrize("ranks", RANKS)
def test_master_weights_are_float32_and_what_leaves_is_rounded(alone, together, ranks):
    one, several = alone["bfloat16"]["state"], together[ranks]["bfloat16"]["state"]
    assert {tensor.dtype for tensor in several["model"].values()} == {torch.bfloat16}
    assert several["optimizer"].keys() == one["optimizer"].keys()
    for name, tensor in several["model"].items():
        master = several["optimizer"][f"master/{name}"]
        assert master.dtype == torch.float32
        assert torch.equal(master.to(torch.bfloat16), tensor)
    critic = together[ranks]["ppo, bfloat16"]["state"]["critic"]
    assert {tensor.dtype for name, tensor in critic.items() if "value_head" not in name} == {torch.bfloat16}
    assert critic["value_head.weight"].dtype == torch.float32
    left, right = (each["bfloat16"]["results"] for each in (alone, together[ranks]))
    assert [each["loss"] for each in right] == pytest.approx([each["loss"] for each in left], rel=2e-2, abs=2e-2)


@pytest.mark.parametrize("name", ["adapters", "adapters, bfloat16"])
@pytest.mark.parametrize("ranks", RANKS)
def test_what_is_pushed_is_the_base_and_the_adapters_that_are_saved(together, directory, ranks, name):
    outcome, dtype = together[ranks][name], getattr(torch, CASES[name].dtype)
    base = AutoModelForCausalLM.from_pretrained(directory / "qwen3", dtype=dtype).state_dict()
    assert outcome["state"].keys() == {"adapter", "optimizer", "rng"}
    factors = outcome["state"]["adapter"]
    assert {tensor.dtype for tensor in factors.values()} == {dtype}
    flat = []
    for key in outcome["layout"]:
        layer, weight = key.removesuffix(".weight"), base[key].float()
        if f"{layer}.lora_A.weight" in factors:
            a, b = (factors[f"{layer}.lora_{factor}.weight"].float() for factor in "AB")
            weight = torch.addmm(weight, b, a, alpha=32 / 3)
        flat.append(weight.to(dtype).ravel())
    assert torch.equal(outcome["pushed"].view(dtype), torch.cat(flat))


@pytest.mark.parametrize("ranks", RANKS)
def test_two_runs_on_as_many_ranks_are_equal_bit_for_bit(together, ranks):
    first, second = (together[ranks][name] for name in ("twice", "again"))
    assert first["results"] == second["results"]
    assert differences(first["state"], second["state"]) == 0.0


def differences(left, right, of=("model", "optimizer")):
    """The largest absolute one of two states."""
    assert all(left[part].keys() == right[part].keys() for part in of)
    return max(
        (left[part][name].double() - right[part][name].double()).abs().max().item()
        for part in of
        for name in left[part]
    )
