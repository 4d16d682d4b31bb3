"""One replica as a process, with real engines, the real router and the real buffer; the test is the trainer."""

from __future__ import annotations

import asyncio
import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import buffer_pb2_grpc, rollout_pb2, rollout_pb2_grpc, sample_pb2, weights_pb2
from services.buffer.memory_store import MemoryStore
from services.buffer.memory_watch import MemoryWatch
from services.buffer.service import BufferService
from services.buffer.settings import run_params
from services.common import rpc, wire
from services.common.buffer_client import BufferClient
from services.common.config import Config, dump
from services.common.process import free_port
from services.common.versions import Version
from services.common.weight_group import WeightGroup
from tests.kit.tiny_model import build_tiny_qwen3

ROOT = Path(__file__).parents[2]
GROUPS, SAMPLES, LENGTH = 4, 4, 160
WAIT_S = 60.0


class Replica:
    """The rollout process and what a trainer needs to talk to it."""

    def __init__(self, buffer: BufferClient, process: subprocess.Popen[bytes], config: Config, model: Path) -> None:
        self.buffer = buffer
        self.process = process
        self.config = config
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.groups: dict[int, WeightGroup] = {}
        self.stub: rollout_pb2_grpc.RolloutServiceStub | None = None

    async def state(self) -> pb.Replica:
        return next(iter(await self.buffer.list_replicas(pb.ROLE_ROLLOUT)), pb.Replica())

    async def until_state(self, state: pb.ReplicaState, not_pid: int = 0) -> pb.Replica:
        return await self.until(lambda seen: seen.state == state and seen.child_pids.get("engine-0", 0) != not_pid)

    async def until_engines(self, *states: pb.ReplicaState) -> pb.Replica:
        return await self.until(lambda seen: [engine.state for engine in seen.engines] == list(states))

    async def until(self, condition: Callable[[pb.Replica], bool]) -> pb.Replica:
        deadline = time.monotonic() + WAIT_S
        while True:
            seen = await self.state()
            if condition(seen):
                return seen
            assert self.process.poll() is None, "the replica has ended"
            assert time.monotonic() < deadline, f"it is {seen}"
            await asyncio.sleep(0.05)

    async def join(self, name: str, engine: int = 0) -> None:
        address = (await self.state()).address
        self.stub = rollout_pb2_grpc.RolloutServiceStub(rpc.channel(address))
        port = free_port()
        request = rollout_pb2.JoinWeightGroupRequest(
            epoch=1,
            group_name=name,
            backend="gloo",
            master_address="127.0.0.1",
            master_port=port,
            world_size=2,
            rank_offset=1,
            engine=engine,
        )
        joining = asyncio.ensure_future(self.stub.JoinWeightGroup(request, timeout=30))
        self.groups[engine] = await asyncio.to_thread(
            lambda: WeightGroup(
                backend="gloo", address="127.0.0.1", port=port, rank=0, world_size=2, name=name, timeout_s=30
            )
        )
        await joining

    async def push(self, version: Version, name: str, mode: str, engine: int = 0) -> rollout_pb2.CommitUpdateResponse:
        assert self.stub is not None
        manifest, buckets = flatten(dict(self.model.named_parameters()))
        wire_version = version.to_proto()
        await self.stub.BeginUpdate(
            rollout_pb2.BeginUpdateRequest(
                epoch=1,
                version=wire_version,
                manifest=manifest,
                group_name=name,
                pause_mode=rollout_pb2.PauseMode.Value(f"PAUSE_MODE_{mode}"),
                engine=engine,
            ),
            timeout=30,
        )
        for number, bucket in enumerate(buckets):
            load = self.stub.LoadBucket(
                rollout_pb2.LoadBucketRequest(epoch=1, version=wire_version, bucket=number, engine=engine), timeout=30
            )
            loading = asyncio.ensure_future(load)
            await asyncio.to_thread(self.groups[engine].broadcast, bucket)
            await loading
        return await self.stub.CommitUpdate(
            rollout_pb2.CommitUpdateRequest(epoch=1, version=wire_version, engine=engine), timeout=30
        )

    async def until_more_tokens(self, count: int) -> None:
        assert self.stub is not None
        deadline, before = time.monotonic() + WAIT_S, None
        while True:
            status = await self.stub.GetStatus(rollout_pb2.RolloutServiceGetStatusRequest(), timeout=5)
            now = status.replica.stats["tokens_generated"]
            before = now if before is None else before
            if now >= before + count:
                return
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)

    async def counters(self, state: sample_pb2.SampleState) -> int:
        ledger = await self.buffer.get_ledger()
        assert ledger.imbalance == 0
        return sum(count.samples for count in ledger.counts if count.state == state)

    async def until_generated(self, samples: int) -> None:
        deadline = time.monotonic() + WAIT_S
        while await self.counters(sample_pb2.SAMPLE_STATE_GENERATED) < samples:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)

    async def samples(self, group_ids: list[str]) -> list[sample_pb2.Sample]:
        ids = [f"{group_id}-{index:03d}" for group_id in group_ids for index in range(SAMPLES)]
        fetched = await self.buffer.fetch(ids)
        return [sample_pb2.Sample.FromString(item.sample) for item in fetched.samples]

    async def generated_tokens(self, group_ids: list[str]) -> int:
        return sum(wire.completion_length(sample.segments[0]) for sample in await self.samples(group_ids))


