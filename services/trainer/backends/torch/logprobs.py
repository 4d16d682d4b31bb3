"""Log-probabilities of the trained tokens of a packed row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from services.trainer.backends.torch.attention import PackedLayout, Varlen
from services.trainer.backends.torch.context import Context, tokens_of_all
from services.trainer.backends.torch.linear_logprobs import linear_logprobs
from services.trainer.backends.torch.precision import HALF
from services.trainer.backends.torch.routing import Routers, Routing, routing, routing_of_all
from services.trainer.backends.torch.sharding import Root
from services.trainer.batch.context import ContextShare, context_share
from services.trainer.batch.packing import PackedBatch
from services.trainer.ranks.group import RankGroup

# Logits held at a time, in float32: 64 MiB on a CPU (341 tokens of a vocabulary of 49,152), and 1 GiB on a GPU (1,766
# tokens of one of 151,936), where a product of fewer rows would wait for memory.
MAX_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28}


class DeviceBatch(NamedTuple):
    """A PackedBatch as tensors on the model's device. Shapes and dtypes as there."""

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: PackedLayout
    predict: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    rollout_logprobs: torch.Tensor
    temperatures: torch.Tensor
    fresh: torch.Tensor
    sequences: torch.Tensor
    sequence_count: int
    advantages: torch.Tensor
    old_logprobs: torch.Tensor | None
    ref_logprobs: torch.Tensor | None
    teacher_logprobs: torch.Tensor | None
    policy_factors: torch.Tensor | None
    old_values: torch.Tensor | None
    returns: torch.Tensor | None


class TokenLogprobs(NamedTuple):
    """Per trained token, float32[n]."""

    logprobs: torch.Tensor
    """Of the token, at the temperature it was sampled with."""
    entropy: torch.Tensor
    """Of the distribution it was drawn from, in nats. With gradient only where that is asked for."""


