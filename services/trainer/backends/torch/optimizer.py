"""AdamW with a warm-up, a gradient clip, and float32 master weights for models in lower precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from services.common.config.models import OptimizerConfig

MASTER = "master"


class Optimizer:
    """Steps the parameters of a model. Not thread-safe.

    Parameters that are not float32 get a float32 master copy, which takes the step and is rounded back: at the
    learning rates of reinforcement learning an update would otherwise vanish in bfloat16's 8 bits. Gradients then
    accumulate in the master copy. One-dimensional parameters (norms, biases) take no weight decay.
    """

    def __init__(self, parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimizerConfig) -> None:
        self._parameters = dict(parameters)
        self._masters = {name: _master(parameter) for name, parameter in self._parameters.items()}
        self._config = config
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
        """Of the next step: rises linearly over `warmup_steps`, then constant."""
        return self._config.lr * min(1.0, (self.steps + 1) / max(self._config.warmup_steps, 1))

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def accumulate(self) -> None:
        """Moves the gradients of one micro-batch into the master copies. Nothing to do where there are none."""
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            if master is parameter or parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    def clip(self) -> float:
        """Scales the gradient to a norm of at most `clip_grad`. Returns its norm before: perhaps not finite."""
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch.nn.utils.clip_grads_with_norm_(self._masters.values(), self._config.clip_grad, norm)
        return norm.item()

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

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything but `steps`, by ``<kind>/<parameter name>``. The tensors are the live ones."""
        tensors: dict[str, torch.Tensor] = {}
        for name, master in self._masters.items():
            for kind, value in self._adamw.state.get(master, {}).items():
                tensors[f"{kind}/{name}"] = value
            if master is not self._parameters[name]:
                tensors[f"{MASTER}/{name}"] = master.detach()
        return tensors

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor], steps: int) -> None:
        """Restores what `state_dict` gave. Raises KeyError for a parameter that this model does not have."""
        self.steps = steps
        self._adamw.state.clear()
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            master = self._masters[name]
            if kind == MASTER:
                with torch.no_grad():
                    master.copy_(value)
            else:
                # The fused kernel wants the step counter beside the parameter, too.
                self._adamw.state[master][kind] = value.to(master.device)


def _master(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    if parameter.dtype == torch.float32:
        return parameter
    return torch.nn.Parameter(parameter.detach().float())
