"""Attention over a packed row, plugged into transformers' models.

The models compute their linear layers on the packed row; this function alone knows the sequences in it. On a GPU,
in half precision, torch's varlen kernel attends within each. Elsewhere, queries, keys and values are gathered into
blocks of sequences of similar length, which attend causally within each sequence, and the outcome is put back. Work
grows with the sum of squared sequence lengths, not with the square of the row.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from services.trainer.backends.torch.context import Context, with_those_of_all

NAME = "polyhead_packed"
PLAIN = "polyhead_plain"
"""torch's attention over one unpacked sequence, what `NAME` is compared with."""

# From torch 2.12 on, fewer heads of keys than of queries have to be asked for.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
# What the kernel takes.
_MAX_HEAD_DIM, _HEAD_DIM_MULTIPLE, _LEAST_CAPABILITY = 256, 8, (8, 0)


class Varlen(NamedTuple):
    """What attends to what, as the kernel wants it: sequences one after the other. Where ranks share a row, the runs
    of tokens that this one has, each with the keys from its sequence's first to its own last.
    """

    order: torch.Tensor | None
    """int64 indices into the row, sequence after sequence; None where that is the row, for no prompt is shared."""
    places: torch.Tensor | None
    """int64 [T]: where each token stands in `order`."""
    starts: torch.Tensor
    """int32 [sequences + 1]: of each sequence in `order`, and the end of the last."""
    longest: int
    """Tokens of the longest sequence."""
    keys: torch.Tensor | None
    """As `order`, into the keys."""
    key_starts: torch.Tensor
    longest_keys: int


class PackedLayout(NamedTuple):
    """Where the sequences are in a row of T tokens. int64 tensors on the model's device."""

    varlen: Varlen
    blocks: tuple[torch.Tensor, ...] = ()
    """Each [sequences, longest]: indices into the row, short sequences filled up at the end. Empty where ranks share
    it."""
    slots: torch.Tensor | None = None
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
    # Rotary embeddings in float32 widen what they turn.
    query, key = query.to(value.dtype), key.to(value.dtype)
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if packed_layout.context is not None:
        keys, values = (with_those_of_all(rows, packed_layout.context.group) for rows in (keys, values))
    if packed_layout.slots is None or _has_kernel(queries, values):
        output = _varlen(queries, keys, values, packed_layout.varlen, scaling, sliding_window)
    else:
        output = _blockwise(queries, keys, values, packed_layout, scaling, sliding_window)
    return output.unsqueeze(0), None


def _has_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    width = query.shape[-1]
    fits = width <= _MAX_HEAD_DIM and width % _HEAD_DIM_MULTIPLE == 0 and value.shape[-1] == width
    return fits and torch.cuda.get_device_capability(query.device) >= _LEAST_CAPABILITY


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    varlen: Varlen,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Rows [T, heads, head_dim] in, [T, heads, head_dim] out."""
    queries, keys, values = _ordered(query, varlen.order), _ordered(key, varlen.keys), _ordered(value, varlen.keys)
    attend, options = (varlen_attn, _GROUPED) if _has_kernel(queries, values) else (_one_by_one, {})
    output = attend(
        queries,
        keys,
        values,
        varlen.starts,
        varlen.key_starts,
        varlen.longest,
        varlen.longest_keys,
        scale=scaling,
        window_size=(-1, 0) if sliding_window is None else (sliding_window - 1, 0),
        **options,
    )
    return _ordered(output, varlen.places)


def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    key_starts: torch.Tensor,
    *_longest: int,
    scale: float | None,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """What the kernel gives, without it. Of fewer queries than keys the last query is the last key."""
    queries = query.split(starts.diff().tolist())
    keys, values = (rows.split(key_starts.diff().tolist()) for rows in (key, value))
    pairs = zip(queries, keys, values, strict=True)
    return torch.cat([_attend_to_last(*each, scale, window_size[0]) for each in pairs])


def _ordered(rows: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    return rows if order is None else rows.index_select(0, order)


def _blockwise(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PackedLayout,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """The same of a row that is not shared."""
    outputs = [_attend(query, key, value, block, scaling, sliding_window) for block in layout.blocks]
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    assert layout.slots is not None
    return joined.index_select(0, layout.slots)


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


def _attend_to_last(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int
) -> torch.Tensor:
    """Queries [q, heads, head_dim] that are the last of k tokens, of which the keys are all; each sees `window` tokens
    before it, or with -1 all of them.
    """
    places = torch.arange(len(key), device=key.device)
    behind = places[-len(query) :, None] - places
    seen = behind >= 0
    if window >= 0:
        seen &= behind <= window
    query, key, value = (rows.transpose(0, 1).unsqueeze(0) for rows in (query, key, value))
    output = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output[0].transpose(0, 1)


def _gather(rows: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """[sequences, heads, longest, head_dim] of rows [T, heads, head_dim]."""
    return rows.index_select(0, block.flatten()).unflatten(0, block.shape).transpose(1, 2)


def _plain_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    return sdpa_attention_forward(module, query.to(value.dtype), key.to(value.dtype), value, *args, **options)


def _no_mask(*_: Any, **__: Any) -> None:
    """The sequences are separated by the layout, so the models need not build a mask."""


def register() -> None:
    """Makes the implementations known to transformers under `NAME` and `PLAIN`."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    AttentionInterface.register(PLAIN, _plain_attention)
    AttentionMaskInterface.register(PLAIN, sdpa_mask)
