"""AdamW with a learning rate by step, a gradient clip, and float32 master weights for models in lower precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from services.common.config.optimizer import OptimizerConfig
from services.trainer.backends.torch.sharding import local
from services.trainer.ranks.group import RankGroup

MASTER, STEP = "master", "step"
# As in torch.nn.utils.clip_grad_norm_.
_NORM_EPS = 1e-6


class Optimizer:
    """Steps the parameters of a model. Not thread-safe.

    Parameters that are not float32 get a float32 master copy, which takes the step and is rounded back: at the
    learning rates of reinforcement learning an update would otherwise vanish in bfloat16's 8 bits. Gradients then
    accumulate in the master copy: each goes there, and is freed, as soon as the backward pass has it. One-dimensional
    parameters (norms, biases) take no weight decay.

    Sharded parameters are DTensors, and so is their state: each rank steps its part.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.nn.Parameter]],
        config: OptimizerConfig,
        schedule: Callable[[int], float],
        group: RankGroup,
        *,
        are_masters: bool = False,
    ) -> None:
        """`schedule` gives the learning rate of a step from the number of those before it.

        `are_masters`: the parameters are the float32 master weights of a model that computes in lower precision.
        """
        self._parameters = dict(parameters)
        self._masters = {name: _master(parameter) for name, parameter in self._parameters.items()}
        self._config = config
        self._schedule = schedule
        self._group = group
        self._are_masters = are_masters
        for name, parameter in self._parameters.items():
            if (master := self._masters[name]) is not parameter:
                parameter.register_post_accumulate_grad_hook(partial(_into_master, master))
        self.steps = 0
        """Optimizer steps taken."""
        decayed = [master for master in self._masters.values() if master.ndim > 1]
        plain = [master for master in self._masters.values() if master.ndim <= 1]
        self._adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )

    @property
    def lr(self) -> float:
        """Of the next step."""
        return self._schedule(self.steps)

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def clip(self) -> float:
        """Scales the gradient to a norm of at most `clip_grad`, unless that is 0.

        Returns its norm before, over all ranks: perhaps not finite.
        """
        gradients = [local(master.grad) for master in self._masters.values() if master.grad is not None]
        norms = self._group.all_gather(torch.nn.utils.get_total_norm(gradients).item())
        norm = math.sqrt(sum(each * each for each in norms)) if len(norms) > 1 else norms[0]
        if self._config.clip_grad and norm > self._config.clip_grad:
            torch._foreach_mul_(gradients, self._config.clip_grad / (norm + _NORM_EPS))
        return norm

    def finish(self, loss: float) -> tuple[float, bool]:
        """Clips, takes the step if `loss` and the gradient's norm are finite, and drops the gradient: that norm, and
        whether the step was taken. All ranks.
        """
        norm = self.clip()
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.step()
        self.zero_grad()
        return norm, finite

    def step(self) -> None:
        """Takes one step along the accumulated gradient."""
        for group in self._adamw.param_groups:
            group["lr"] = self.lr
        self._adamw.step()
        self.steps += 1
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if self._masters[name] is not parameter:
                    parameter.copy_(self._masters[name])

    def tensors(self) -> Iterator[torch.Tensor]:
        """What it holds besides the model's parameters: master copies and state."""
        own = {id(parameter) for parameter in self._parameters.values()}
        yield from (master for master in self._masters.values() if id(master) not in own)
        for state in self._adamw.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything but `steps`, by ``<kind>/<parameter name>``. The tensors are the live ones."""
        tensors: dict[str, torch.Tensor] = {}
        for name, master in self._masters.items():
            for kind, value in self._adamw.state.get(master, {}).items():
                tensors[f"{kind}/{name}"] = value
            if self._are_masters or master is not self._parameters[name]:
                tensors[f"{MASTER}/{name}"] = master.detach()
        return tensors

    def restored(self, names: Iterable[str], steps: int) -> Iterator[tuple[str, torch.Tensor]]:
        """For each of the names that `state_dict` gave, the tensor to be set. Raises KeyError for a parameter that this
        model does not have.
        """
        self.steps = steps
        self._adamw.state.clear()
        for key in names:
            kind, _, name = key.partition("/")
            master = self._masters[name]
            if kind == MASTER:
                yield key, master
            else:
                # The fused kernel wants the step counter beside the parameter, too.
                scalar = kind == STEP
                value = torch.zeros((), device=local(master).device) if scalar else torch.zeros_like(master.detach())
                self._adamw.state[master][kind] = value
                yield key, value


def _into_master(master: torch.nn.Parameter, parameter: torch.nn.Parameter) -> None:
    if parameter.grad is not None:
        # In place, the sum takes the gradient as it is, exactly.
        master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
        parameter.grad = None


def _master(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    if parameter.dtype == torch.float32:
        return parameter
    return torch.nn.Parameter(parameter.detach().float())
