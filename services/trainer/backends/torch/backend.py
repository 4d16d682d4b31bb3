"""The torch backend: one model on one device, trained one optimizer step at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from services.common.config import Config
from services.common.errors import ConfigError
from services.trainer.algorithms.kl import k3
from services.trainer.algorithms.objective import Objective, Tokens, objective
from services.trainer.backends.torch.logprobs import DeviceBatch, TokenLogprobs, score, to_device, token_logprobs
from services.trainer.backends.torch.model import context_length, load_model
from services.trainer.backends.torch.optimizer import Optimizer
from services.trainer.backends.torch.reference import Reference
from services.trainer.batch.flops import SequenceFlops, sequence_flops
from services.trainer.batch.packing import PackedBatch

MODEL, OPTIMIZER, RNG = "model", "optimizer", "rng"


@dataclass
class StepResult:
    """What one optimizer step did. Sums are over trained tokens, at the weights before the step."""

    loss: float = 0.0
    grad_norm: float = 0.0
    lr: float = 0.0
    applied: bool = False
    """False when the loss or the gradient was not finite: the weights are as before."""
    micro_batches: int = 0
    tokens: int = 0
    fresh_tokens: int = 0
    entropy: float = 0.0
    ratio: float = 0.0
    clipped: float = 0.0
    mismatch_kl: float = 0.0
    """k3 estimate of KL(rollout policy || trainer policy)."""
    mismatch_kl_fresh: float = 0.0
    """The same over tokens sampled by the very weights being trained."""
    figures: dict[str, float] = field(default_factory=dict)
    """Sums of what the algorithm reports besides, by the name of the metric that their mean is."""
    maxima: dict[str, float] = field(default_factory=dict)
    """Over trained tokens, by the name of the metric."""
    offenders: list[int] = field(default_factory=list)
    """Rows of samples whose tokens gave a loss that is not finite."""


class TorchBackend:
    """A model with its optimizer. Everything runs on the calling thread."""

    def __init__(self, config: Config) -> None:
        """Loads `model.hf_checkpoint`. Raises ConfigError when it cannot be trained, or there is no such device."""
        if config.trainer.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("this machine has no CUDA device", field="trainer.device")
        torch.set_num_threads(config.trainer.threads)
        torch.use_deterministic_algorithms(config.run.deterministic)
        torch.manual_seed(config.run.seed)
        self._device = torch.device(config.trainer.device)
        self._algorithm = config.trainer.algorithm
        self.model = load_model(config.model.hf_checkpoint, config.model.dtype, self._device)
        self.flops: SequenceFlops | None = None
        """What balances micro-batches, where that is wanted."""
        if config.trainer.balance_data:
            self.flops = sequence_flops(self.model.config.get_text_config().to_dict())
        self._optimizer = Optimizer(self.model.named_parameters(), config.trainer.optimizer)
        self._reference = Reference(config, self.vocab_size, self._device) if self._algorithm.needs_reference else None

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
        """The live parameters by Hugging Face name; tied ones once, under the first (the embedding's) name."""
        seen: dict[int, str] = {}
        state = self.model.state_dict()
        return {name: tensor for name, tensor in state.items() if seen.setdefault(tensor.data_ptr(), name) == name}

    def logprobs(self, micro_batches: Sequence[PackedBatch]) -> list[NDArray[np.float32]]:
        """Of the trained tokens under the present weights, float32[n] for each micro-batch."""
        return score(self.model, micro_batches, self._device)

    def ref_logprobs(self, micro_batches: Sequence[PackedBatch]) -> list[NDArray[np.float32]] | None:
        """The same under the reference model; None when the algorithm has none."""
        return None if self._reference is None else self._reference.logprobs(micro_batches)

    def train(self, micro_batches: Sequence[PackedBatch]) -> StepResult:
        """Forward and backward over all micro-batches, then one optimizer step.

        Without any micro-batch nothing happens. The step is skipped, with the weights as before, when the loss or the
        gradient norm is not finite.
        """
        result = self.accumulate(micro_batches)
        if not micro_batches:
            result.applied = True
            return result
        result.grad_norm = self._optimizer.clip()
        result.applied = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
        if result.applied:
            self._optimizer.step()
        self._optimizer.zero_grad()
        return result

    def accumulate(self, micro_batches: Sequence[PackedBatch]) -> StepResult:
        """Forward and backward over all micro-batches: the gradient is left in the parameters."""
        result = StepResult(lr=self._optimizer.lr, micro_batches=len(micro_batches))
        self._optimizer.zero_grad()
        for micro_batch in micro_batches:
            self._accumulate(micro_batch, result)
        return result

    def _accumulate(self, micro_batch: PackedBatch, result: StepResult) -> None:
        batch = to_device(micro_batch, self._device)
        tokens = token_logprobs(self.model, batch, entropy_gradient=bool(self._algorithm.entropy_coef))
        losses = objective(self._inputs(batch, tokens), self._algorithm)
        loss = (losses.loss * batch.weights).sum()
        loss.backward()
        self._optimizer.accumulate()
        _add(result, batch, loss.detach(), tokens, losses)
        result.tokens += len(micro_batch.targets)
        result.fresh_tokens += int(micro_batch.fresh.sum())
        if not math.isfinite(result.loss):
            bad = (~torch.isfinite(losses.loss.detach())).cpu().numpy()
            result.offenders += np.unique(micro_batch.sample_rows[bad]).tolist()

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
            advantages=batch.advantages,
            sequences=batch.sequences,
            sequence_count=batch.sequence_count,
        )

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """All that a checkpoint has to hold besides `optimizer_steps`, copied to the host: one copy of everything."""
        rng = {"torch": torch.get_rng_state()}
        if self._device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self._device)
        live = {MODEL: self.weights(), OPTIMIZER: self._optimizer.state_dict(), RNG: rng}
        return {
            part: {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
            for part, tensors in live.items()
        }

    def load_state(self, state: Mapping[str, Mapping[str, torch.Tensor]], optimizer_steps: int) -> None:
        """Restores what `state` gave. Raises ConfigError when it is of another model."""
        live = self.weights()
        shapes = {name: tensor.shape for name, tensor in state[MODEL].items()}
        if shapes != {name: tensor.shape for name, tensor in live.items()}:
            raise ConfigError("the run's checkpoints are of another model than this one", field="model.hf_checkpoint")
        with torch.no_grad():
            for name, tensor in state[MODEL].items():
                live[name].copy_(tensor)
        self._optimizer.load_state_dict(state[OPTIMIZER], optimizer_steps)
        torch.set_rng_state(state[RNG]["torch"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state[RNG]["cuda"], self._device)

    def save_pretrained(self, directory: Path) -> None:
        """Writes config, generation config and weights as transformers does."""
        self.model.save_pretrained(directory)


def _add(result: StepResult, batch: DeviceBatch, loss: torch.Tensor, tokens: TokenLogprobs, losses: Objective) -> None:
    """Adds one micro-batch's sums and maxima, read from the device at once."""
    mismatch = k3(batch.rollout_logprobs, tokens.logprobs.detach())
    sums = [
        *(loss, tokens.entropy.detach().sum(), losses.ratio.sum(), losses.clipped.sum()),
        *(mismatch.sum(), (mismatch * batch.fresh).sum()),
        *(values.sum() for values in losses.figures.values()),
    ]
    maxima = [values.max() for values in losses.maxima.values()]
    read = torch.stack([*sums, *maxima]).tolist()
    result.loss += read[0]
    result.entropy += read[1]
    result.ratio += read[2]
    result.clipped += read[3]
    result.mismatch_kl += read[4]
    result.mismatch_kl_fresh += read[5]
    for name, value in zip(losses.figures, read[6:], strict=False):
        result.figures[name] = result.figures.get(name, 0.0) + value
    for name, value in zip(losses.maxima, read[len(sums) :], strict=True):
        result.maxima[name] = max(result.maxima.get(name, value), value)
