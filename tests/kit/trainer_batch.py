"""Leased batches for the trainer's tests, with random tokens and made-up behaviour log-probs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common import wire
from services.common.versions import Version


def make_sample(
    rng: np.random.Generator,
    *,
    sample_id: str,
    prompt: Sequence[int],
    completion_length: int,
    versions: Sequence[Version] = (Version(1, 0),),
    loss_mask: Sequence[int] | None = None,
    temperature: float = 1.0,
    vocab: int = 128,
) -> sample_pb2.Sample:
    """A valid single-segment Sample. The completion is split evenly over `versions`."""
    completion = rng.integers(3, vocab, completion_length)
    cuts = np.linspace(0, completion_length, len(versions) + 1).astype(int)
    spans = [
        sample_pb2.WeightVersionSpan(version=version.to_proto(), start=start, end=end)
        for version, start, end in zip(versions, cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)
        if end > start
    ]
    mask = np.ones(completion_length) if loss_mask is None else np.asarray(loss_mask)
    segment = sample_pb2.Segment(
        token_ids=wire.encode_tokens([*prompt, *completion]),
        num_tokens=len(prompt) + completion_length,
        prompt_length=len(prompt),
        loss_mask=wire.encode_mask(mask),
        rollout_logprobs=wire.encode_logprobs(rng.uniform(-6.0, -3.5, completion_length)),
        spans=spans,
        first_token_unix_us=1_000_000,
        last_token_unix_us=2_000_000,
    )
    return sample_pb2.Sample(
        sample_id=sample_id,
        group_id=sample_id.rpartition("-")[0],
        prompt=sample_pb2.Prompt(text="1+1=", label="2"),
        sampling=sample_pb2.SamplingParams(temperature=temperature),
        segments=[segment],
        completion="2",
        finish_reason=sample_pb2.FINISH_REASON_STOP,
        behaviour_exact=True,
    )


def make_group(samples: Sequence[sample_pb2.Sample], rewards: Sequence[float], order: int = 0) -> pb.LeasedGroup:
    """The group as a TRAIN lease with payloads hands it out."""
    return pb.LeasedGroup(
        group_id=samples[0].group_id,
        group_size=len(samples),
        order=order,
        samples=[
            pb.LeasedSample(
                sample_id=sample.sample_id,
                index=index,
                sample=sample.SerializeToString(),
                score=sample_pb2.Score(reward=reward),
            )
            for index, (sample, reward) in enumerate(zip(samples, rewards, strict=True))
        ],
    )


def make_batch(
    seed: int, *, groups: int = 8, size: int = 8, prompt_length: int = 6, longest: int = 6, first_group: int = 0
) -> list[pb.LeasedGroup]:
    """`groups` groups of `size` samples with completions of 1 to `longest` tokens and random 0/1 rewards."""
    rng = np.random.default_rng(seed)
    batch = []
    for number in range(first_group, first_group + groups):
        prompt = rng.integers(3, 128, prompt_length).tolist()
        samples = [
            make_sample(
                rng,
                sample_id=f"g{number:08d}-{index:03d}",
                prompt=prompt,
                completion_length=int(rng.integers(1, longest + 1)),
            )
            for index in range(size)
        ]
        batch.append(make_group(samples, rng.integers(0, 2, size).astype(float).tolist(), order=number))
    return batch
