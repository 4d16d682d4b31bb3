"""The ranks of a trainer without a run around them: real processes, the real command loop, batches made up here.

`python -m tests.kit.trainer_ranks DIRECTORY RANKS RANK PORT CASE...` is one rank. It goes through these of the `CASES`
with the others, and rank 0 leaves what came of each in ``DIRECTORY/ranks-N.pt``; `run_case` does one in this process.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from polyhead.v1 import buffer_pb2 as pb
from services.common.config import Config
from services.common.versions import Version
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.backends.torch.optimizer import Optimizer
from services.trainer.backends.torch.sharding import gathered
from services.trainer.batch.samples import TrainSample
from services.trainer.batch.staleness import Clock
from services.trainer.checkpoint import Checkpoint, CheckpointState, CheckpointStore
from services.trainer.lora import lora_state
from services.trainer.ranks import commands
from services.trainer.ranks.follow import obey
from services.trainer.ranks.group import STOP, RankGroup, _context_group
from services.trainer.step import train_batch
from services.trainer.weights.snapshot import Snapshot, build_manifest
from tests.kit.in_process import free_port
from tests.kit.lora import begin_filled
from tests.kit.trainer_ragged import ragged_samples
from tests.kit.warm import warm

CLOCK = Clock(Version(1, 0), {1: 0})
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A batch, and how it is trained."""

    model: str = "qwen3"
    dtype: str = "float32"
    trainer: dict[str, Any] = field(default_factory=dict)
    algorithm: dict[str, Any] = field(default_factory=dict)
    steps: int = 1
    """Optimizer steps."""
    seed: int = 0
    only: int | None = None
    """So many samples of the ragged batch."""
    rewards: dict[int, float] = field(default_factory=dict)
    times: int = 1
    """How often the batch is trained."""
    context: int = 1
    """So many ranks share each row."""
    reference: str | None = "other"
    """None: what training begins with."""

    def samples(self) -> list[TrainSample]:
        samples = ragged_samples(self.seed, segments=True)[: self.only]
        return [
            TrainSample(**{**fields(sample), "reward": self.rewards.get(row, sample.reward)})
            for row, sample in enumerate(samples)
        ]

    def config(self, directory: Path, ranks: int, port: int) -> Config:
        return Config(
            run={"dir": directory / f"run-{ranks}"},
            model={
                "hf_checkpoint": directory / self.model,
                "ref_checkpoint": self.reference and directory / self.reference,
                "dtype": self.dtype,
            },
            batch={"rollout_batch_size": self.steps, "n_samples_per_prompt": 1, "num_steps_per_rollout": self.steps},
            trainer={
                "ranks": ranks,
                "context_parallel": min(self.context, ranks),
                "rendezvous": f"127.0.0.1:{port}",
                "rank_timeout_s": 120.0,
                # Of a component that is nothing but rounding, Adam with a smaller eps makes a step of either sign.
                "optimizer": {"lr": 1e-5, "weight_decay": 0.1, "eps": 1e-6},
                "algorithm": self.algorithm,
                **self.trainer,
            },
        )


def fields(sample: TrainSample) -> dict[str, Any]:
    return {name: getattr(sample, name) for name in TrainSample.__slots__}


