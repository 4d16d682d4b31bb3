"""Micro-batches and their ranks: nothing lost, limits kept, work balanced; what a sequence costs."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from services.common.config import load
from services.common.errors import ConfigError, InvalidArgumentError
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.backends.torch.model import context_length
from services.trainer.batch.balance import aligned, karmarkar_karp
from services.trainer.batch.flops import SequenceFlops, sequence_flops
from services.trainer.batch.plan import Batching, first_fit_decreasing, plan_micro_batches, split_by_groups
from services.trainer.batch.samples import TrainSample
from tests.kit.tiny_model import build_tiny_llama, build_tiny_qwen2, build_tiny_qwen3

QWEN3_06B = """{"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}"""
LENGTHS = st.lists(st.integers(1, 50), max_size=60)
FLOPS = SequenceFlops(per_token=50, per_predicted=10, per_token_squared=3)
BATCHINGS = st.builds(
    Batching,
    st.integers(1, 60),
    micro_batch_size=st.none() | st.integers(1, 9),
    flops=st.none() | st.just(FLOPS),
    dp=st.integers(1, 9),
    cp=st.integers(1, 3),
)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 60))
def test_bins_hold_every_item_once_and_at_most_the_bound(lengths, bound):
    bins = first_fit_decreasing(lengths, bound)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    for members in bins:
        assert sum(lengths[index] for index in members) <= bound or len(members) == 1
    # No two bins could have been one.
    sizes = sorted(sum(lengths[index] for index in members) for members in bins)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > bound


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 60))
def test_each_item_is_in_the_first_bin_with_room_for_it(lengths, bound):
    bins = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        room = [members for members in bins if sum(lengths[other] for other in members) + lengths[index] <= bound]
        if room:
            room[0].append(index)
        else:
            bins.append([index])
    assert first_fit_decreasing(lengths, bound) == bins


@settings(max_examples=300, deadline=None)
@given(LENGTHS, BATCHINGS)
def test_a_plan_has_every_sequence_once_within_the_limit_and_as_many_micro_batches_for_each_rank(lengths, batching):
    predicted = [(length + 1) // 2 for length in lengths]
    plan = plan_micro_batches(lengths, predicted, batching)
    assert len(plan) == batching.dp
    assert len({len(of_rank) for of_rank in plan}) == 1
    micro_batches = [members for of_rank in plan for members in of_rank]
    assert sorted(index for members in micro_batches for index in members) == list(range(len(lengths)))
    for members in micro_batches:
        if batching.micro_batch_size:
            assert len(members) <= batching.micro_batch_size
        else:
            tokens = sum(lengths[index] for index in members)
            assert tokens <= batching.max_tokens * batching.cp or len(members) == 1
    assert any(micro_batches) or not lengths
    # No rank has nothing where another has something to give away.
    assert all(micro_batches) or all(len(members) <= 1 for members in micro_batches)
    assert plan == plan_micro_batches(lengths, predicted, batching)


@given(LENGTHS, st.integers(1, 60))
def test_one_rank_that_balances_nothing_trains_the_bins_as_they_were_packed(lengths, bound):
    assert plan_micro_batches(lengths, lengths, Batching(bound)) == [first_fit_decreasing(lengths, bound)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 25))
def test_sequences_in_order_of_arrival_stay_in_it(lengths, dp):
    (of_rank,) = plan_micro_batches(lengths, lengths, Batching(1, micro_batch_size=3))
    assert [index for members in of_rank for index in members] == list(range(len(lengths)))
    bins = aligned([list(range(len(lengths)))], lengths, dp)
    assert len(bins) == dp
    assert all(members == sorted(members) for members in bins)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 6), st.integers(0, 12), st.data())
def test_shares_have_equal_numbers_and_nothing_is_lost(parts, each, data):
    costs = data.draw(st.lists(st.integers(0, 100), min_size=parts * each, max_size=parts * each))
    shares = karmarkar_karp(costs, parts)
    assert [len(share) for share in shares] == [each] * parts
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    for share in shares:
        assert [costs[index] for index in share] == sorted((costs[index] for index in share), reverse=True)


def costliest(costs, shares):
    return max(sum(costs[index] for index in share) for share in shares)


def least_cost(costs, parts):
    """Of the costliest of `parts` sets of equal size, over all ways to make them."""
    size = len(costs) // parts

    def rest(items):
        if not items:
            return 0
        first, *others = items
        return min(
            max(
                costs[first] + sum(costs[index] for index in chosen),
                rest([index for index in others if index not in chosen]),
            )
            for chosen in itertools.combinations(others, size - 1)
        )

    return rest(list(range(len(costs))))