def logprobs(model: Any, sample: sample_pb2.Sample) -> np.ndarray:
    """Teacher-forced log-probs of the completion."""
    segment = sample.segments[0]
    tokens = torch.tensor(wire.decode_tokens(segment.token_ids).astype(np.int64))
    with torch.no_grad():
        logits = model(tokens[None]).logits[0].double()
    scores = torch.log_softmax(logits, dim=-1)[torch.arange(len(tokens) - 1), tokens[1:]]
    return scores[segment.prompt_length - 1 :].numpy()


def flatten(parameters: dict[str, torch.Tensor]) -> tuple[weights_pb2.WeightManifest, list[torch.Tensor]]:
    """Two buckets."""
    names = list(parameters)
    manifest, buckets = weights_pb2.WeightManifest(), []
    for part in (names[: len(names) // 2], names[len(names) // 2 :]):
        bucket = manifest.buckets.add()
        for name in part:
            bucket.tensors.add(name=name, dtype="float32", shape=parameters[name].shape)
        flat = torch.cat([parameters[name].detach().reshape(-1).view(torch.uint8) for name in part])
        bucket.num_bytes = flat.numel()
        buckets.append(flat)
    return manifest, buckets


def start(config: Path, log_path: Path) -> subprocess.Popen[bytes]:
    with log_path.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "services.rollout", "-c", str(config)], cwd=ROOT, stdout=log, stderr=log
        )


@asynccontextmanager
async def running(directory: Path, *, engines: int, colocate: bool = False) -> AsyncIterator[Replica]:
    model = build_tiny_qwen3(directory / "model")
    address = f"127.0.0.1:{free_port()}"
    config = Config.model_validate(
        {
            "run": {"dir": directory / "run", "colocate": colocate},
            "model": {"hf_checkpoint": model},
            "batch": {"rollout_batch_size": GROUPS, "n_samples_per_prompt": SAMPLES},
            "buffer": {"address": address, "lease_ttl_s": 5.0},
            "rollout": {
                "engines": engines,
                "max_inflight": GROUPS * SAMPLES,
                "save_interval_s": 0.2,
                "sampling": {"max_response_len": LENGTH},
                "engine": {"context_length": 192, "stream_interval": 4, "max_running_requests": 16},
            },
            "trainer": {"weights": {"timeout_s": 10.0}},
        }
    )
    file = directory / "run.toml"
    file.write_text(dump(config))
    store = MemoryStore()
    await store.open(run_params(config, None))
    service = BufferService(store, None, MemoryWatch(store, 1024), config.buffer, SAMPLES)
    server = await rpc.serve(
        address, lambda server: buffer_pb2_grpc.add_BufferServiceServicer_to_server(service, server), []
    )
    process = start(file, directory / "rollout.log")
    async with BufferClient(address) as buffer:
        try:
            yield Replica(buffer, process, config, model)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    await server.stop(0)
    print((directory / "rollout.log").read_text()[-8000:])


@pytest.fixture
async def replica(tmp_path: Path) -> AsyncIterator[Replica]:
    async with running(tmp_path, engines=1) as made:
        yield made


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Replica]:
    """A replica of two engines, with the router in front of them."""
    async with running(tmp_path, engines=2) as made:
        yield made


