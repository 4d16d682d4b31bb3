"""What a sequence costs: an estimate from the model's configuration, for planning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.common.errors import ConfigError

FIELD = "trainer.balance_data"
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# Shared experts: a width, or how many of the width of the others.
_SHARED_WIDTH, _SHARED_COUNT = "shared_expert_intermediate_size", "n_shared_experts"


@dataclass(frozen=True, slots=True)
class SequenceFlops:
    """Floating-point operations of one forward pass of a decoder; with the backward pass it is three times that.

    A multiplication and its addition are two. Norms, activations and rotary embeddings, which are linear and small, are
    left out, and a prompt that a micro-batch computes once for several sequences counts for each.
    """

    per_token: int
    """Of the linear layers: twice their parameters, of a mixture of experts those that a token goes through."""
    per_predicted: int
    """Of the output head, which runs only where a trained token is predicted."""
    per_token_squared: int
    """Of causal attention: half of two products of [n, d] and [d, n] a head."""

    def __call__(self, tokens: int, predicted: int) -> int:
        """Of a sequence of that many tokens, of which so many predict a trained one."""
        return self.per_token * tokens + self.per_predicted * predicted + self.per_token_squared * tokens * tokens


def sequence_flops(config: Mapping[str, Any]) -> SequenceFlops:
    """For the model of a Hugging Face `config.json`: gated feed-forward layers, dense or mixtures of experts that are
    gated, full causal attention.

    Raises ConfigError for a model whose attention has its keys and values compressed (multi-head latent attention), and
    for one whose configuration does not give its sizes.
    """
    if config.get("kv_lora_rank"):
        raise ConfigError(f"is not for latent attention: kv_lora_rank = {config['kv_lora_rank']}", field=FIELD)
    hidden, layers, heads = (_size(config, key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    vocabulary = _size(config, "vocab_size")
    key_heads = _size(config, "num_key_value_heads", heads)
    width = _size(config, "head_dim", hidden // heads)
    attention = hidden * width * (2 * heads + 2 * key_heads)
    experts = next((_size(config, key) for key in _EXPERTS if config.get(key)), 0)
    sparse = _sparse_layers(config, layers) if experts else 0
    feed_forward = sparse * _mixture(config, hidden, experts) if sparse else 0
    if sparse < layers:
        feed_forward += (layers - sparse) * 3 * hidden * _size(config, "intermediate_size")
    return SequenceFlops(
        per_token=2 * (layers * attention + feed_forward),
        per_predicted=2 * hidden * vocabulary,
        per_token_squared=2 * layers * heads * width,
    )


def _sparse_layers(config: Mapping[str, Any], layers: int) -> int:
    """How many have experts: not the first few (`first_k_dense_replace`), not those that are named (`mlp_only_layers`),
    and one of every `decoder_sparse_step`.
    """
    first, step = config.get("first_k_dense_replace") or 0, config.get("decoder_sparse_step") or 1
    dense = config.get("mlp_only_layers") or ()
    return sum(layer not in dense and (layer + 1) % step == 0 for layer in range(first, layers))


def _mixture(config: Mapping[str, Any], hidden: int, experts: int) -> int:
    """Parameters that a token is multiplied with: the router, its experts, and those that all tokens share."""
    width = _size(config, "moe_intermediate_size", config.get("intermediate_size"))
    parameters = hidden * experts + _size(config, "num_experts_per_tok") * 3 * hidden * width
    if config.get(_SHARED_WIDTH):
        # With a gate, which is one more row.
        parameters += hidden * (3 * _size(config, _SHARED_WIDTH) + 1)
    elif config.get(_SHARED_COUNT):
        parameters += 3 * hidden * width * _size(config, _SHARED_COUNT)
    return parameters


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"needs {key} in the model's config.json", field=FIELD)
    return value
