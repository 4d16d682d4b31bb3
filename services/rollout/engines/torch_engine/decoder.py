"""The forward pass of Llama, Qwen2, Qwen3 and Qwen3-MoE decoders over a static KV cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from services.rollout.engines.torch_engine.decoder_config import DecoderConfig
from services.rollout.engines.torch_engine.parameters import Layer, Parameters
from services.rollout.engines.torch_engine.rope import rope_table


@dataclass(frozen=True)
class _Inputs:
    """One forward pass over N tokens: what is the same for all layers."""

    rotation: torch.Tensor
    """[N, 2, 1, head_dim], see `rope_table`."""
    cache_rows: torch.Tensor
    """int64 [N * kv_heads]: where keys and values go in a cache seen as rows of head_dim."""
    mask: torch.Tensor
    """Additive, in the model's dtype: 0 where a key may be seen, -inf elsewhere.

    [B * kv_heads, 1, kv_length] in decoding, [R, 1, C, kv_length] in a prefill."""
    kv_length: int
    slots: torch.Tensor | None
    """int64 [rows] of a prefill; None in decoding, where row i is slot i."""


class Decoder:
    """Weights and KV cache. Not thread-safe.

    A layer has two caches, of keys and of values, each [slots + 1, kv_heads, length, head_dim]. The last slot is
    scratch: rows of a batch that hold no request write there.
    """

    def __init__(self, config: DecoderConfig, parameters: Parameters, slots: int, length: int) -> None:
        self.config, self.parameters, self.length = config, parameters, length
        dtype, device = parameters.embedding.dtype, parameters.embedding.device
        self._dtype, self._device = dtype, device
        shape = (2, slots + 1, config.num_kv_heads, length, config.head_dim)
        # Zeros, not empty: a masked position still takes part in the product, and 0 × NaN is NaN.
        self._caches = [torch.zeros(shape, dtype=dtype, device=device).unbind() for _ in parameters.layers]
        self._scratch_slot = slots
        self._rope = rope_table(config.rope, config.head_dim, length).to(device=device, dtype=dtype)
        self._key_positions = torch.arange(length, device=device)
        self._kv_heads = torch.arange(config.num_kv_heads, device=device) * length
        self._seen = torch.zeros((), dtype=dtype, device=device)
        self._hidden = torch.full((), float("-inf"), dtype=dtype, device=device)
        self._scale = config.head_dim**-0.5

    def caches(self) -> Iterable[torch.Tensor]:
        """Of all layers, keys and values."""
        return (cache for layer in self._caches for cache in layer)

    def decode(
        self, token_ids: NDArray[np.int32], positions: NDArray[np.int64], slots: NDArray[np.int64], kv_length: int
    ) -> torch.Tensor:
        """One token for each of the first B slots; returns float32 logits [B, vocab].

        `token_ids` [B], `positions` [B] < `kv_length`. `slots` [B] says where row i writes its key and value: i, or
        the scratch slot when the row holds no request (its logits mean nothing).
        """
        at, where = self._tensor(positions), self._tensor(slots)
        inputs = _Inputs(
            rotation=self._rotation(at),
            cache_rows=self._cache_rows(where, at),
            mask=self._mask(at.repeat_interleave(self.config.num_kv_heads), kv_length)[:, None, :],
            kv_length=kv_length,
            slots=None,
        )
        return self._logits(self._run(self._tensor(token_ids), inputs))

    def prefill(
        self,
        token_ids: NDArray[np.int32],
        starts: NDArray[np.int64],
        slots: NDArray[np.int64],
        kv_length: int,
        *,
        want_logits: bool,
    ) -> torch.Tensor | None:
        """C tokens for each of R slots, at positions start … start + C - 1; fills the cache.

        `token_ids` [R, C], `starts` and `slots` [R]; `kv_length` is at least the largest start + C.
        Returns float32 logits [R, C, vocab] when asked. Positions past a prompt's end may hold anything: decoding
        writes them anew before it reads them.
        """
        rows, columns = token_ids.shape
        positions = self._tensor((starts[:, None] + np.arange(columns)).reshape(-1))
        where = self._tensor(slots)
        inputs = _Inputs(
            rotation=self._rotation(positions),
            cache_rows=self._cache_rows(where.repeat_interleave(columns), positions),
            mask=self._mask(positions, kv_length).view(rows, 1, columns, kv_length),
            kv_length=kv_length,
            slots=where,
        )
        hidden = self._run(self._tensor(token_ids.reshape(-1)), inputs, fill_only=not want_logits)
        return self._logits(hidden).view(rows, columns, -1) if want_logits else None

    @property
    def scratch_slot(self) -> int:
        return self._scratch_slot

    def _run(self, token_ids: torch.Tensor, inputs: _Inputs, *, fill_only: bool = False) -> torch.Tensor:
        """The last hidden states [N, hidden], before the final norm; unfinished when only the cache is to be filled."""
        attend = self._attend_one if inputs.slots is None else self._attend
        hidden = functional.embedding(token_ids, self.parameters.embedding)
        last = self.config.num_layers - 1
        for index, (layer, caches) in enumerate(zip(self.parameters.layers, self._caches, strict=True)):
            query = self._project(self._norm(hidden, layer.input_norm), layer, caches, inputs)
            if fill_only and index == last:
                return hidden
            attended = attend(query, caches[0], caches[1], inputs)
            if layer.o_bias is not None:
                hidden = hidden + layer.o_bias
            hidden = torch.addmm(hidden, attended, layer.o.t())
            x = self._norm(hidden, layer.post_norm)
            if layer.router is not None:
                hidden = hidden + self._experts(x, layer.router, layer)
                continue
            gate, up = functional.linear(x, layer.gate_up).chunk(2, dim=-1)
            hidden = torch.addmm(hidden, functional.silu(gate).mul_(up), layer.down.t())
        return hidden

    def _experts(self, x: torch.Tensor, router: torch.Tensor, layer: Layer) -> torch.Tensor:
        """A mixture of experts, [N, hidden] to [N, hidden]: softmax over all, the first few of each token.

        Each expert computes every token, with a weight of 0 where it was not chosen. Were only its own tokens given to
        it, shapes would depend on what else is in the batch, and so would the rounding of a token's result (I9).
        """
        c = self.config.experts
        assert c is not None
        weights, chosen = functional.linear(x, router).softmax(-1, dtype=torch.float32).topk(c.per_token)
        if c.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        routed = x.new_zeros(len(x), c.count).scatter_(1, chosen, weights.to(x.dtype))
        gate, up = torch.matmul(x, layer.gate_up.transpose(1, 2)).chunk(2, dim=-1)
        outputs = torch.bmm(functional.silu(gate).mul_(up), layer.down.transpose(1, 2))
        return outputs.mul_(routed.t().unsqueeze(2)).sum(dim=0)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(self._norm(hidden, self.parameters.norm), self.parameters.head).float()

    def _project(self, x: torch.Tensor, layer: Layer, caches: Sequence[torch.Tensor], inputs: _Inputs) -> torch.Tensor:
        """[N, hidden] to queries [N, heads, head_dim]; writes this pass's keys and values into the caches."""
        c = self.config
        heads, kv_heads, dim = c.num_heads, c.num_kv_heads, c.head_dim
        qkv = functional.linear(x, layer.qkv, layer.qkv_bias).view(-1, heads + 2 * kv_heads, dim)
        query_key, value = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.qk_norm is not None:
            query_key = self._norm(query_key, layer.qk_norm)
        rotated = (query_key * inputs.rotation[:, 0]).addcmul_(query_key.roll(dim // 2, -1), inputs.rotation[:, 1])
        for cache, new in zip(caches, (rotated[:, heads:], value), strict=True):
            cache.view(-1, dim).index_copy_(0, inputs.cache_rows, new.reshape(-1, dim))
        return rotated[:, :heads]

    def _attend_one(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, inputs: _Inputs
    ) -> torch.Tensor:
        """Decoding: one query position per row. The query heads of a group are the rows of one small product."""
        c, batch = self.config, query.shape[0]
        products = batch * c.num_kv_heads
        query = query.reshape(products, c.num_heads // c.num_kv_heads, c.head_dim)
        # Slots and heads lie evenly in the cache, so these are views.
        keys = keys.view(-1, self.length, c.head_dim)[:products, : inputs.kv_length]
        values = values.view(-1, self.length, c.head_dim)[:products, : inputs.kv_length]
        scores = torch.baddbmm(inputs.mask, query, keys.transpose(1, 2), alpha=self._scale)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        return torch.bmm(weights, values).view(batch, -1)

    def _attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, inputs: _Inputs) -> torch.Tensor:
        """Prefill: R rows of C query positions; their slots' keys and values are gathered."""
        assert inputs.slots is not None
        c, rows = self.config, inputs.slots.shape[0]
        attended = functional.scaled_dot_product_attention(
            query.view(rows, -1, c.num_heads, c.head_dim).transpose(1, 2),
            keys[:, :, : inputs.kv_length].index_select(0, inputs.slots),
            values[:, :, : inputs.kv_length].index_select(0, inputs.slots),
            attn_mask=inputs.mask,
            scale=self._scale,
            enable_gqa=c.num_heads != c.num_kv_heads,
        )
        return attended.transpose(1, 2).reshape(-1, c.num_heads * c.head_dim)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm (Zhang and Sennrich, 2019) over the last dimension, computed in float32."""
        if weight.dim() == 1:
            return functional.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)
        return functional.rms_norm(x, weight.shape[-1:], None, self.config.rms_norm_eps).mul_(weight)

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    def _rotation(self, positions: torch.Tensor) -> torch.Tensor:
        return self._rope.index_select(0, positions).unsqueeze(2)

    def _cache_rows(self, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        starts = slots * (self.config.num_kv_heads * self.length) + positions
        return (starts[:, None] + self._kv_heads).view(-1)

    def _mask(self, positions: torch.Tensor, kv_length: int) -> torch.Tensor:
        """[N, kv_length]: a token sees the keys up to its own position."""
        return torch.where(self._key_positions[:kv_length] <= positions[:, None], self._seen, self._hidden)
