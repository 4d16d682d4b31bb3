"""A model over the ranks of its trainer: FSDP2 for decoder layers and the rest, and what is needed around it.

Parameters of a sharded model are float32, whatever dtype it computes in: they are the master weights, which each layer
gathers in the model's dtype. Gradients are reduced in float32 and added up, never divided: the loss is normalised over
the whole optimizer step already (I10).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from services.common.errors import ConfigError
from services.trainer.backends.torch.precision import widen_residuals
from services.trainer.shards import Rows


class Placement(NamedTuple):
    """Where a model goes."""

    device: torch.device
    """Where it computes."""
    mesh: DeviceMesh | None = None
    """The ranks over which it is sharded; None: it is whole, on `device`."""
    offload: bool = False
    """Of a sharded one: its shards, and the optimizer's state with them, are in the host's memory."""
    recompute: bool = False
    """Activations within a decoder layer are computed again for the gradient."""
    recompute_layers: int | None = None
    """Those of the first so many layers; None: of all."""
    compile: bool = False
    """Decoder layers by torch.compile, for any length of a packed row."""
    wide_residuals: bool = False
    """In half precision, what the layers add up is float32."""


class Root(torch.nn.Module):
    """A model as the thing that functions are run on: what a function computes with its parts counts as its forward
    pass, so that FSDP has the parameters together that belong to no layer (embedding, last norm, head).
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function(model, *args, **kwargs)``: a tensor, or a tuple of tensors."""
        result = function(self.model, *args, **kwargs)
        # FSDP hangs its hooks on what is returned, and a view may lose them.
        return type(result)(*(each.clone() for each in result)) if isinstance(result, tuple) else result.clone()

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The same, and without gradient no part of the model is left gathered."""
        result = self(function, *args, **kwargs)
        if isinstance(self, FSDPModule) and not torch.is_grad_enabled():
            self.reshard()
        return result

    def reduce_gradients(self, wanted: bool) -> None:
        """Whether the next backward pass ends with the gradient added up over the ranks. Else it stays on this one."""
        if isinstance(self, FSDPModule):
            self.set_requires_gradient_sync(wanted)


def place(
    model: torch.nn.Module,
    dtype: torch.dtype,
    placement: Placement,
    field: str,
    wide: Sequence[torch.nn.Module] = (),
) -> Root:
    """The model on its device, or sharded over the mesh, layer by layer: no rank's device ever holds all of it.

    What is trained becomes float32 when it is sharded; what is frozen stays as it is. The modules in `wide` compute in
    float32, whatever `dtype` is.

    Raises ConfigError, naming `field`, for an architecture that does not say what its layers are.
    """
    if placement.wide_residuals:
        widen_residuals(model, dtype)
    layers = _layers(model, field) if placement.mesh is not None or placement.recompute or placement.compile else []
    if placement.compile:
        for layer in layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)
    if placement.recompute:
        # Around the compiled forward pass, not within it: torch leaves a checkpoint out of what it compiles, and all
        # that the checkpoint calls with it.
        for layer in layers[: placement.recompute_layers]:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    root = Root(model)
    if placement.mesh is None:
        return root.to(placement.device)
    offload = CPUOffloadPolicy() if placement.offload else OffloadPolicy()
    for module in [*layers, *wide, root]:
        computes = torch.float32 if module in wide else dtype
        policy = MixedPrecisionPolicy(param_dtype=computes, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for parameter in module.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                parameter.data = parameter.data.float()
        fully_shard(module, mesh=placement.mesh, mp_policy=policy, offload_policy=offload)
        # A sum, on every backend: an average is the default, and gloo has no scaled sum.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return root


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part: the tensor itself when it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def unique_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers that are saved, each once, under its first name."""
    names: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if names.setdefault(id(tensor), name) == name}


def gathered(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """All of a tensor in `dtype`, on rank 0's `device`; None on the others. A whole one is given as it is.

    Every rank calls it for the same tensors in the same order.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    ranks, rows = dist.get_world_size(), -(-tensor.shape[0] // dist.get_world_size())
    own = tensor.to_local().detach()
    part = torch.zeros(rows, *tensor.shape[1:], dtype=dtype, device=device)
    part[: len(own)].copy_(own)
    if dist.get_rank():
        dist.gather(part, None, dst=0)
        return None
    whole = torch.empty(ranks * rows, *tensor.shape[1:], dtype=dtype, device=device)
    dist.gather(part, list(whole.chunk(ranks)), dst=0)
    return whole[: tensor.shape[0]]


def restore(tensor: torch.Tensor, stored: Rows) -> None:
    """Sets a tensor to what is stored. Of a sharded one, only this rank's rows are read."""
    if not isinstance(tensor, DTensor):
        tensor.copy_(stored[...])
        return
    own = tensor.to_local()
    if len(own):
        first = tensor.device_mesh.get_local_rank() * -(-tensor.shape[0] // tensor.device_mesh.size())
        own.copy_(stored[first : first + len(own)])


def _layers(model: Any, field: str) -> list[Any]:
    """The decoder layers, by what transformers says is never to be split."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ConfigError(f"{type(model).__name__} does not say what its layers are: it takes one rank", field=field)
    return layers