async def test_the_life_of_a_replica(replica: Replica) -> None:
    joining = await replica.until_state(pb.REPLICA_STATE_JOINING)
    engine_pid = joining.child_pids["engine-0"]
    epoch = (await replica.buffer.acquire_epoch("test")).epoch
    await replica.buffer.recover(epoch, 0)
    prompts = [sample_pb2.Prompt(text=f"{number}+{number}=", label="1") for number in range(GROUPS)]
    first = list((await replica.buffer.submit("first", prompts)).group_ids)

    # The first push leads to SERVING, and the published version to work.
    await replica.join("one")
    v0 = Version(epoch, 0)
    await replica.push(v0, "one", "IN_PLACE")
    await replica.buffer.publish_version(v0)
    await replica.until_more_tokens(20)

    # A push in the middle of generation: every token carries the version whose weights made it.
    old = copy.deepcopy(replica.model)
    with torch.no_grad():
        for parameter in replica.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    v1 = Version(epoch, 1)
    done = await replica.push(v1, "one", "RETRACT")
    assert done.requests_continued > 0
    assert done.requests_aborted == 0
    assert done.pause.ToNanoseconds() > 0
    await replica.until_generated(GROUPS * SAMPLES)
    samples = await replica.samples(first)
    two_spans = 0
    for sample in samples:
        under_old, under_new = logprobs(old, sample), logprobs(replica.model, sample)
        segment = sample.segments[0]
        got = wire.decode_logprobs(segment.rollout_logprobs)
        two_spans += len(segment.spans) == 2
        assert sample.engine.startswith("torch_engine/")
        for span in segment.spans:
            expected = under_old if Version.from_proto(span.version) == v0 else under_new
            np.testing.assert_allclose(got[span.start : span.end], expected[span.start : span.end], atol=2e-4)
    assert two_spans > 0

    # The engine dies while it generates: what had streamed is kept, the replica joins anew.
    second = list((await replica.buffer.submit("second", prompts)).group_ids)
    await replica.until_more_tokens(50)
    os.kill(engine_pid, signal.SIGKILL)
    await replica.until_state(pb.REPLICA_STATE_JOINING, not_pid=engine_pid)
    assert await replica.counters(sample_pb2.SAMPLE_STATE_GENERATING) == 0
    await replica.join("two")
    await replica.push(v1, "two", "IN_PLACE")
    await replica.until_generated(2 * GROUPS * SAMPLES)
    for sample in await replica.samples(second):
        got = wire.decode_logprobs(sample.segments[0].rollout_logprobs)
        np.testing.assert_allclose(got, logprobs(replica.model, sample), atol=2e-4)
    ledger = await replica.buffer.get_ledger()
    assert ledger.counters["tokens_generated"] == await replica.generated_tokens([*first, *second])

    # Told to stop in mid-work, it gives everything back and leaves nothing behind.
    await replica.buffer.submit("third", prompts)
    while not await replica.counters(sample_pb2.SAMPLE_STATE_GENERATING):
        await asyncio.sleep(0.02)
    children = psutil.Process(replica.process.pid).children(recursive=True)
    began = time.monotonic()
    replica.process.terminate()
    assert await asyncio.to_thread(replica.process.wait, 15) == 0
    assert time.monotonic() - began < 10
    assert await replica.counters(sample_pb2.SAMPLE_STATE_GENERATING) == 0
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert (await replica.state()).state in (pb.REPLICA_STATE_DEAD, pb.REPLICA_STATE_UNSPECIFIED)


@pytest.mark.long
async def test_one_engine_of_two_may_go_and_come_back(pair: Replica) -> None:
    joining, serving = pb.REPLICA_STATE_JOINING, pb.REPLICA_STATE_SERVING
    seen = await pair.until_engines(joining, joining)
    assert sorted(seen.child_pids) == ["engine-0", "engine-1", "router"]
    epoch = (await pair.buffer.acquire_epoch("test")).epoch
    await pair.buffer.recover(epoch, 0)
    v0, v1 = Version(epoch, 0), Version(epoch, 1)
    for engine in (0, 1):
        await pair.join(f"first-{engine}", engine)
        await pair.push(v0, f"first-{engine}", "IN_PLACE", engine)
    await pair.buffer.publish_version(v0)
    await pair.until_engines(serving, serving)
    prompts = [sample_pb2.Prompt(text=f"{number}+{number}=", label="1") for number in range(GROUPS)]

    # One dies in the middle of its work: the other finishes it, from the record; nothing goes back to the buffer.
    first = list((await pair.buffer.submit("first", prompts)).group_ids)
    await pair.until_more_tokens(50)
    os.kill(seen.child_pids["engine-1"], signal.SIGKILL)
    await pair.until_generated(GROUPS * SAMPLES)
    assert (await pair.state()).state == serving

    # It comes back without weights, and gets work after a push of its own; the push of the other goes its own way.
    await pair.until_engines(serving, joining)
    await pair.join("second-1", 1)
    await pair.push(v0, "second-1", "IN_PLACE", 1)
    await pair.until_engines(serving, serving)
    second = list((await pair.buffer.submit("second", prompts)).group_ids)
    await pair.until_more_tokens(50)
    old = copy.deepcopy(pair.model)
    with torch.no_grad():
        for parameter in pair.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    for engine, group in enumerate(("first-0", "second-1")):
        await pair.push(v1, group, "RETRACT", engine)

    # The router dies: what was running through it goes on when it is back.
    third = list((await pair.buffer.submit("third", prompts)).group_ids)
    await pair.until_more_tokens(50)
    router = (await pair.state()).child_pids["router"]
    os.kill(router, signal.SIGKILL)
    await pair.until_generated(3 * GROUPS * SAMPLES)
    await pair.until(lambda seen: seen.child_pids.get("router", router) != router)

    versions = set()
    for sample in await pair.samples([*first, *second, *third]):
        under = {v0: logprobs(old, sample), v1: logprobs(pair.model, sample)}
        segment = sample.segments[0]
        got = wire.decode_logprobs(segment.rollout_logprobs)
        for span in segment.spans:
            version = Version.from_proto(span.version)
            versions.add(version)
            np.testing.assert_allclose(got[span.start : span.end], under[version][span.start : span.end], atol=2e-4)
    assert versions == {v0, v1}
    ledger = await pair.buffer.get_ledger()
    assert ledger.counters["tokens_generated"] == await pair.generated_tokens([*first, *second, *third])

    children = psutil.Process(pair.process.pid).children(recursive=True)
    pair.process.terminate()
    assert await asyncio.to_thread(pair.process.wait, 15) == 0
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
