"""The torch backend: one model on one device, or sharded over the ranks, trained one optimizer step at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from services.common.config import Config
from services.common.errors import ConfigError
from services.trainer.algorithms.objective import Tokens
from services.trainer.algorithms.user_loss import load_loss
from services.trainer.backends.torch.critic import Critic
from services.trainer.backends.torch.logprobs import (
    DeviceBatch,
    TokenLogprobs,
    all_logprobs,
    all_routed,
    score,
    to_device,
)
from services.trainer.backends.torch.lora import Adapters
from services.trainer.backends.torch.model import context_length, load_model, save_pretrained, start_directory
from services.trainer.backends.torch.offload import Offload
from services.trainer.backends.torch.optimizer import Optimizer
from services.trainer.backends.torch.reference import Reference
from services.trainer.backends.torch.results import MicroBatchFigures, StepResult, add, figures_of, total_of
from services.trainer.backends.torch.routing import Routers, Routing, expert_load_max
from services.trainer.backends.torch.sharding import Placement, gathered, local, restore, unique_tensors
from services.trainer.batch.flops import SequenceFlops, sequence_flops
from services.trainer.batch.packing import PackedBatch
from services.trainer.ranks import commands
from services.trainer.ranks.group import RankGroup
from services.trainer.schedule import learning_rate
from services.trainer.shards import Stored

MODEL, ADAPTER, OPTIMIZER, RNG = "model", "adapter", "optimizer", "rng"
CRITIC, CRITIC_OPTIMIZER = "critic", "critic_optimizer"
_HOST_RNG = "torch"

log = structlog.get_logger()


class TorchBackend:
    """A model with its optimizer. Everything runs on the calling thread.

    With several ranks each has one, and they compute together: what a method says of all ranks needs all of them to
    call it, in the same order. Rank 0 leads: there, `tensors` tells the others to call it too.
    """

    def __init__(self, config: Config, group: RankGroup | None = None) -> None:
        """Loads the model. Raises ConfigError when it cannot be trained, or there is no such device."""
        if config.trainer.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("this machine has no CUDA device", field="trainer.device")
        torch.set_num_threads(config.trainer.threads)
        torch.use_deterministic_algorithms(config.run.deterministic)
        torch.manual_seed(config.run.seed)
        self.group = group or RankGroup()
        self._device = torch.device(config.trainer.device)
        self._dtype = getattr(torch, config.model.dtype)
        self._algorithm = config.trainer.algorithm
        self._reduce_each = config.trainer.reduce_each_micro_batch
        placement = _placement(config, self.group, self._device)
        self._sharded = placement.mesh is not None
        directory, field = start_directory(config)
        self._root = load_model(directory, config.model.dtype, placement, field, lora=config.trainer.lora)
        self.model: Any = self._root.model
        self.flops: SequenceFlops | None = None
        """What balances micro-batches, where that is wanted."""
        if config.trainer.balance_data:
            self.flops = sequence_flops(self.model.config.get_text_config().to_dict())
        self._routers = Routers.of(self.model)
        if self._algorithm.router_aux_loss_coef and self._routers is None:
            reason = f"is for mixtures of experts that choose by a softmax, and not for {type(self.model).__name__}"
            raise ConfigError(reason, field="trainer.algorithm.router_aux_loss_coef")
        self._tensors = self._saved = unique_tensors(self.model)
        self._part, trained = MODEL, self.model.named_parameters()
        self.adapters: Adapters | None = None
        """What is trained, and saved, where the model is frozen."""
        if config.trainer.lora.rank:
            self.adapters = Adapters(self.model, config.trainer.lora, self._tensors, self._dtype)
            self._tensors, self._saved = self.adapters.base, self.adapters.tensors
            self._part, trained = ADAPTER, self._saved.items()
        self._masters = self._sharded and self._dtype != torch.float32
        settings, schedule = config.trainer.optimizer, learning_rate(config)
        self._optimizer = Optimizer(trained, settings, schedule, self.group, are_masters=self._masters)
        self._offload = Offload(self.model, self._optimizer.tensors, self._device)
        self._loss = load_loss(config)
        self._entropy_in_loss = bool(self._algorithm.entropy_coef) or self._algorithm.policy_loss == "custom"
        self._reference = self._teacher = None
        if self._algorithm.needs_reference:
            reference = config.model.ref_checkpoint or config.model.hf_checkpoint
            if self.adapters is None or reference.resolve() != directory.resolve():
                self._reference = self._frozen(reference, "model.ref_checkpoint", config, placement)
        if config.model.teacher_checkpoint is not None:
            teacher = config.model.teacher_checkpoint
            self._teacher = self._frozen(teacher, "model.teacher_checkpoint", config, placement)
        self.critic: Critic | None = None
        if self._algorithm.has_critic:
            self.critic = Critic(config, self.vocab_size, placement, self.group)

    def _frozen(self, directory: Path, field: str, config: Config, placement: Placement) -> Reference:
        return Reference(directory, field, config, self.vocab_size, placement, self.group)

    @property
    def vocab_size(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def context_length(self) -> int | None:
        """Tokens that a sequence may have; None when the model's configuration does not say."""
        return context_length(self.model.config)

    @property
    def optimizer_steps(self) -> int:
        return self._optimizer.steps

    def weights(self) -> dict[str, torch.Tensor]:
        """The live parameters by Hugging Face name, without what adapters add; tied ones once, under the first (the
        embedding's) name.

        Those of a sharded model are DTensors, and float32 where they are trained.
        """
        return {name: tensor.detach() for name, tensor in self._tensors.items()}

    @property
    def layout(self) -> dict[str, torch.Tensor]:
        """Shapes and dtypes of what `tensors` gives, as tensors without content."""
        return {
            name: torch.empty(tensor.shape, dtype=self._given(tensor), device="meta")
            for name, tensor in self._tensors.items()
        }

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights in the model's dtype, adapters merged, one after the other and whole: gathered from all ranks, on
        rank 0.

        Each is to be used before the next one is asked for, and all of them are to be asked for. Elsewhere than on
        rank 0 it gives nothing, and takes part.
        """
        with self.group.command(commands.WEIGHTS):
            for name, tensor in self._tensors.items():
                whole = gathered(tensor, self._given(tensor), self._device)
                if self.adapters is not None:
                    whole = self.adapters.merged(name, whole, self._device)
                if whole is not None:
                    yield name, whole

    def _given(self, tensor: torch.Tensor) -> torch.dtype:
        """The dtype in which a weight leaves the trainer: master weights do so in the model's."""
        return self._dtype if self._masters and tensor.dtype == torch.float32 and tensor.requires_grad else tensor.dtype

    def sleep(self) -> None:
        """Leaves the GPU: until `wake`, everything but training works, out of host memory."""
        for offload in self._offloads:
            offload.sleep()

    def wake(self) -> None:
        for offload in self._offloads:
            offload.wake()

    @property
    def _offloads(self) -> list[Offload]:
        return [self._offload] if self.critic is None else [self._offload, self.critic.offload]

    def logprobs(self, micro_batches: Sequence[PackedBatch]) -> list[NDArray[np.float32]]:
        """Of the trained tokens under the present weights, float32[n] for each micro-batch of this rank. All ranks."""
        return score(self._root, micro_batches, self._device, self.group)

    def ref_logprobs(self, micro_batches: Sequence[PackedBatch]) -> list[NDArray[np.float32]] | None:
        """The same under the reference model; None when the algorithm has none. It is the model without its adapters
        where that is what it was given as.
        """
        if not self._algorithm.needs_reference:
            return None
        if self._reference is not None:
            return self._reference.logprobs(micro_batches)
        assert self.adapters is not None
        with self.adapters.disabled():
            return self.logprobs(micro_batches)

    def teacher_logprobs(self, micro_batches: Sequence[PackedBatch]) -> list[NDArray[np.float32]] | None:
        """The same under the teacher; None without one."""
        return None if self._teacher is None else self._teacher.logprobs(micro_batches)

    def values(self, micro_batches: Sequence[PackedBatch]) -> list[NDArray[np.float32]] | None:
        """The critic's, of the states before the same tokens; None without one."""
        return None if self.critic is None else self.critic.values(micro_batches)

    def train(self, micro_batches: Sequence[PackedBatch]) -> StepResult:
        """Forward and backward over all micro-batches of all ranks, then one optimizer step. The same on every rank.

        Without any micro-batch nothing happens. The step is skipped, with the weights as before, when the loss or the
        gradient norm is not finite.
        """
        result = self.accumulate(micro_batches)
        if not micro_batches:
            result.applied = True
            return result
        result.grad_norm, result.applied = self._optimizer.finish(result.loss)
        return result

    def accumulate(self, micro_batches: Sequence[PackedBatch]) -> StepResult:
        """Forward and backward over all micro-batches, as many on each rank: the gradient is left in the parameters.

        The result is of all ranks.
        """
        result = StepResult(micro_batches=len(micro_batches))
        loads: list[torch.Tensor] = []
        self._optimizer.zero_grad()
        done = []
        for number, micro_batch in enumerate(micro_batches, 1):
            self._root.reduce_gradients(self._reduce_each or number == len(micro_batches))
            done.append(self._accumulate(micro_batch, loads))
        # Read only here: a GPU that had to answer in between would wait for the next micro-batch each time.
        for micro_batch, figures in zip(micro_batches, done, strict=True):
            if figures is not None:
                add(result, micro_batch, figures)
        total = total_of(self.group.of_parts(self.group.all_gather(asdict(result))))
        total.lr = self._optimizer.lr
        if self._routers is not None and total.tokens:
            total.expert_load_max = expert_load_max(loads, self.group)
        return total

    def _accumulate(self, micro_batch: PackedBatch, loads: list[torch.Tensor]) -> MicroBatchFigures | None:
        batch = to_device(micro_batch, self._device, self.group)
        tokens, routed = self._forward(batch)
        if not len(micro_batch.targets):
            # Nothing to train for this rank; the others wait for it to take part.
            tokens.logprobs.sum().backward()
            return None
        losses = self._loss(self._inputs(batch, tokens))
        loss = (losses.loss * batch.weights).sum()
        if routed is not None:
            loads.append(routed.tokens.sum(dim=1))
            if self._algorithm.router_aux_loss_coef:
                balance = routed.balance().index_select(0, batch.sequences)
                # A sequence weighs what its trained tokens weigh together.
                loss = loss + self._algorithm.router_aux_loss_coef * (balance * batch.weights).sum()
                losses.figures["router_aux_loss"] = balance.detach() / len(routed.tokens)
        loss.backward()
        return figures_of(batch, loss.detach(), tokens, losses)

    def _forward(self, batch: DeviceBatch) -> tuple[TokenLogprobs, Routing | None]:
        if self._routers is None:
            return all_logprobs(self._root, batch, entropy_gradient=self._entropy_in_loss), None
        wanted = self._algorithm.router_aux_loss_coef > 0
        return all_routed(
            self._root, batch, self._routers, probabilities=wanted, entropy_gradient=self._entropy_in_loss
        )

    def _inputs(self, batch: DeviceBatch, tokens: TokenLogprobs) -> Tokens:
        old = batch.old_logprobs
        if old is None:
            # Without earlier optimizer steps on this batch, the weights are those at its start.
            recomputed = self._algorithm.old_logprobs == "recomputed"
            old = tokens.logprobs.detach() if recomputed else batch.rollout_logprobs
        return Tokens(
            logprobs=tokens.logprobs,
            entropy=tokens.entropy,
            old_logprobs=old,
            rollout_logprobs=batch.rollout_logprobs,
            ref_logprobs=batch.ref_logprobs,
            teacher_logprobs=batch.teacher_logprobs,
            advantages=batch.advantages,
            weights=batch.weights,
            policy_factors=batch.policy_factors,
            sequences=batch.sequences,
            sequence_count=batch.sequence_count,
        )

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """This rank's part of all that a checkpoint has to hold besides `optimizer_steps`, copied to the host.

        That is its rows of what is sharded, in the dtypes that `layout` says; of what is whole, all on rank 0 and
        nothing elsewhere; and its own random number generators. Of a frozen model, the adapters.
        """
        model = ((name, tensor, self._given(tensor)) for name, tensor in self._saved.items())
        optimizer = ((name, tensor, tensor.dtype) for name, tensor in self._optimizer.state_dict().items())
        rng = {f"{_HOST_RNG}/{self.group.rank}": torch.get_rng_state()}
        if self._device.type == "cuda":
            rng[f"cuda/{self.group.rank}"] = torch.cuda.get_rng_state(self._device)
        parts = {self._part: self._own(model), OPTIMIZER: self._own(optimizer), RNG: rng}
        if self.critic is not None:
            parts[CRITIC] = self._own(self.critic.tensors())
            parts[CRITIC_OPTIMIZER] = self._own(self.critic.optimizer_tensors())
        return parts

    def _own(self, tensors: Iterable[tuple[str, torch.Tensor, torch.dtype]]) -> dict[str, torch.Tensor]:
        return {
            name: _on_host(local(tensor), dtype)
            for name, tensor, dtype in tensors
            if self.group.leads or (isinstance(tensor, DTensor) and len(local(tensor)))
        }

    def load_state(self, state: Stored, optimizer_steps: int) -> None:
        """Restores what `state` gave on however many ranks: each reads its part of what they gave together. A critic
        that it does not have begins as it would in a run of its own.

        The random number generators go on as those of the rank of the same number, or, where there were fewer ranks, as
        those of its number modulo theirs. Raises ConfigError when it is of another model.
        """
        saved = state.get(self._part, {})
        shapes = {name: tensor.shape for name, tensor in saved.items()}
        if shapes != {name: tensor.shape for name, tensor in self._saved.items()}:
            raise ConfigError("the run's checkpoints are of another model than this one", field="model.hf_checkpoint")
        with torch.no_grad():
            for name, stored in saved.items():
                restore(self._saved[name], stored)
            for name, tensor in self._optimizer.restored(state[OPTIMIZER], optimizer_steps):
                restore(tensor, state[OPTIMIZER][name])
        if self.critic is not None and CRITIC in state:
            self.critic.load(state[CRITIC], state[CRITIC_OPTIMIZER])
        elif self.critic is not None:
            log.warning("critic_begins", reason="the checkpoint is of a run without one")
        kept = [name.partition("/") for name in state[RNG]]
        for kind in {kind for kind, _, _ in kept}:
            rank = self.group.rank % sum(kind == other for other, _, _ in kept)
            generator = state[RNG][f"{kind}/{rank}"][...]
            if kind == _HOST_RNG:
                torch.set_rng_state(generator)
            elif self._device.type == kind:
                torch.cuda.set_rng_state(generator, self._device)

    def save_pretrained(self, directory: Path) -> None:
        """Writes config, generation config and weights as transformers does. On rank 0 only, like `tensors`."""
        save_pretrained(
            self.model,
            {name: _on_host(tensor, tensor.dtype) for name, tensor in self.tensors()},
            self._dtype,
            directory,
        )


def _placement(config: Config, group: RankGroup, device: torch.device) -> Placement:
    trainer = config.trainer
    mesh = init_device_mesh(device.type, (group.size,)) if group.size > 1 or trainer.offload else None
    return Placement(
        device,
        mesh,
        offload=trainer.offload,
        recompute=trainer.recompute,
        recompute_layers=trainer.recompute_layers,
        compile=trainer.compile,
        wide_residuals=trainer.wide_residuals,
    )


def _on_host(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()
