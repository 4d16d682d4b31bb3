"""A buffer in this process behind real gRPC, and what its clients complete."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import buffer_pb2_grpc, sample_pb2
from services.buffer.memory_watch import MemoryWatch
from services.buffer.prompts import PromptSource
from services.buffer.redis_store import RedisStore
from services.buffer.service import BufferService
from services.buffer.settings import run_params
from services.common import rpc, wire
from services.common.config import Config, load
from services.common.versions import Version

GENERATE, SCORE, TRAIN = sample_pb2.STAGE_GENERATE, sample_pb2.STAGE_SCORE, sample_pb2.STAGE_TRAIN
FIRST = Version(1, 0)
_runs = itertools.count()


def service_config(directory: Path) -> Config:
    """A run of its own, on ten prompts: two groups of two a step."""
    data = directory / "prompts.jsonl"
    data.write_text("".join(json.dumps({"input": f"prompt {n}"}) + "\n" for n in range(10)))
    return load(
        None,
        {
            "run.name": f"service-{next(_runs)}",
            "data.prompt_data": str(data),
            "batch.rollout_batch_size": 2,
            "batch.n_samples_per_prompt": 2,
            "staleness.max_staleness": 1,
            "buffer.limits.sample_tokens": 100,
            "buffer.limits.samples_per_rpc": 16,
        },
    )


@asynccontextmanager
async def serving(url: str, config: Config, max_memory_mb: int = 1024) -> AsyncIterator[str]:
    """The address of a buffer in this process."""
    source = PromptSource(config.data, config.buffer.limits) if config.data.prompt_data else None
    store = RedisStore(url, run_name=config.run.name)
    await store.open(run_params(config, source))
    watch = MemoryWatch(store, max_memory_mb)
    await watch.look()
    service = BufferService(store, source, watch, config.buffer, config.batch.n_samples_per_prompt)
    started = await rpc.serve(
        "127.0.0.1:0",
        lambda to: buffer_pb2_grpc.add_BufferServiceServicer_to_server(service, to),
        ["polyhead.v1.BufferService"],
    )
    try:
        yield started.address
    finally:
        await started.stop(0)
        await store.close()


def completed(response: pb.LeaseResponse, version: Version = FIRST, **changes: object) -> list[pb.CompletedSample]:
    """Finished samples of 2 prompt and 3 completion tokens; `changes` go into the segment."""
    rows = []
    for group in response.groups:
        for leased in group.samples:
            segment = sample_pb2.Segment(
                token_ids=wire.encode_tokens([1, 2, 3, 4, 5]),
                num_tokens=5,
                prompt_length=2,
                loss_mask=wire.encode_mask([1, 1, 1]),
                rollout_logprobs=wire.encode_logprobs([-0.1, -0.2, -0.3]),
                spans=[sample_pb2.WeightVersionSpan(version=version.to_proto(), start=0, end=3)],
            )
            for name, value in changes.items():
                setattr(segment, name, value)
            sample = sample_pb2.Sample(
                sample_id=leased.sample_id,
                group_id=group.group_id,
                index=leased.index,
                prompt=group.prompt,
                segments=[segment],
                completion="three",
                finish_reason=sample_pb2.FINISH_REASON_STOP,
            )
            data = sample.SerializeToString()
            rows.append(pb.CompletedSample(sample_id=leased.sample_id, lease_id=leased.lease_id, sample=data))
    return rows


def scored(response: pb.LeaseResponse) -> list[pb.CompletedSample]:
    return [
        pb.CompletedSample(
            sample_id=leased.sample_id,
            lease_id=leased.lease_id,
            score=sample_pb2.Score(reward=leased.index, scorer="x"),
        )
        for group in response.groups
        for leased in group.samples
    ]
