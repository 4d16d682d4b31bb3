"""Synchronous GRPO as one would write it down: one process, one thread, no service, no store, no message.

It calls the engine's, the reward's and the trainer's own functions; what to call them with it works out for itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from polyhead.v1 import sample_pb2
from services.common.config import Config
from services.common.versions import Version
from services.rollout.engines.torch_engine.engine import Engine
from services.rollout.engines.torch_engine.options import EngineOptions
from services.rollout.prompting import sampling_seed
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.batch.samples import Span, TrainSample, TrainSegment
from services.trainer.batch.staleness import Clock
from services.trainer.step import train_batch
from services.trainer.weights.form import EngineForm

State = dict[str, dict[str, torch.Tensor]]


@dataclass
class Completion:
    token_ids: list[int] = field(default_factory=list)
    """Without the prompt's."""
    logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    ordinals: list[int]
    """Places of the trained prompts in the data."""
    completions: list[list[Completion]]
    """By group and sample."""
    loss: float
    grad_norm: float
    state: State
    """Weights, optimizer and random numbers after the step."""


def plain_loop(
    config: Config, reward: Callable[[str], float], keeps: Callable[[Sequence[str], Sequence[float]], bool]
) -> Iterator[Step]:
    """`keeps` is the filter: it gets a group's texts and rewards."""
    engine, backend = _engine(config), TorchBackend(config)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(config.model.hf_checkpoint)
    prompts = [json.loads(line) for line in Path(config.data.prompt_data).read_text().splitlines()]
    ordinal = 0
    for step in range(1, config.run.num_rollout + 1):
        engine.parameters.load(dict(EngineForm().named(backend.weights().items())))
        ordinals, groups, rewards = [], [], []
        while len(groups) < config.batch.rollout_batch_size:
            prompt = tokenizer(prompts[ordinal % len(prompts)][config.data.input_key], add_special_tokens=False)
            group = _generate(engine, config, ordinal, prompt["input_ids"])
            texts = [tokenizer.decode(each.token_ids, skip_special_tokens=True) for each in group]
            scores = [reward(text) for text in texts]
            if keeps(texts, scores):
                ordinals.append(ordinal)
                groups.append((prompt["input_ids"], group))
                rewards.append(scores)
            ordinal += 1
        samples = _samples(config, Version(1, step - 1), groups, rewards)
        (result,) = train_batch(backend, samples, Clock(Version(1, step - 1), {1: 0}), config)
        assert result.applied
        yield Step(ordinals, [group for _, group in groups], result.loss, result.grad_norm, backend.state())


def _engine(config: Config) -> Engine:
    settings = config.rollout.engine
    assert settings.max_running_requests is not None
    return Engine(
        EngineOptions(
            config.model.hf_checkpoint,
            port=0,
            max_running_requests=settings.max_running_requests,
            context_length=settings.context_length,
            prefill_chunk=settings.prefill_chunk,
            threads=settings.threads,
            enable_deterministic_inference=True,
            skip_tokenizer_init=True,
        )
    )


def _generate(engine: Engine, config: Config, ordinal: int, prompt: list[int]) -> list[Completion]:
    """One group, alone in the engine, from beginning to end."""
    size, sampling = config.batch.n_samples_per_prompt, config.rollout.sampling
    params = [
        {
            "temperature": sampling.temperature,
            "max_new_tokens": sampling.max_response_len,
            "sampling_seed": sampling_seed(config.run.seed, ordinal, index),
        }
        for index in range(size)
    ]
    request = engine.parser.parse({"input_ids": [prompt] * size, "sampling_params": params, "return_logprob": True})
    places = {id(sequence): place for place, sequence in enumerate(request.sequences)}
    made = [Completion() for _ in range(size)]
    open_samples = set(range(size))

    def take(deltas: list[object]) -> None:
        for delta in deltas:
            completion = made[places[id(delta.sequence)]]  # type: ignore[attr-defined]
            completion.token_ids += delta.token_ids  # type: ignore[attr-defined]
            completion.logprobs += delta.logprobs  # type: ignore[attr-defined]
            if delta.finish_reason is not None:  # type: ignore[attr-defined]
                open_samples.remove(places[id(delta.sequence)])  # type: ignore[attr-defined]

    scheduler = engine.scheduler
    scheduler._deliver = take  # type: ignore[assignment]
    scheduler.add(request.sequences)
    with torch.inference_mode():
        while open_samples:
            scheduler.step()
    return made


def _samples(
    config: Config,
    version: Version,
    groups: Sequence[tuple[list[int], list[Completion]]],
    rewards: Sequence[Sequence[float]],
) -> list[TrainSample]:
    return [
        TrainSample(
            sample_id=f"{number}-{index}",
            group_id=str(number),
            reward=rewards[number][index],
            temperature=config.rollout.sampling.temperature,
            segments=(
                TrainSegment(
                    token_ids=np.array([*prompt, *completion.token_ids], dtype=np.int32),
                    prompt_length=len(prompt),
                    loss_mask=np.ones(len(completion.token_ids), dtype=np.uint8),
                    rollout_logprobs=np.array(completion.logprobs, dtype=np.float32),
                    spans=(Span(version, 0, len(completion.token_ids)),),
                    first_token_unix_us=0,
                    last_token_unix_us=0,
                ),
            ),
            message=sample_pb2.Sample(),
        )
        for number, (prompt, group) in enumerate(groups)
        for index, completion in enumerate(group)
    ]
