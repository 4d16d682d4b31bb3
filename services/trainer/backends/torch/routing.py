"""How evenly the routers of a mixture of experts spread the tokens of each sequence, and a loss for it.

The load-balancing loss of Switch Transformers (arXiv:2101.03961, eq. 4 to 6) is a product of two means over tokens, so
that over a micro-batch it would depend on what is packed together. Here it is of each sequence by itself, as in
DeepSeek-V3 (arXiv:2412.19437, eq. 17 to 20): of one of T tokens, in a layer of E experts of which a token has K,

    f_i = E / (K T) × how many of its tokens have expert i,   P_i = mean over its tokens of p_i,   Σ_i f_i P_i,

with p the softmax over all experts, and f without gradient. It is 1 where tokens are spread evenly, and added up over
layers. A token of a prompt that several sequences share counts in each (I10).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from services.trainer.backends.torch.attention import PackedLayout
from services.trainer.backends.torch.context import with_those_of_all
from services.trainer.ranks.group import RankGroup

# Models whose routers take the first few of a softmax over all experts: of others, logits do not say what was chosen.
_SOFTMAX = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


class Routers(NamedTuple):
    """What has to be known of a model's routers, which are all alike."""

    experts: int
    per_token: int

    @classmethod
    def of(cls, model: Any) -> Routers | None:
        """None for a dense model, and for one whose routers choose in another way."""
        config = model.config
        if config.model_type not in _SOFTMAX:
            return None
        # Which of the names a configuration has depends on the family and on transformers' version.
        return cls(getattr(config, "num_local_experts", None) or config.num_experts, config.num_experts_per_tok)


class Routing(NamedTuple):
    """What routers did with each of S sequences of a row, in L layers."""

    tokens: torch.Tensor
    """float32 [L, S, experts]: how many of its tokens each expert had. Without gradient."""
    probabilities: torch.Tensor
    """float32 [L, S, experts]: of its tokens, added up; with gradient, or empty [0] where nobody wants them."""

    def balance(self) -> torch.Tensor:
        """float32 [S]: the loss of each sequence."""
        shares = self.tokens / self.tokens.sum(dim=2, keepdim=True)
        # All probabilities of a token add up to 1.
        means = self.probabilities / self.probabilities.detach().sum(dim=2, keepdim=True)
        return self.tokens.shape[2] * (shares * means).sum(dim=(0, 2))


def routing(logits: Sequence[torch.Tensor], layout: PackedLayout, routers: Routers, *, wanted: bool) -> Routing:
    """Of the router `logits` of each layer, [T, experts], for the rank's own tokens of a row. `wanted`: probabilities
    too.
    """
    token, sequence, count = _members(layout)
    cells = (sequence * routers.experts).unsqueeze(1)
    one = logits[0].new_ones((), dtype=torch.float32).expand(len(token) * routers.per_token)
    tokens, probabilities = [], []
    for layer in logits:
        with torch.set_grad_enabled(wanted and torch.is_grad_enabled()):
            chances = layer.softmax(dim=-1, dtype=torch.float32)
        chosen = chances.detach().topk(routers.per_token, dim=-1).indices
        places = (cells + chosen.index_select(0, token)).flatten()
        tokens.append(one.new_zeros(count * routers.experts).index_add_(0, places, one))
        if wanted:
            sums = chances.new_zeros(count, routers.experts)
            probabilities.append(sums.index_add(0, sequence, chances.index_select(0, token)))
    shape = (len(logits), count, routers.experts)
    return Routing(torch.stack(tokens).view(shape), torch.stack(probabilities) if wanted else one.new_empty(0))


def routing_of_all(own: Routing, layout: PackedLayout) -> Routing:
    """The same of all tokens of a row that ranks share: equal on each of them, with the gradient of its own part."""
    if layout.context is None:
        return own
    group = layout.context.group
    return Routing(
        *(with_those_of_all(part.unsqueeze(0), group, summed=False).sum(dim=0) if len(part) else part for part in own)
    )


def expert_load_max(loads: Sequence[torch.Tensor], group: RankGroup) -> float:
    """The greatest share of tokens that an expert has, times the experts, mean over layers: 1 where all have as many.

    `loads`, [L, experts] each, are the tokens of each expert in the micro-batches of this rank. It is over those of all
    ranks, which all call it; not all of them may have none.
    """
    own = torch.stack(list(loads)).double().sum(dim=0).cpu().numpy() if loads else None
    tokens = np.sum([part for part in group.of_parts(group.all_gather(own)) if part is not None], axis=0)
    return float((tokens.max(axis=1) / tokens.mean(axis=1)).mean())


def _members(layout: PackedLayout) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Which of the rank's tokens is in which sequence, int64 [M] each, and how many sequences there are."""
    if layout.context is not None:
        return layout.context.member_tokens, layout.context.member_sequences, layout.context.sequences
    varlen = layout.varlen
    lengths = varlen.starts.diff().long()
    count = len(lengths)
    sequences = torch.repeat_interleave(torch.arange(count, device=lengths.device), lengths)
    return (
        (torch.arange(len(sequences), device=lengths.device) if varlen.order is None else varlen.order),
        sequences,
        count,
    )