KL = {"use_kl_loss": True, "kl_loss_coef": 0.1}
PPO = {"name": "ppo", "gamma": 0.97, "lambd": 0.9, "kl_coef": 0.1, "old_logprobs": "recomputed"}
SPREAD = {"router_aux_loss_coef": 0.1}
# These also go on from a checkpoint of theirs.
RESUMED = ("twice", "ppo", "adapters")
CASES: dict[str, Case] = {
    "one sequence a micro-batch": Case(trainer={"max_tokens_per_gpu": 1}),
    "packed": Case(trainer={"max_tokens_per_gpu": 120}),
    "all in one": Case(trainer={"max_tokens_per_gpu": 100_000}),
    "three sequences a micro-batch": Case(trainer={"micro_batch_size": 3}),
    "balanced": Case(trainer={"max_tokens_per_gpu": 120, "balance_data": True}, seed=1),
    "per token": Case(algorithm={"loss_reduction": "per_token"}, trainer={"max_tokens_per_gpu": 200}, seed=2),
    "fewer sequences than ranks": Case(only=1, algorithm=KL),
    "one token": Case(only=1, seed=3, algorithm=KL),
    "untied": Case(model="llama", trainer={"max_tokens_per_gpu": 120}),
    "recomputed": Case(trainer={"max_tokens_per_gpu": 120, "recompute": True}),
    "reduced each time": Case(trainer={"max_tokens_per_gpu": 60, "reduce_each_micro_batch": True}),
    "kl, several steps": Case(
        trainer={"max_tokens_per_gpu": 120}, algorithm={**KL, "old_logprobs": "recomputed"}, steps=3, seed=1
    ),
    "kl in the reward": Case(
        trainer={"max_tokens_per_gpu": 120},
        algorithm={"name": "reinforce_plus_plus", "kl_coef": 0.1, "old_logprobs": "recomputed"},
        steps=2,
    ),
    "entropy": Case(trainer={"max_tokens_per_gpu": 120}, algorithm={"entropy_coef": 0.1}),
    "shared rows, packed": Case(context=2, trainer={"max_tokens_per_gpu": 60}),
    "shared rows, one sequence each": Case(context=2, trainer={"max_tokens_per_gpu": 1}, model="llama", seed=1),
    "shared rows, a sliding window": Case(context=2, model="window", trainer={"max_tokens_per_gpu": 60}),
    "shared rows, one token": Case(context=2, only=1, seed=3, algorithm=KL),
    "shared rows, loss by sequence": Case(
        context=2,
        trainer={"max_tokens_per_gpu": 60, "recompute": True},
        algorithm={"name": "gspo", **KL, "entropy_coef": 0.1, "old_logprobs": "recomputed"},
        steps=2,
    ),
    # Seven experts: neither 2 nor 4 ranks have as many each, and a filler of one token leaves most of them idle.
    "experts": Case(model="experts", trainer={"max_tokens_per_gpu": 120, "balance_data": True}, algorithm=SPREAD),
    "experts, shared rows": Case(context=2, model="experts", trainer={"max_tokens_per_gpu": 60}, algorithm=SPREAD),
    "ppo": Case(trainer={"max_tokens_per_gpu": 120}, algorithm=PPO, steps=2, times=2),
    "shared rows, ppo": Case(context=2, trainer={"max_tokens_per_gpu": 60}, algorithm=PPO, steps=2, times=2, seed=1),
    "not finite": Case(trainer={"max_tokens_per_gpu": 120}, rewards={5: float("inf")}),
    "twice": Case(trainer={"max_tokens_per_gpu": 120}, times=2),
    "again": Case(trainer={"max_tokens_per_gpu": 120}, times=2),
    "adapters": Case(
        trainer={"max_tokens_per_gpu": 120, "lora": {"rank": 3}},
        algorithm={**KL, "kl_type": "k3", "old_logprobs": "recomputed"},
        reference=None,
        steps=2,
        times=2,
    ),
    "adapters, bfloat16": Case(dtype="bfloat16", trainer={"max_tokens_per_gpu": 120, "lora": {"rank": 3}}, times=2),
    "bfloat16": Case(dtype="bfloat16", trainer={"max_tokens_per_gpu": 120}, times=2),
    "ppo, bfloat16": Case(dtype="bfloat16", trainer={"max_tokens_per_gpu": 120}, algorithm=PPO, times=2),
}
if "POLYHEAD_RANKS" in os.environ:  # make ranks
    LAYERS = ["q_proj", "layers.0.mlp.up_proj"]
    CASES |= {
        "experts, bfloat16": Case(model="experts", dtype="bfloat16", trainer={"max_tokens_per_gpu": 120}, times=2),
        "experts, one token": Case(model="experts", only=1, seed=3, algorithm=SPREAD),
        "experts, recomputed and reduced each time": Case(
            model="experts",
            trainer={"max_tokens_per_gpu": 60, "recompute": True, "reduce_each_micro_batch": True},
            algorithm=SPREAD,
            seed=1,
        ),
        "adapters, some": Case(
            trainer={"max_tokens_per_gpu": 60, "lora": {"rank": 5, "target_modules": LAYERS}}, algorithm=KL, steps=3
        ),
        "adapters, shared rows": Case(
            model="llama",
            context=2,
            trainer={"max_tokens_per_gpu": 60, "recompute": True, "lora": {"rank": 1, "use_rslora": True}},
            seed=1,
        ),
        "adapters, reduced each time": Case(
            trainer={"max_tokens_per_gpu": 60, "reduce_each_micro_batch": True, "lora": {"rank": 3}}
        ),
    }


