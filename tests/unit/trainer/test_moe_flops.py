"""FLOPs of models with experts: those that a token goes through, counted by hand and by torch."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from services.trainer.batch.flops import SequenceFlops, sequence_flops
from tests.kit.tiny_model import build_tiny_mixtral, build_tiny_olmoe, build_tiny_qwen2_moe, build_tiny_qwen3_moe

# Of their config.json.
QWEN3_30B_A3B = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
}
GLM_45_AIR = {
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "vocab_size": 151552,
}


def test_qwen3_30b_has_three_billion_active_parameters():
    # Queries and output 2048 × 4096 each, keys and values 2048 × 512 each.
    attention = 2 * 8_388_608 + 2 * 1_048_576
    # 8 experts of three matrices of 2048 × 768, and the router, 2048 × 128.
    experts = 8 * 3 * 1_572_864 + 262_144
    layers = 48 * (attention + experts)
    assert layers == 2_730_491_904
    # 48 layers of 32 heads of 128: half of two products of n × n × 128.
    expected = SequenceFlops(2 * layers, 2 * 311_164_928, 2 * 48 * 32 * 128)
    assert sequence_flops(QWEN3_30B_A3B) == expected
    # Under the name that transformers writes.
    renamed = {"num_local_experts" if key == "num_experts" else key: value for key, value in QWEN3_30B_A3B.items()}
    assert sequence_flops(renamed) == expected


def test_glm_45_air_has_a_dense_layer_first_and_an_expert_that_all_tokens_share():
    attention = 2 * 4096 * 12_288 + 2 * 4096 * 1_024
    dense = 3 * 4096 * 10_944
    experts = (8 + 1) * 3 * 4096 * 1_408 + 4096 * 128
    assert sequence_flops(GLM_45_AIR).per_token == 2 * (46 * attention + dense + 45 * experts)


@pytest.mark.parametrize(
    ("build", "overrides"),
    [
        (build_tiny_qwen3_moe, {}),
        (build_tiny_qwen3_moe, {"layers": 5, "mlp_only_layers": [3], "decoder_sparse_step": 2}),
        (build_tiny_qwen2_moe, {}),
        (build_tiny_mixtral, {}),
        (build_tiny_olmoe, {}),
    ],
)
@pytest.mark.parametrize("tokens", [1, 150])
def test_they_are_what_torch_counts(tmp_path, build, overrides, tokens):
    directory = build(tmp_path / "m", **overrides)
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", experts_implementation="eager")
    flops = sequence_flops(json.loads((directory / "config.json").read_text()))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.ones(1, tokens, dtype=torch.int64), logits_to_keep=1)
    # What torch multiplies is attention's masked half as well, and the positions of rotary embeddings: next to nothing.
    expected = flops(tokens, 1) + flops.per_token_squared * tokens**2
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)
