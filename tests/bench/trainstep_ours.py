"""Our side of `polyhead bench trainstep`: `python -m tests.bench.trainstep_ours SPEC.json`.

Prepares the batch, for both sides: random tokens of the given lengths, with old log-probs near those of the model. Then
`train_batch`, from decoded samples to a stepped optimizer, once for each line on the standard input.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from services.common.config import Config
from services.common.versions import Version
from services.trainer.algorithms.advantages import group_advantages
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.batch.plan import Batching
from services.trainer.batch.prepare import prepare_step
from services.trainer.batch.samples import TrainSample, decode_groups
from services.trainer.batch.staleness import Clock
from services.trainer.step import train_batch
from tests.gpu.models import write_model
from tests.kit.trainer_batch import make_group, make_sample

CLOCK = Clock(Version(1, 0), {1: 0})
# Standard deviation of the old log-probs around the model's own: ratios within and beyond the clip.
DRIFT = 0.15


def make_config(spec: dict[str, Any]) -> Config:
    return Config(
        model={"hf_checkpoint": spec["model"], "dtype": spec["dtype"]},
        batch={"rollout_batch_size": spec["samples"] // spec["group"], "n_samples_per_prompt": spec["group"]},
        trainer={
            "device": spec["device"],
            "threads": spec["threads"],
            "max_tokens_per_gpu": spec["max_tokens"],
            "recompute": spec["recompute"],
            "algorithm": {"eps_clip": spec["eps_clip"]},
            "optimizer": {name: spec[name] for name in ("lr", "beta1", "beta2", "eps", "clip_grad")},
        },
    )


def make_samples(spec: dict[str, Any], vocabulary: int) -> list[TrainSample]:
    rng = np.random.default_rng(spec["seed"])
    groups = []
    for number in range(spec["samples"] // spec["group"]):
        members = range(number * spec["group"], (number + 1) * spec["group"])
        prompt = rng.integers(0, vocabulary, spec["prompt_lengths"][members[0]]).tolist()
        samples = [
            make_sample(
                rng,
                sample_id=f"g{number:08d}-{row:03d}",
                prompt=prompt,
                completion_length=spec["completion_lengths"][row],
                vocab=vocabulary,
            )
            for row in members
        ]
        groups.append(make_group(samples, rng.integers(0, 2, len(samples)).astype(float).tolist(), order=number))
    return decode_groups(groups, vocab_size=vocabulary)


def with_old_logprobs(
    backend: TorchBackend, samples: list[TrainSample], max_tokens: int, seed: int
) -> list[TrainSample]:
    step = prepare_step(
        samples, CLOCK, mask_above=None, reduction="per_sample", batching=Batching(max_tokens, flops=backend.flops)
    )
    logprobs = step.flat(backend.logprobs(step.batches))
    logprobs += np.random.default_rng(seed).normal(0.0, DRIFT, len(logprobs))
    parts = np.split(logprobs.astype(np.float32), np.cumsum([sample.completion_length for sample in samples])[:-1])
    return [
        replace(sample, segments=(replace(sample.segments[0], rollout_logprobs=part),))
        for sample, part in zip(samples, parts, strict=True)
    ]


def save(path: Path, samples: list[TrainSample]) -> None:
    """The batch for the other side."""
    segments = [sample.segments[0] for sample in samples]
    rewards = np.array([sample.reward for sample in samples])
    np.savez(
        path,
        prompts=np.concatenate([segment.token_ids[: segment.prompt_length] for segment in segments]).astype(np.int64),
        prompt_lengths=[segment.prompt_length for segment in segments],
        completions=np.concatenate([segment.token_ids[segment.prompt_length :] for segment in segments]).astype(
            np.int64
        ),
        completion_lengths=[segment.completion_length for segment in segments],
        old_logprobs=np.concatenate([segment.rollout_logprobs for segment in segments]),
        advantages=group_advantages(rewards, [sample.group_id for sample in samples], normalize_std=True),
    )


def step(backend: TorchBackend, samples: list[TrainSample], config: Config) -> dict[str, Any]:
    on_gpu = config.trainer.device == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began, worked = time.perf_counter(), time.process_time()
    (result,) = train_batch(backend, samples, CLOCK, config)
    if on_gpu:
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "loss": result.loss,
        "peak_bytes": peak,
        "micro_batches": result.micro_batches,
        "clip_fraction": result.clipped / max(result.tokens, 1),
    }


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    write_model(Path(spec["model"]), spec["shape"], spec["seed"], getattr(torch, spec["dtype"]), spec["device"])
    config = make_config(spec)
    backend = TorchBackend(config)
    samples = make_samples(spec, backend.vocab_size)
    samples = with_old_logprobs(backend, samples, spec["max_tokens"], spec["seed"])
    save(Path(spec["batch"]), samples)
    print(
        json.dumps(
            {
                "parameters": sum(weight.numel() for weight in backend.weights().values()),
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            }
        ),
        flush=True,
    )
    while sys.stdin.readline():
        print(json.dumps(step(backend, samples, config)), flush=True)


if __name__ == "__main__":
    main()
