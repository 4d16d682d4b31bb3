"""Shapes and constants of a decoder, read from a Hugging Face config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common.errors import ConfigError
from services.common.model_files import check_quantisation

SUPPORTED = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}


@dataclass(frozen=True)
class ExpertsConfig:
    """Of the layers whose feed-forward part is a mixture of experts."""

    count: int
    per_token: int
    """Experts that a token goes through."""
    intermediate_size: int
    normalised: bool
    """The weights of a token's experts add up to 1."""
    layers: frozenset[int]
    """Which layers have them; the others are dense."""


@dataclass(frozen=True)
class DecoderConfig:
    """What the forward pass needs to know."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    experts: ExpertsConfig | None
    """None in a dense model."""
    rope: Mapping[str, Any]
    """`rope_type`, `rope_theta` and the parameters of that type."""
    eos_token_ids: frozenset[int]


def read_config(model_path: Path) -> DecoderConfig:
    """Reads config.json and generation_config.json.

    Raises ConfigError for an unreadable directory, another architecture, or a feature the engine does not have.
    """
    raw = _read_json(model_path / "config.json")
    names = raw.get("architectures") or []
    architecture = next((name for name in names if name in SUPPORTED), None)
    if architecture is None:
        raise ConfigError(f"{names} is not supported; supported are {', '.join(SUPPORTED)}", field="architectures")
    _refuse_unsupported(raw)
    family = SUPPORTED[architecture]
    attention_bias = bool(raw.get("attention_bias", False))
    heads = int(_need(raw, "num_attention_heads"))
    return DecoderConfig(
        architecture=architecture,
        vocab_size=int(_need(raw, "vocab_size")),
        hidden_size=int(_need(raw, "hidden_size")),
        intermediate_size=int(_need(raw, "intermediate_size")),
        num_layers=int(_need(raw, "num_hidden_layers")),
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // heads),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        max_position_embeddings=int(_need(raw, "max_position_embeddings")),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=family != "qwen2" and attention_bias,
        qk_norm=family in ("qwen3", "qwen3_moe"),
        experts=_experts(raw) if family == "qwen3_moe" else None,
        rope=_rope(raw),
        eos_token_ids=_eos_ids(raw, model_path),
    )


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if (activation := raw.get("hidden_act", "silu")) != "silu":
        raise ConfigError(f"{activation!r} is not supported; only 'silu' is", field="hidden_act")
    check_quantisation(raw)
    for field in ("mlp_bias", "use_sliding_window"):
        if raw.get(field):
            raise ConfigError("is not supported by this engine", field=field)
    if any(kind != "full_attention" for kind in raw.get("layer_types") or ()):
        raise ConfigError("only 'full_attention' is supported", field="layer_types")


def _experts(raw: Mapping[str, Any]) -> ExpertsConfig:
    # Qwen's own directories have the second name, and what newer versions of transformers write the first.
    count = int(raw.get("num_local_experts") or _need(raw, "num_experts"))
    per_token = int(_need(raw, "num_experts_per_tok"))
    if not 0 < per_token <= count:
        raise ConfigError(f"{per_token} of {count} experts", field="num_experts_per_tok")
    step, dense = int(raw.get("decoder_sparse_step") or 1), raw.get("mlp_only_layers") or ()
    layers = range(int(_need(raw, "num_hidden_layers")))
    return ExpertsConfig(
        count=count,
        per_token=per_token,
        intermediate_size=int(_need(raw, "moe_intermediate_size")),
        normalised=bool(raw.get("norm_topk_prob", False)),
        layers=frozenset(layer for layer in layers if layer not in dense and (layer + 1) % step == 0),
    )


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The newer `rope_parameters`, or the older `rope_theta` with `rope_scaling`."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope["rope_theta"] = float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    partial = rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    if float(partial) != 1.0:
        raise ConfigError(f"{partial} is not supported; only 1.0 is", field="partial_rotary_factor")
    return rope


def _eos_ids(raw: Mapping[str, Any], model_path: Path) -> frozenset[int]:
    generation = model_path / "generation_config.json"
    sources = [raw, _read_json(generation)] if generation.exists() else [raw]
    ids: set[int] = set()
    for source in sources:
        value = source.get("eos_token_id")
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ids)


def _need(raw: Mapping[str, Any], field: str) -> Any:
    if raw.get(field) is None:
        raise ConfigError("is missing in config.json", field=field)
    return raw[field]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", field=str(path)) from error
    except ValueError as error:
        raise ConfigError(f"is not valid JSON: {error}", field=str(path)) from error
    if not isinstance(content, dict):
        raise ConfigError("is not a JSON object", field=str(path))
    return content
