"""The forward pass against Hugging Face's models in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.common.errors import ConfigError
from services.rollout.engines.torch_engine.checkpoint import load_checkpoint
from services.rollout.engines.torch_engine.decoder import Decoder
from services.rollout.engines.torch_engine.decoder_config import ExpertsConfig, read_config
from services.rollout.engines.torch_engine.parameters import Parameters
from tests.kit.hf_reference import load_reference
from tests.kit.tiny_model import (
    VOCAB_SIZE,
    build_tiny_llama,
    build_tiny_qwen2,
    build_tiny_qwen3,
    build_tiny_qwen3_moe,
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "qwen3": (build_tiny_qwen3, {}),
    "qwen3 wide": (build_tiny_qwen3, {"hidden": 128, "num_key_value_heads": 2, "head_dim": 16, "layers": 3}),
    "qwen3 untied": (build_tiny_qwen3, {"tie_word_embeddings": False, "attention_bias": True}),
    "qwen2 with bias": (build_tiny_qwen2, {}),
    "llama": (build_tiny_llama, {"num_key_value_heads": 2}),
    "llama with bias": (build_tiny_llama, {"attention_bias": True}),
    "llama3 rope": (build_tiny_llama, {"rope_parameters": LLAMA3}),
    "qwen3 moe": (build_tiny_qwen3_moe, {}),
    "qwen3 moe, some layers dense": (
        build_tiny_qwen3_moe,
        {"layers": 4, "mlp_only_layers": [1], "decoder_sparse_step": 2, "norm_topk_prob": False, "num_experts": 16},
    ),
    "linear rope": (build_tiny_llama, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
}


def load(path: Path, dtype: torch.dtype = torch.float32, slots: int = 4, length: int = 96) -> Decoder:
    config = read_config(path)
    parameters = Parameters(config, dtype, torch.device("cpu"))
    load_checkpoint(path, parameters)
    return Decoder(config, parameters, slots, length)


def run_tokens(decoder: Decoder, ids: np.ndarray, chunk: int, prefilled: int) -> torch.Tensor:
    """Logits [rows, tokens, vocab] of rows in slots 3, 1, …: the first `prefilled` by chunks, then one by one."""
    rows, tokens = ids.shape
    slots = np.array([3, 1, 0][:rows])
    logits = torch.full((rows, tokens, VOCAB_SIZE), torch.nan)
    with torch.inference_mode():
        for start in range(0, prefilled, chunk):
            part = ids[:, start : start + chunk].astype(np.int32)
            out = decoder.prefill(part, np.full(rows, start), slots, 64, want_logits=True)
            assert out is not None
            logits[:, start : start + part.shape[1]] = out
        for position in range(prefilled, tokens):
            token_ids, where = np.zeros(4, np.int32), np.full(4, decoder.scratch_slot)
            token_ids[slots], where[slots] = ids[:, position], slots
            out = decoder.decode(token_ids, np.full(4, position), where, 64)
            logits[:, position] = out[torch.from_numpy(slots)]
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_hugging_faces(name: str, tmp_path: Path) -> None:
    build, fields = MODELS[name]
    path = build(tmp_path, seed=3, **fields)
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, (3, 60))
    with torch.no_grad():
        expected = load_reference(path, torch.float64)(torch.from_numpy(ids)).logits
    logits = run_tokens(load(path), ids, chunk=16, prefilled=48)
    torch.testing.assert_close(logits.double(), expected, atol=2e-4, rtol=1e-4)


def test_older_rope_keys_mean_the_same(tmp_path: Path) -> None:
    path = build_tiny_llama(tmp_path, rope_parameters=LLAMA3)
    ids = np.random.default_rng(1).integers(0, VOCAB_SIZE, (1, 40))
    expected = run_tokens(load(path), ids, 20, 40)
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    (path / "config.json").write_text(json.dumps(config))
    assert torch.equal(run_tokens(load(path), ids, 20, 40), expected)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_experts_are_counted_under_either_name(tmp_path: Path, key: str) -> None:
    path = build_tiny_qwen3_moe(tmp_path)
    config = json.loads((path / "config.json").read_text())
    for known in ("num_experts", "num_local_experts"):
        config.pop(known, None)
    (path / "config.json").write_text(json.dumps(config | {key: 7}))
    assert read_config(path).experts == ExpertsConfig(7, 2, 24, True, frozenset({0, 1}))
    (path / "config.json").write_text(json.dumps(config | {key: 1}))
    with pytest.raises(ConfigError, match="num_experts_per_tok: 2 of 1 experts"):
        read_config(path)


def test_bfloat16_is_close_to_hugging_faces_bfloat16(tmp_path: Path) -> None:
    path = build_tiny_qwen3(tmp_path, seed=2)
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 40))
    with torch.no_grad():
        exact = load_reference(path, torch.float64)(torch.from_numpy(ids)).logits.log_softmax(-1)
        theirs = load_reference(path, torch.bfloat16)(torch.from_numpy(ids)).logits.double().log_softmax(-1)
    ours = run_tokens(load(path, torch.bfloat16), ids, 16, 32).double().log_softmax(-1)
    assert (ours - exact).abs().mean() < 1.5 * (theirs - exact).abs().mean()


def test_a_prefill_without_logits_fills_the_same_cache(tmp_path: Path) -> None:
    path = build_tiny_qwen3(tmp_path)
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, (1, 17)).astype(np.int32)
    results = []
    for want in (True, False):
        decoder = load(path)
        with torch.inference_mode():
            decoder.prefill(ids[:, :16], np.zeros(1, np.int64), np.zeros(1, np.int64), 32, want_logits=want)
            results.append(decoder.decode(ids[:, 16], np.array([16]), np.zeros(1, np.int64), 32))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "supported are LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, ",
        ),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"vocab_size": None}, "vocab_size"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = build_tiny_qwen3(tmp_path)
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=reason):
        load(path)
