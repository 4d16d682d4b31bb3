"""The critic: a second model, trained beside the policy, that says what each state is worth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from services.common.config import Config
from services.common.errors import ConfigError
from services.trainer.algorithms.value_loss import value_loss
from services.trainer.backends.torch.logprobs import to_device
from services.trainer.backends.torch.model import load_critic, start_directory
from services.trainer.backends.torch.offload import Offload
from services.trainer.backends.torch.optimizer import STEP, Optimizer
from services.trainer.backends.torch.sharding import Placement, local, restore, unique_tensors
from services.trainer.backends.torch.values import HEAD, all_values
from services.trainer.batch.packing import PackedBatch
from services.trainer.ranks.group import RankGroup
from services.trainer.schedule import critic_learning_rate
from services.trainer.shards import Rows

FIELD = "model.critic_checkpoint"


@dataclass
class CriticResult:
    """What one optimizer step of the critic did. Sums are over trained tokens."""

    loss: float = 0.0
    grad_norm: float = 0.0
    lr: float = 0.0
    applied: bool = False
    """False when the loss or the gradient was not finite: the weights are as before."""
    tokens: int = 0
    clipped: float = 0.0
    values: float = 0.0
    """Of the start of the batch, with which the advantages were made."""
    returns: float = 0.0
    squared_returns: float = 0.0
    errors: float = 0.0
    """Returns minus values."""
    squared_errors: float = 0.0
    offenders: list[int] = field(default_factory=list)
    """Rows of samples whose tokens gave a loss that is not finite."""


class Critic:
    """The body of a causal language model under a scalar head, with its optimizer. Ranks share it as they do the
    policy: what a method says of all ranks needs all of them to call it, in the same order.
    """

    def __init__(self, config: Config, vocab_size: int, placement: Placement, group: RankGroup) -> None:
        """Raises ConfigError when it does not load, or has another vocabulary than the policy."""
        directory, key = start_directory(config)
        if config.model.critic_checkpoint is not None:
            directory, key = config.model.critic_checkpoint, FIELD
        self._group = group
        self._device = placement.device
        self._dtype = getattr(torch, config.model.dtype)
        self._sharded = placement.mesh is not None
        self._reduce_each = config.trainer.reduce_each_micro_batch
        self._value_clip = config.trainer.critic.value_clip
        self._root = load_critic(directory, config.model.dtype, placement, key)
        own = int(self._root.model.get_input_embeddings().weight.shape[0])
        if own != vocab_size:
            raise ConfigError(f"{directory} has {own} tokens, and the trained model {vocab_size}", field=key)
        self._tensors = unique_tensors(self._root.model)
        self._optimizer = Optimizer(
            self._root.model.named_parameters(),
            config.trainer.critic.optimizer(config.trainer.optimizer),
            critic_learning_rate(config),
            group,
            are_masters=self._sharded and self._dtype != torch.float32,
        )
        self.offload = Offload(self._root.model, self._optimizer.tensors, self._device)

    @property
    def optimizer_steps(self) -> int:
        return self._optimizer.steps

    def values(self, micro_batches: Sequence[PackedBatch]) -> list[NDArray[np.float32]]:
        """Of the state before each trained token, float32[n] for each micro-batch of this rank. All ranks."""
        with torch.no_grad():
            found = [all_values(self._root, to_device(each, self._device, self._group)) for each in micro_batches]
            return [values.cpu().numpy() for values in found]

    def train(self, micro_batches: Sequence[PackedBatch]) -> CriticResult:
        """As `TorchBackend.train`. The micro-batches have `old_values` and `returns`."""
        result = self.accumulate(micro_batches)
        if not micro_batches:
            result.applied = True
            return result
        result.grad_norm, result.applied = self._optimizer.finish(result.loss)
        return result

    def accumulate(self, micro_batches: Sequence[PackedBatch]) -> CriticResult:
        """As `TorchBackend.accumulate`."""
        result = CriticResult()
        self._optimizer.zero_grad()
        for number, micro_batch in enumerate(micro_batches, 1):
            self._root.reduce_gradients(self._reduce_each or number == len(micro_batches))
            self._accumulate(micro_batch, result)
        total = _total(self._group.of_parts(self._group.all_gather(asdict(result))))
        total.lr = self._optimizer.lr
        return total

    def _accumulate(self, micro_batch: PackedBatch, result: CriticResult) -> None:
        batch = to_device(micro_batch, self._device, self._group)
        values = all_values(self._root, batch)
        if not len(micro_batch.targets):
            # Nothing to train for this rank; the others wait for it to take part.
            values.sum().backward()
            return
        assert batch.old_values is not None
        assert batch.returns is not None
        losses = value_loss(values, batch.old_values, batch.returns, value_clip=self._value_clip)
        loss = (losses.loss * batch.weights).sum()
        loss.backward()
        read = torch.stack([loss.detach(), losses.clipped.sum()]).tolist()
        result.loss += read[0]
        result.clipped += read[1]
        _add(result, micro_batch)
        if not math.isfinite(result.loss):
            bad = (~torch.isfinite(losses.loss.detach())).cpu().numpy()
            result.offenders += np.unique(micro_batch.sample_rows[bad]).tolist()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor, torch.dtype]]:
        """What a checkpoint has of the model: the live tensors by name, and the dtype of each there. Master weights are
        in the model's, but for the head, which is float32.
        """
        for name, tensor in self._tensors.items():
            master = self._sharded and tensor.requires_grad and not name.startswith(HEAD)
            yield name, tensor, self._dtype if master else tensor.dtype

    def optimizer_tensors(self) -> Iterator[tuple[str, torch.Tensor, torch.dtype]]:
        """The same of the optimizer's state."""
        for name, tensor in self._optimizer.state_dict().items():
            yield name, tensor, tensor.dtype

    def load(self, weights: Mapping[str, Rows], optimizer: Mapping[str, Rows]) -> None:
        """Restores what `tensors` and `optimizer_tensors` gave on however many ranks. Each rank reads its own part.

        Raises ConfigError when they are of another model.
        """
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        if shapes != {name: tensor.shape for name, tensor in self._tensors.items()}:
            raise ConfigError("the run's checkpoints are of another critic than this one", field=FIELD)
        steps = 0
        with torch.no_grad():
            for name, stored in weights.items():
                restore(self._tensors[name], stored)
            for name, tensor in self._optimizer.restored(optimizer, 0):
                restore(tensor, optimizer[name])
                if name.startswith(f"{STEP}/"):
                    steps = max(steps, int(local(tensor).item()))
        self._optimizer.steps = steps


def _add(result: CriticResult, micro_batch: PackedBatch) -> None:
    """What is known of a micro-batch before it is trained, in float64."""
    assert micro_batch.old_values is not None
    assert micro_batch.returns is not None
    values, returns = (each.astype(np.float64) for each in (micro_batch.old_values, micro_batch.returns))
    errors = returns - values
    result.tokens += len(values)
    result.values += float(values.sum())
    result.returns += float(returns.sum())
    result.squared_returns += float((returns**2).sum())
    result.errors += float(errors.sum())
    result.squared_errors += float((errors**2).sum())


def _total(parts: Sequence[Mapping[str, object]]) -> CriticResult:
    """Sums of the results of all ranks."""
    total = CriticResult()
    for part in parts:
        for name, value in part.items():
            if name != "applied":
                setattr(total, name, getattr(total, name) + value)
    return total