SMALL = [(2, 1), (2, 2), (2, 3), (2, 4), (3, 1), (3, 2), (3, 3), (4, 1), (4, 2)]
PROVEN = {1: 1, 2: 1, 3: 4 / 3, 4: 19 / 12}


@pytest.mark.parametrize(("parts", "each"), SMALL)
def test_shares_are_nearly_as_even_as_the_best_of_all(parts, each):
    rng = np.random.default_rng(parts * 10 + each)
    ratios = []
    for highest in [3, 10, 100, 1000] * 5:
        costs = rng.integers(1, highest + 1, parts * each).tolist()
        ratios.append(costliest(costs, karmarkar_karp(costs, parts)) / least_cost(costs, parts))
    assert max(ratios) <= min(PROVEN[each], 2 - 1 / parts) + 1e-9
    assert np.mean(ratios) <= 1.03


def test_shares_of_costs_that_do_not_divide_are_refused():
    with pytest.raises(InvalidArgumentError, match="costs: 7 costs cannot be shared out equally over 2 parts"):
        karmarkar_karp([1] * 7, 2)
    with pytest.raises(InvalidArgumentError, match="dp: 0 is less than 1"):
        Batching(1, dp=0)


def test_work_is_balanced_over_eight_ranks_on_a_long_tail():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6.9, 1.0, 2048), 1, 8192).astype(int).tolist()
    flops = sequence_flops(json.loads(QWEN3_06B))
    plan = plan_micro_batches(lengths, lengths, Batching(8192, flops=flops, dp=8))
    work = [sum(flops(lengths[index], lengths[index]) for members in share for index in members) for share in plan]
    assert max(work) <= 1.02 * sum(work) / 8
    tokens = [sum(lengths[index] for index in members) for members in first_fit_decreasing(lengths, 8192)]
    assert sum(tokens[:-1]) >= 0.98 * 8192 * len(tokens[:-1])


@pytest.mark.parametrize("build", [build_tiny_qwen3, build_tiny_qwen2, build_tiny_llama])
@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_flops_are_those_that_torch_counts(tmp_path, build, tokens):
    directory = build(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    flops = sequence_flops(json.loads((directory / "config.json").read_text()))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.ones(1, tokens, dtype=torch.int64), logits_to_keep=1)
    # What torch multiplies is attention's masked half as well, and the positions of rotary embeddings: next to nothing.
    expected = flops(tokens, 1) + flops.per_token_squared * tokens**2
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_experts": 8}, "trainer.balance_data: needs num_experts_per_tok in the model's config.json"),
        ({"kv_lora_rank": 8}, "trainer.balance_data: is not for latent attention: kv_lora_rank = 8"),
        ({"hidden_size": None}, "trainer.balance_data: needs hidden_size in the model's config.json"),
    ],
)
def test_models_whose_work_is_not_known_are_refused(changed, message):
    with pytest.raises(ConfigError) as caught:
        sequence_flops(json.loads(QWEN3_06B) | changed)
    assert str(caught.value) == message


def test_the_backend_knows_the_work_and_the_context_of_its_model(tmp_path):
    directory = build_tiny_qwen3(tmp_path / "m", max_position_embeddings=96)
    config = load(None, {"model.hf_checkpoint": str(directory), "trainer.balance_data": True})
    backend = TorchBackend(config)
    assert backend.flops == sequence_flops(json.loads((directory / "config.json").read_text()))
    assert backend.context_length == 96
    config.trainer.balance_data = False
    assert TorchBackend(config).flops is None
    stretched = backend.model.config
    stretched.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert context_length(stretched) == 256
    stretched.rope_parameters = {"rope_type": "linear", "factor": 2.0}
    assert context_length(stretched) == 192


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 4))
def test_each_optimizer_step_has_the_global_batch_size_in_whole_groups_in_order(groups, size, steps):
    samples = [
        TrainSample(f"{group}-{index}", f"{group}", 0.0, 1.0, (), None)
        for group in range(groups * steps)
        for index in range(size)
    ]
    keys = {"rollout_batch_size": groups * steps, "n_samples_per_prompt": size, "num_steps_per_rollout": steps}
    batch = load(None, {f"batch.{key}": value for key, value in keys.items()}).batch
    parts = split_by_groups(samples, batch.num_steps_per_rollout)
    assert [len(part) for part in parts] == [batch.global_batch_size] * steps
    assert [sample for part in parts for sample in part] == samples
    assert all(count == size for part in parts for count in Counter(sample.group_id for sample in part).values())
