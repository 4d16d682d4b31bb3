"""The ranks that share each packed row (context parallelism): what they bring together, and its gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Context(NamedTuple):
    """What a rank needs of a row of which it has a part (services/trainer/batch/context.py)."""

    group: Any
    """Their process group."""
    order: torch.Tensor
    """[n]: where each trained token of the row is among those of all ranks."""
    member_tokens: torch.Tensor
    """[M]: a token of the rank's, for each sequence that it is in."""
    member_sequences: torch.Tensor
    """[M]: that sequence, by its number in the row."""
    sequences: int
    """How many the row has."""


def with_those_of_all(rows: torch.Tensor, group: Any, *, summed: bool = True) -> torch.Tensor:
    """[ranks * L, ...] of each rank's [L, ...], rank after rank. Its gradient is the sum over the ranks' uses of it;
    not `summed`, that of this rank's own use, where each makes the same loss of the whole.
    """
    gathered: torch.Tensor = _all_gather(rows, group, summed)
    return gathered


def tokens_of_all(values: torch.Tensor, context: Context) -> torch.Tensor:
    """[n] of the row's tokens, of each rank's [m], the same on every rank.

    Each computes the same loss of them, so that the gradient of a rank's own is that of its own loss, and of no other.
    """
    return with_those_of_all(values, context.group, summed=False).index_select(0, context.order)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, group: Any, summed: bool) -> torch.Tensor:
        ctx.group, ctx.summed, ctx.length = group, summed, len(own)
        whole = own.new_empty(dist.get_world_size(group) * len(own), *own.shape[1:])
        dist.all_gather_into_tensor(whole, own.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        if not ctx.summed:
            start = dist.get_rank(ctx.group) * ctx.length
            return gradient[start : start + ctx.length], None, None
        own = gradient.new_empty(ctx.length, *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous(), group=ctx.group)
        return own, None, None


# What torch 2.11 compiles of it gives another gradient.
_all_gather = torch.compiler.disable(_AllGather.apply)
