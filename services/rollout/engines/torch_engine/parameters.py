"""The model's weights: fused for speed, addressed by their Hugging Face names."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch

from services.common.errors import InvalidArgumentError
from services.common.fp8 import dequantise
from services.common.model_files import SCALE_SUFFIX, scale_shape
from services.rollout.engines.torch_engine.decoder_config import DecoderConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""That a model computes in."""
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer. Linear weights are [out, in]."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    """Rows of q, k and v one after the other."""
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None
    """[heads + kv_heads, head_dim]: the q norm repeated for every query head, then the k norm."""
    o: torch.Tensor
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    router: torch.Tensor | None
    """[experts, hidden]; None in a dense layer."""
    gate_up: torch.Tensor
    """With experts, [experts, 2 * intermediate, hidden]."""
    down: torch.Tensor
    """With experts, [experts, hidden, intermediate]."""


class _FeedForward(TypedDict):
    router: torch.Tensor | None
    gate_up: torch.Tensor
    down: torch.Tensor


class Parameters:
    """All weights of one model. `load` writes through to the fused tensors that the forward pass uses."""

    def __init__(
        self,
        config: DecoderConfig,
        dtype: torch.dtype,
        device: torch.device,
        fp8: frozenset[str] = frozenset(),
    ) -> None:
        """`fp8`: weights that are stored, and come, in fp8 with their scales. It computes with them in `dtype`."""
        self._config, self._dtype, self._device = config, dtype, device
        self._views: dict[str, torch.Tensor] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._ignored: dict[str, tuple[int, ...]] = {}
        self.embedding = self._named("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.layers = [self._layer(index) for index in range(config.num_layers)]
        self.norm = self._named("model.norm.weight", config.hidden_size)
        if config.tie_word_embeddings:
            self.head = self.embedding
            # Many exports write the tied matrix twice.
            self._ignored["lm_head.weight"] = tuple(self.embedding.shape)
        else:
            self.head = self._named("lm_head.weight", config.vocab_size, config.hidden_size)
        self.fp8 = fp8
        self._stored: dict[str, torch.Tensor] = {}
        """Values and scales of what is stored in fp8."""
        for name in fp8:
            self._store_fp8(name)

    @property
    def names(self) -> frozenset[str]:
        """Every tensor that a complete load has to bring."""
        return frozenset(self._views) | frozenset(self._stored)

    def tensors(self) -> Iterable[torch.Tensor]:
        """Views of everything it holds."""
        return (*self._views.values(), *self._stored.values())

    def check(self, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> None:
        """Raises InvalidArgumentError for a tensor that is unknown, listed twice, or of another shape."""
        seen: set[str] = set()
        for name, shape in zip(names, shapes, strict=True):
            known = self._shapes.get(name) or self._ignored.get(name)
            if known is None:
                raise InvalidArgumentError("is not a tensor of this model", field=name)
            if tuple(shape) != known:
                raise InvalidArgumentError(f"has shape {list(shape)}, the model's is {list(known)}", field=name)
            if name in seen:
                raise InvalidArgumentError("is listed twice", field=name)
            seen.add(name)

    def check_complete(self, names: Iterable[str]) -> None:
        """Raises InvalidArgumentError when a tensor of the model is not among `names`."""
        missing = sorted(self.names.difference(names))
        if missing:
            raise InvalidArgumentError(f"tensors are missing: {_shorten(missing)}", field="weights")

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies tensors in, converting to the model's dtype. `check` must have passed."""
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name not in self._ignored:
                    self._held(name).copy_(tensor)
            for name in self.fp8:
                if name in tensors or name + SCALE_SUFFIX in tensors:
                    self._views[name].copy_(
                        dequantise(self._stored[name], self._stored[name + SCALE_SUFFIX], self._dtype)
                    )

    def checksums(self) -> dict[str, str]:
        """SHA-256 of each tensor's bytes, in fp8 or in the model's dtype, by Hugging Face name."""
        sums = {}
        for name, shape in self._shapes.items():
            # The first rows are the tensor, also where a norm is repeated for every head.
            # A copy: a storage that numpy has seen could not be given up any more.
            tensor = self._held(name).reshape(-1)[: math.prod(shape)].clone()
            sums[name] = hashlib.sha256(tensor.cpu().view(torch.uint8).numpy()).hexdigest()
        return sums

    def _held(self, name: str) -> torch.Tensor:
        """As it is stored, and comes."""
        return self._stored[name] if name in self._stored else self._views[name]

    def _layer(self, index: int) -> Layer:
        c, prefix = self._config, f"model.layers.{index}."
        q_rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        attention = prefix + "self_attn."
        feed_forward = self._experts if c.experts is not None and index in c.experts.layers else self._dense
        parts = {f"{attention}q_proj": q_rows, f"{attention}k_proj": kv_rows, f"{attention}v_proj": kv_rows}
        return Layer(
            input_norm=self._named(prefix + "input_layernorm.weight", c.hidden_size),
            qkv=self._fused({f"{name}.weight": rows for name, rows in parts.items()}, c.hidden_size),
            qkv_bias=self._fused({f"{name}.bias": rows for name, rows in parts.items()}) if c.qkv_bias else None,
            qk_norm=self._qk_norm(attention) if c.qk_norm else None,
            o=self._named(attention + "o_proj.weight", c.hidden_size, q_rows),
            o_bias=self._named(attention + "o_proj.bias", c.hidden_size) if c.o_bias else None,
            post_norm=self._named(prefix + "post_attention_layernorm.weight", c.hidden_size),
            **feed_forward(prefix + "mlp."),
        )

    def _dense(self, prefix: str) -> _FeedForward:
        hidden, intermediate = self._config.hidden_size, self._config.intermediate_size
        gate_up, down = self._empty(2 * intermediate, hidden), self._empty(hidden, intermediate)
        self._projections(prefix, gate_up, down)
        return {"router": None, "gate_up": gate_up, "down": down}

    def _experts(self, prefix: str) -> _FeedForward:
        c = self._config.experts
        assert c is not None
        hidden = self._config.hidden_size
        router = self._named(prefix + "gate.weight", c.count, hidden)
        gate_up = self._empty(c.count, 2 * c.intermediate_size, hidden)
        down = self._empty(c.count, hidden, c.intermediate_size)
        for number in range(c.count):
            self._projections(f"{prefix}experts.{number}.", gate_up[number], down[number])
        return {"router": router, "gate_up": gate_up, "down": down}

    def _projections(self, prefix: str, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """Of one gated feed-forward network."""
        for name, view in zip(("gate_proj", "up_proj"), gate_up.chunk(2), strict=True):
            self._register(f"{prefix}{name}.weight", view, tuple(view.shape))
        self._register(prefix + "down_proj.weight", down, tuple(down.shape))

    def _qk_norm(self, prefix: str) -> torch.Tensor:
        c = self._config
        table = self._empty(c.num_heads + c.num_kv_heads, c.head_dim)
        # `load` copies by broadcast: each of these rows gets the one vector of its name.
        self._register(prefix + "q_norm.weight", table[: c.num_heads], (c.head_dim,))
        self._register(prefix + "k_norm.weight", table[c.num_heads :], (c.head_dim,))
        return table

    def _named(self, name: str, *shape: int) -> torch.Tensor:
        return self._register(name, self._empty(*shape), shape)

    def _fused(self, parts: Mapping[str, int], *tail: int) -> torch.Tensor:
        whole = self._empty(sum(parts.values()), *tail)
        for (name, rows), view in zip(parts.items(), whole.split(list(parts.values())), strict=True):
            self._register(name, view, (rows, *tail))
        return whole

    def _register(self, name: str, view: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        self._views[name], self._shapes[name] = view, shape
        return view

    def _store_fp8(self, name: str) -> None:
        """Raises InvalidArgumentError for what is no weight of the model."""
        shape = self._shapes.get(name, ())
        if len(shape) != 2:
            raise InvalidArgumentError("is stored in fp8, and is not a weight of this model", field=name)
        scales = name + SCALE_SUFFIX
        self._stored[name] = torch.zeros(shape, dtype=FP8, device=self._device)
        self._shapes[scales] = scale_shape(shape)
        self._stored[scales] = torch.zeros(self._shapes[scales], device=self._device)

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self._dtype, device=self._device)


def _shorten(names: Sequence[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