def run_case(case: Case, backend: TorchBackend, config: Config, gradients: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """On rank 0. `gradients` fills up while it runs."""
    results = [
        asdict(result) for _ in range(case.times) for result in train_batch(backend, case.samples(), CLOCK, config)
    ]
    snapshot = Snapshot(build_manifest(backend.layout, 1 << 16), CPU)
    snapshot.fill(backend.tensors())
    return {
        "results": results,
        "gradients": list(gradients),
        "state": whole(save(backend, config.run.dir)),
        "optimizer_steps": backend.optimizer_steps,
        "layout": list(backend.layout),
        "pushed": torch.cat(list(snapshot.buckets)),
    }


def save(backend: TorchBackend, run_dir: Path) -> Checkpoint:
    """A checkpoint as a run makes one: on rank 0, while the others obey."""
    shutil.rmtree(run_dir, ignore_errors=True)
    store = CheckpointStore(run_dir, 1)
    steps = backend.optimizer_steps
    base = run_dir.parent / "qwen3"
    lora = lora_state(backend.adapters, base)
    state = CheckpointState(steps, Version(1, steps), steps, str(base), "float32", "", None, lora)
    temporary = store.temporary(steps)
    with backend.group.command(commands.SAVE, str(temporary)):
        tensors = backend.state()
    store.save(state, tensors, temporary, backend.group.beside)
    checkpoint = store.load_newest()
    assert checkpoint is not None
    assert checkpoint.state == state
    return checkpoint


def start_of(directory: Path, name: str, ranks: int) -> Checkpoint:
    """What `go_on` began with, of that case on so many ranks."""
    checkpoint = CheckpointStore(directory / f"start-{name}-{ranks}", 1).load_newest()
    assert checkpoint is not None
    return checkpoint


def load(backend: TorchBackend, checkpoint: Checkpoint) -> None:
    """The same for a resumption."""
    with backend.group.command(commands.LOAD, str(checkpoint.directory)):
        backend.load_state(checkpoint.tensors, checkpoint.state.optimizer_steps)


def whole(checkpoint: Checkpoint) -> dict[str, dict[str, torch.Tensor]]:
    return {
        part: {name: stored[...] for name, stored in tensors.items()} for part, tensors in checkpoint.tensors.items()
    }


def go_on(name: str, backend: TorchBackend, config: Config, directory: Path) -> dict[str, Any]:
    """Leaves a checkpoint, trains on, goes back to it and trains on again, and from those that other numbers of ranks
    have left. What each came to, by that number; 0: without going back. Exports the model.
    """
    case, ranks = CASES[name], config.trainer.ranks
    starts = {0: save(backend, directory / f"start-{name}-{ranks}")}
    starts |= {
        number: start_of(directory, name, number)
        for number in (1, 2, 4)
        if (directory / f"start-{name}-{number}").exists()
    }
    went_on = {}
    for number, start in starts.items():
        if number:
            load(backend, start)
        losses = [result.loss for result in train_batch(backend, case.samples(), CLOCK, config)]
        went_on[number] = {"losses": losses, "state": whole(save(backend, config.run.dir))}
    save(backend, directory / f"end-{name}-{ranks}")
    backend.save_pretrained(directory / f"exported-{name}-{ranks}")
    return {"went_on": went_on}


def noted_gradients() -> list[dict[str, Any]]:
    """From here on every rank keeps the whole gradient of each optimizer step before it is clipped; rank 0 has it."""
    noted: list[dict[str, Any]] = []
    clip = Optimizer.clip

    def note(optimizer: Optimizer) -> float:
        gradients = {
            name: gathered(master.grad, torch.float32, CPU)
            for name, master in optimizer._masters.items()
            if master.grad is not None
        }
        noted.append({name: whole.clone() for name, whole in gradients.items() if whole is not None})
        return clip(optimizer)

    Optimizer.clip = note
    return noted


def _fetch(samples: Sequence[TrainSample]) -> Callable[[list[pb.LeasedSample]], None]:
    payloads = {sample.sample_id: sample.message.SerializeToString() for sample in samples}

    def fetch(leased: list[pb.LeasedSample]) -> None:
        for each in leased:
            each.sample = payloads[each.sample_id]

    return fetch


def spawn(directory: Path, ranks: int, *names: str) -> dict[str, Any]:
    """What these of the `CASES`, or all, come to on so many ranks. Raises AssertionError, with a log, if one fails."""
    port = free_port()
    processes = []
    for rank in range(ranks):
        arguments = (str(directory), str(ranks), str(rank), str(port), *(names or CASES))
        log = directory / f"rank-{rank}-of-{ranks}.log"
        process = warm().start("tests.kit.trainer_ranks", *arguments, environment=os.environ, log=log)
        processes.append((process, log))
    try:
        for process, log in processes:
            assert process.wait(timeout=600) == 0, log.read_text()[-3000:]
    finally:
        for process, _ in processes:
            process.kill()
    # Tensors and numbers that this test's own ranks wrote: nothing else is read with weights_only.
    outcome: dict[str, Any] = torch.load(directory / f"ranks-{ranks}.pt", weights_only=True)
    return outcome


def _main(directory: Path, ranks: int, rank: int, port: int, names: Sequence[str]) -> None:
    begin_filled()
    config = Case().config(directory, ranks, port)
    group = RankGroup.form(config.trainer, rank)
    context = _context_group(ranks, 2, rank, timedelta(seconds=60))
    sharing = RankGroup(rank, ranks, group._control, context, 2, group.beside)
    gradients, outcomes = noted_gradients(), {}
    for name in names:
        case = CASES[name]
        config = case.config(directory, ranks, port)
        backend = TorchBackend(config, sharing if case.context == 2 else group)
        if rank:
            obey(config, backend, _fetch(case.samples()))
            continue
        gradients.clear()
        outcomes[name] = run_case(case, backend, config, gradients)
        if name in RESUMED:
            outcomes[name] |= go_on(name, backend, config, directory)
        with backend.group.command(STOP):
            pass
    if rank == 0:
        torch.save(outcomes, directory / f"ranks-{ranks}.pt")
    group.close()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5:])