class RoutedLogprobs(NamedTuple):
    """The same, and what the routers did with the row: the parts of a `Routing`."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    tokens: torch.Tensor
    probabilities: torch.Tensor


def to_device(batch: PackedBatch, device: torch.device, group: RankGroup | None = None) -> DeviceBatch:
    """Of a `group` whose ranks share rows, the part of this one: of what is fed, and of what is predicted from it."""

    def move(array: object) -> torch.Tensor:
        tensor = torch.as_tensor(array)
        # Only what is pinned does not wait for all that the GPU has been given to do.
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

    def move_any(array: object | None) -> torch.Tensor | None:
        return None if array is None else move(array)

    def starts(lengths: NDArray[np.int32]) -> torch.Tensor:
        return move(np.cumsum([0, *lengths], dtype=np.int32))

    row: PackedBatch | ContextShare = batch
    if group is not None and group.context is not None:
        row = share = context_share(batch, group.context_size, group.context_rank)
        varlen = Varlen(
            order=move(share.queries),
            places=move(share.places),
            starts=starts(share.query_lengths),
            longest=int(share.query_lengths.max()),
            keys=move(share.keys),
            key_starts=starts(share.key_lengths),
            longest_keys=int(share.key_lengths.max()),
        )
        context = Context(
            group.context,
            move(share.order),
            move(share.member_tokens),
            move(share.member_sequences),
            len(batch.lengths),
        )
        layout = PackedLayout(varlen, context=context)
    else:
        shared = len(batch.order) > len(batch.token_ids)
        order, bounds, longest = move(batch.order) if shared else None, starts(batch.lengths), int(batch.lengths.max())
        places = move(batch.places) if shared else None
        varlen = Varlen(order, places, bounds, longest, order, bounds, longest)
        layout = PackedLayout(varlen, tuple(map(move, batch.blocks)), move(batch.slots))
    return DeviceBatch(
        token_ids=move(row.token_ids),
        position_ids=move(row.position_ids),
        layout=layout,
        predict=move(row.predict),
        targets=move(row.targets),
        weights=move(batch.weights),
        rollout_logprobs=move(batch.rollout_logprobs),
        temperatures=move(row.temperatures),
        fresh=move(batch.fresh),
        sequences=move(batch.sequences),
        sequence_count=batch.sequence_count,
        advantages=move(batch.advantages),
        old_logprobs=move_any(batch.old_logprobs),
        ref_logprobs=move_any(batch.ref_logprobs),
        teacher_logprobs=move_any(batch.teacher_logprobs),
        policy_factors=move_any(batch.policy_factors),
        old_values=move_any(batch.old_values),
        returns=move_any(batch.returns),
    )


def predicting_states(model: torch.nn.Module, batch: DeviceBatch) -> torch.Tensor:
    """Runs the model on the packed row: [n, width], its last hidden states where a trained token is predicted."""
    return _wanted(_run(model, batch), batch)


def _run(model: torch.nn.Module, batch: DeviceBatch, **options: bool) -> Any:
    return model.base_model(
        input_ids=batch.token_ids.unsqueeze(0),
        position_ids=batch.position_ids.unsqueeze(0),
        use_cache=False,
        packed_layout=batch.layout,
        **options,
    )


def _wanted(output: Any, batch: DeviceBatch) -> torch.Tensor:
    wanted: torch.Tensor = output.last_hidden_state[0].index_select(0, batch.predict)
    return wanted


def token_logprobs(
    model: torch.nn.Module, batch: DeviceBatch, max_logits: int | None = None, *, entropy_gradient: bool = False
) -> TokenLogprobs:
    """Runs the model on the packed row and scores the trained tokens.

    The softmax is in float32. Logits exist only where a trained token is predicted, and at most `max_logits` of them
    (default: `MAX_LOGITS`) at a time: beyond that they are computed in chunks, and once more for the gradient.
    """
    return _scored(model, predicting_states(model, batch), batch, max_logits, entropy_gradient)


def routed_logprobs(
    model: torch.nn.Module,
    batch: DeviceBatch,
    routers: Routers,
    *,
    probabilities: bool,
    entropy_gradient: bool = False,
) -> RoutedLogprobs:
    """`token_logprobs` of a mixture of experts, and what its routers did; with `probabilities` these too."""
    output = _run(model, batch, output_router_logits=True)
    scored = _scored(model, _wanted(output, batch), batch, None, entropy_gradient)
    return RoutedLogprobs(*scored, *routing(output.router_logits, batch.layout, routers, wanted=probabilities))


def _scored(
    model: Any, wanted: torch.Tensor, batch: DeviceBatch, max_logits: int | None, entropy_gradient: bool
) -> TokenLogprobs:
    head = model.get_output_embeddings()
    chunk = max(1, (max_logits or MAX_LOGITS[wanted.device.type]) // head.weight.shape[0])
    if len(wanted) <= chunk and wanted.dtype not in HALF:
        return TokenLogprobs(*_score(head, wanted, batch.targets, batch.temperatures, entropy_gradient))
    logprobs, entropy = linear_logprobs(wanted, head.weight, head.bias, batch.targets, batch.temperatures, chunk)
    return TokenLogprobs(logprobs, entropy if entropy_gradient else entropy.detach())


def all_logprobs(root: Root, batch: DeviceBatch, *, entropy_gradient: bool = False) -> TokenLogprobs:
    """`token_logprobs` of all the row's trained tokens, also where ranks share it."""
    return _of_all(root.run(token_logprobs, batch, entropy_gradient=entropy_gradient), batch)


def all_routed(
    root: Root, batch: DeviceBatch, routers: Routers, *, probabilities: bool, entropy_gradient: bool = False
) -> tuple[TokenLogprobs, Routing]:
    """The same of `routed_logprobs`."""
    logprobs, entropy, *own = root.run(
        routed_logprobs, batch, routers, probabilities=probabilities, entropy_gradient=entropy_gradient
    )
    return _of_all(TokenLogprobs(logprobs, entropy), batch), routing_of_all(Routing(*own), batch.layout)


def _of_all(own: TokenLogprobs, batch: DeviceBatch) -> TokenLogprobs:
    context = batch.layout.context
    if context is None or not len(context.order):
        return own
    return TokenLogprobs(*(tokens_of_all(values, context) for values in own))


def score(
    root: Root, batches: Sequence[PackedBatch], device: torch.device, group: RankGroup
) -> list[NDArray[np.float32]]:
    """Log-probabilities of the trained tokens of each micro-batch, without gradient, on the host."""
    with torch.no_grad():
        scored = [all_logprobs(root, to_device(batch, device, group)).logprobs for batch in batches]
        return [logprobs.cpu().numpy() for logprobs in scored]


def _score(
    head: torch.nn.Module,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    temperatures: torch.Tensor,
    entropy_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    distribution = torch.log_softmax(head(hidden).float() / temperatures.unsqueeze(1), dim=-1)
    logprobs = distribution.gather(1, targets.unsqueeze(1)).squeeze(1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -(distribution.exp() * distribution).sum(dim=1)
    return logprobs, entropy
