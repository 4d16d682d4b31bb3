"""Each rank's share of a batch: rank 0 says what it is, and the rank packs it from the payloads it fetches itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.versions import Version
from services.trainer.batch.packing import PackedBatch, pack
from services.trainer.batch.prepare import Masking, StepTokens, item
from services.trainer.batch.samples import TrainSample, decode_groups
from services.trainer.batch.staleness import Clock

Fetch = Callable[[list[pb.LeasedSample]], None]
"""Sets the payload of each."""


def batch_message(clock: Clock, parts: Sequence[Sequence[TrainSample]], steps: Sequence[StepTokens]) -> dict[str, Any]:
    """What the other ranks have to know of a batch: the plan, and what in it depends on all samples."""
    return {
        "trained": list(clock.trained),
        "forks": dict(clock.forks),
        "steps": [
            {
                "sample_ids": [sample.sample_id for sample in part],
                "num_tokens": [sum(len(segment.token_ids) for segment in sample.segments) for sample in part],
                "weights": step.weights,
                "plan": [[[step.sequences[index] for index in members] for members in bins] for bins in step.plan],
            }
            for part, step in zip(parts, steps, strict=True)
        ],
    }


def clock_of(message: dict[str, Any]) -> Clock:
    return Clock(Version(*message["trained"]), message["forks"])


def own_batches(
    message: dict[str, Any], part: int, masking: Masking, fetch: Fetch, vocab_size: int
) -> list[list[PackedBatch]]:
    """The micro-batches of one part of the plan, for each optimizer step."""
    plans = [step["plan"][part] for step in message["steps"]]
    wanted = [
        {row: _leased(step, row) for members in plan for row, _ in members}
        for step, plan in zip(message["steps"], plans, strict=True)
    ]
    fetch([leased for of_step in wanted for leased in of_step.values()])
    batches = []
    for step, plan, of_step in zip(message["steps"], plans, wanted, strict=True):
        group = pb.LeasedGroup(samples=of_step.values())
        samples = dict(zip(of_step, decode_groups([group], vocab_size=vocab_size, strict=True), strict=True))
        masks = {row: masking.masks(sample) for row, sample in samples.items()}
        batches.append(
            [
                pack(
                    [
                        item(samples[row], number, masks[row][number], masking.clock, step["weights"][row], row)
                        for row, number in members
                    ]
                )
                for members in plan
            ]
        )
    return batches


def _leased(step: dict[str, Any], row: int) -> pb.LeasedSample:
    record = sample_pb2.SampleIndex(num_tokens=step["num_tokens"][row])
    return pb.LeasedSample(sample_id=step["sample_ids"][row], record=record)
