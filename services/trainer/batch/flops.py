"""What a sequence costs: an estimate from the model's configuration, for planning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.common.errors import ConfigError

FIELD = "trainer.balance_data"
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class SequenceFlops:
    """Floating-point operations of one forward pass of a dense decoder; with the backward pass it is three times that.

    A multiplication and its addition are two. Norms, activations and rotary embeddings, which are linear and small, are
    left out, and a prompt that a micro-batch computes once for several sequences counts for each.
    """

    per_token: int
    """Of the linear layers: twice their parameters."""
    per_predicted: int
    """Of the output head, which runs only where a trained token is predicted."""
    per_token_squared: int
    """Of causal attention: half of two products of [n, d] and [d, n] a head."""

    def __call__(self, tokens: int, predicted: int) -> int:
        """Of a sequence of that many tokens, of which so many predict a trained one."""
        return self.per_token * tokens + self.per_predicted * predicted + self.per_token_squared * tokens * tokens


def sequence_flops(config: Mapping[str, Any]) -> SequenceFlops:
    """For the model of a Hugging Face `config.json`: dense, gated feed-forward layers, full causal attention.

    Raises ConfigError for a model with experts, and for one whose configuration does not give its sizes.
    """
    for key in _EXPERTS:
        if config.get(key):
            raise ConfigError(f"is for dense models, and this one has {key} = {config[key]}", field=FIELD)
    hidden, layers, heads = (_size(config, key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    intermediate, vocabulary = (_size(config, key) for key in ("intermediate_size", "vocab_size"))
    key_heads = _size(config, "num_key_value_heads", heads)
    width = _size(config, "head_dim", hidden // heads)
    attention = hidden * width * (2 * heads + 2 * key_heads)
    return SequenceFlops(
        per_token=2 * layers * (attention + 3 * hidden * intermediate),
        per_predicted=2 * hidden * vocabulary,
        per_token_squared=2 * layers * heads * width,
    )


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"needs {key} in the model's config.json", field=FIELD)
    return value
