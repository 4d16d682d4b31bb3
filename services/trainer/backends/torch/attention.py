"""Attention over a packed row, plugged into transformers' models.

The models compute their linear layers on the packed row; this function alone knows the sequences in it. It gathers
queries, keys and values into blocks of sequences of similar length, attends causally within each sequence, and puts
the outcome back. Work and memory grow with the sum of squared sequence lengths, not with the square of the row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from services.trainer.backends.torch.context import Context, with_those_of_all

NAME = "polyhead_packed"


class PackedLayout(NamedTuple):
    """Where the sequences are in a row of T tokens. int64 tensors on the model's device."""

    blocks: tuple[torch.Tensor, ...]
    """Each [sequences, longest]: indices into the row, short sequences filled up at the end."""
    slots: torch.Tensor
    """[T]: where each token stands in the concatenation of the flattened blocks."""
    context: Context | None = None
    """The ranks that share the row, whose tokens it then has a part of; None: it has them all."""


def packed_attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: torch.Tensor | None,
    *,
    packed_layout: PackedLayout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """From [1, heads, T, head_dim], and [1, kv_heads, T, head_dim] for key and value, to [1, T, heads, head_dim].

    With a `sliding_window` a token sees itself and the `sliding_window - 1` tokens before it.
    """
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    context = packed_layout.context
    if context is None:
        outputs = [_attend(queries, keys, values, block, scaling, sliding_window) for block in packed_layout.blocks]
    else:
        keys, values = (with_those_of_all(rows, context.group) for rows in (keys, values))
        outputs = [
            _attend_over(queries, keys, values, *block, scaling, sliding_window)
            for block in zip(packed_layout.blocks, context.places, context.keys, strict=True)
        ]
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined.index_select(0, packed_layout.slots).unsqueeze(0), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """One block: rows [T, heads, head_dim] in, [sequences * longest, heads, head_dim] out."""
    longest = block.shape[1]
    band = None
    if sliding_window is not None and sliding_window < longest:
        causal = torch.ones(longest, longest, dtype=torch.bool, device=block.device).tril()
        band = causal.triu(1 - sliding_window)
    output = functional.scaled_dot_product_attention(
        _gather(query, block),
        _gather(key, block),
        _gather(value, block),
        attn_mask=band,
        is_causal=band is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).flatten(0, 1)


def _attend_over(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block: torch.Tensor,
    places: torch.Tensor,
    keys: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """One block whose queries are some of each sequence's tokens, at `places` of it, and whose keys are all of them."""
    behind = places.unsqueeze(2) - torch.arange(keys.shape[1], device=keys.device)
    seen = behind >= 0
    if sliding_window is not None:
        seen &= behind < sliding_window
    output = functional.scaled_dot_product_attention(
        _gather(query, block),
        _gather(key, keys),
        _gather(value, keys),
        attn_mask=seen.unsqueeze(1),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).flatten(0, 1)


def _gather(rows: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """[sequences, heads, longest, head_dim] of rows [T, heads, head_dim]."""
    return rows.index_select(0, block.flatten()).unflatten(0, block.shape).transpose(1, 2)


def _no_mask(*_: Any, **__: Any) -> None:
    """The sequences are separated by the gathering, so the models need not build a mask."""


def register() -> None:
    """Makes the implementation known to transformers under `NAME`."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
