"""A buffer that knows only the score stage, over real gRPC, with faults to order."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.duration_pb2 import Duration

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import buffer_pb2_grpc, sample_pb2
from services.common import rpc
from services.common.errors import InvalidArgumentError
from services.common.process import free_port


@dataclass
class FakeBuffer(buffer_pb2_grpc.BufferServiceServicer):
    """Each sample is waiting, leased, or settled: in `scores`, or in `released` (UNAVAILABLE ones wait again)."""

    lease_ttl_s: float = 30.0
    whole: bool = False
    """Leases what is waiting as one group of four, whatever was asked for: a run with group rewards."""
    waiting: list[sample_pb2.Sample | bytes] = field(default_factory=list)
    leased: dict[int, str] = field(default_factory=dict)
    scores: dict[str, sample_pb2.Score] = field(default_factory=dict)
    released: list[pb.ReleasedSample] = field(default_factory=list)
    replicas: list[pb.Replica] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    refuse: set[str] = field(default_factory=set)
    """Complete calls with one of these are INVALID_ARGUMENT."""
    lost: set[str] = field(default_factory=set)
    """Extend calls answer LEASE_LOST for these."""
    extended: list[str] = field(default_factory=list)
    completed_together: list[list[str]] = field(default_factory=list)
    """The samples of each Complete call that was not refused."""

    def __post_init__(self) -> None:
        self._ids = itertools.count(1)
        self._samples: dict[str, sample_pb2.Sample | bytes] = {}
        self._changed = asyncio.Event()
        self._port = free_port()
        self._server: rpc.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    async def start(self) -> None:
        def register(server: Any) -> None:
            buffer_pb2_grpc.add_BufferServiceServicer_to_server(self, server)

        self._server = await rpc.serve(self.address, register, ["polyhead.v1.BufferService"])

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    def add(self, *samples: sample_pb2.Sample | bytes) -> None:
        self.waiting.extend(samples)
        self._notify()

    def known(self, sample: sample_pb2.Sample) -> None:
        """One that can only be fetched: it is scored."""
        self._samples[sample.sample_id] = sample

    async def until(self, condition: Any, timeout_s: float = 20.0) -> None:
        """Waits until `condition()` holds."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def Lease(self, request: pb.LeaseRequest, context: Any) -> pb.LeaseResponse:
        self.calls.append("Lease")
        self._notify()
        assert request.stage == sample_pb2.STAGE_SCORE
        assert request.max_samples > 0
        try:
            await self.until(lambda: self.waiting, request.wait.ToNanoseconds() / 1e9)
        except TimeoutError:
            return pb.LeaseResponse(waiting_for=pb.WaitingFor(stage=sample_pb2.STAGE_SCORE, reason="generation"))
        response = pb.LeaseResponse()
        response.lease_ttl.FromNanoseconds(int(self.lease_ttl_s * 1e9))
        while self.waiting and (
            self.whole or sum(len(group.samples) for group in response.groups) < request.max_samples
        ):
            self._lease_one(response, self.waiting.pop(0), payload=request.include_payload)
        if self.whole:
            rest = [sample for group in response.groups for sample in group.samples]
            del response.groups[:]
            response.groups.add(group_id="g00000001", group_size=4, order=1, samples=rest)
        self._notify()
        return response

    async def Fetch(self, request: pb.FetchRequest, context: Any) -> pb.FetchResponse:
        self.calls.append("Fetch")
        found = [(sample_id, self._samples.get(sample_id, b"")) for sample_id in request.sample_ids]
        return pb.FetchResponse(
            samples=[
                pb.FetchedSample(
                    sample_id=sample_id, sample=each if isinstance(each, bytes) else each.SerializeToString()
                )
                for sample_id, each in found
            ]
        )

    async def Extend(self, request: pb.ExtendRequest, context: Any) -> pb.ExtendResponse:
        self.calls.append("Extend")
        self.extended += [sample.sample_id for sample in request.samples]
        self._notify()
        return pb.ExtendResponse(
            results=[
                self._result(s, pb.OUTCOME_LEASE_LOST if s.sample_id in self.lost else pb.OUTCOME_OK)
                for s in request.samples
            ]
        )

    async def Complete(self, request: pb.CompleteRequest, context: Any) -> pb.CompleteResponse:
        self.calls.append("Complete")
        for number, sample in enumerate(request.samples):
            if sample.sample_id in self.refuse:
                raise InvalidArgumentError("refused by the test", field=f"samples[{number}]")
        self.completed_together.append([sample.sample_id for sample in request.samples])
        results = []
        for sample in request.samples:
            held = self.leased.pop(sample.lease_id, None)
            if held is not None:
                assert held not in self.scores, "scored twice"
                self.scores[held] = sample.score
            results.append(self._result(sample, pb.OUTCOME_OK if held else pb.OUTCOME_LEASE_LOST))
        self._notify()
        return pb.CompleteResponse(results=results)

    async def Release(self, request: pb.ReleaseRequest, context: Any) -> pb.ReleaseResponse:
        self.calls.append("Release")
        for sample in request.samples:
            if self.leased.pop(sample.lease_id, None) is not None:
                self.released.append(sample)
                if sample.reason == pb.RELEASE_REASON_UNAVAILABLE:
                    self.waiting.append(self._samples[sample.sample_id])
        self._notify()
        return pb.ReleaseResponse(results=[self._result(sample, pb.OUTCOME_OK) for sample in request.samples])

    async def RegisterReplica(self, request: pb.RegisterReplicaRequest, context: Any) -> pb.RegisterReplicaResponse:
        self.replicas.append(request.replica)
        self._notify()
        return pb.RegisterReplicaResponse(ttl=Duration(seconds=10))

    def _lease_one(self, response: pb.LeaseResponse, sample: sample_pb2.Sample | bytes, *, payload: bool) -> None:
        lease_id = next(self._ids)
        sample_id = sample.sample_id if isinstance(sample, sample_pb2.Sample) else f"broken-{lease_id}"
        self._samples[sample_id] = sample
        self.leased[lease_id] = sample_id
        payload_bytes = _bytes(sample) if payload else b""
        index = sample.index if isinstance(sample, sample_pb2.Sample) else 0
        leased = pb.LeasedSample(sample_id=sample_id, index=index, lease_id=lease_id, sample=payload_bytes)
        if isinstance(sample, sample_pb2.Sample):
            leased.record.completion_tokens = sum(each.num_tokens - each.prompt_length for each in sample.segments)
        response.groups.append(pb.LeasedGroup(group_id="g00000001", group_size=8, order=1, samples=[leased]))

    def _result(self, sample: Any, outcome: pb.Outcome) -> pb.SampleResult:
        return pb.SampleResult(sample_id=sample.sample_id, outcome=outcome)

    def _notify(self) -> None:
        self._changed.set()


def _bytes(sample: sample_pb2.Sample | bytes) -> bytes:
    return sample if isinstance(sample, bytes) else sample.SerializeToString()


def generated(number: int, completion: str, label: str = "42") -> sample_pb2.Sample:
    """A sample as rollout completes it, as far as scoring looks at it."""
    return sample_pb2.Sample(
        sample_id=f"g00000001-{number:03}",
        group_id="g00000001",
        index=number,
        prompt=sample_pb2.Prompt(text="What?", label=label),
        segments=[sample_pb2.Segment(num_tokens=12, prompt_length=4)],
        completion=completion,
        finish_reason=sample_pb2.FINISH_REASON_STOP,
    )
