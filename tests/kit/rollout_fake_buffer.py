"""A BufferService of one process with just the rollout's verbs, which fails on demand. Not a model of the real one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import buffer_pb2_grpc, sample_pb2
from services.common import rpc, wire
from services.common.errors import InvalidArgumentError, PolyheadError, UnavailableError

Context = grpc.aio.ServicerContext


@dataclass
class Held:
    """One sample of the fake store."""

    sample_id: str
    index: int
    group: str
    lease_id: int = 0
    leased: bool = False
    attempts: int = 0
    deltas: list[sample_pb2.TokenDelta] = field(default_factory=list)
    sample: sample_pb2.Sample | None = None
    released: pb.ReleasedSample | None = None

    @property
    def saved(self) -> int:
        return sum(len(delta.token_ids) // wire.TOKEN_DTYPE.itemsize for delta in self.deltas)

    @property
    def saved_tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in wire.decode_tokens(delta.token_ids).tolist()]


class FakeBuffer(buffer_pb2_grpc.BufferServiceServicer):
    """Released samples are pending again unless they were dropped or fatal."""

    def __init__(self) -> None:
        self.samples: dict[str, Held] = {}
        self.prompts: dict[str, sample_pb2.Prompt] = {}
        self.replicas: list[pb.Replica] = []
        self.requests: list[tuple[str, Any]] = []
        self.down = False
        self.apply_extend_then_fail = 0
        self.refuse_samples_with_finish: int | None = None
        self.refuse_extending: dict[str, PolyheadError] = {}
        """By sample: what an Extend with tokens of it is answered."""
        self.refuse_complete: dict[str, PolyheadError] = {}
        self.ttl_s = 30.0
        self.releasing = True
        """Released samples may be leased again."""
        self._next_lease = 1
        self._server: rpc.Server | None = None

    async def start(self, address: str = "127.0.0.1:0") -> str:
        self._server = await rpc.serve(
            address, lambda server: buffer_pb2_grpc.add_BufferServiceServicer_to_server(self, server), []
        )
        return self._server.address

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)

    def add_group(self, text: str, size: int, **prompt: str) -> list[Held]:
        order = len(self.prompts)
        group_id = f"g{order:08d}"
        self.prompts[group_id] = sample_pb2.Prompt(text=text, **prompt) if text else sample_pb2.Prompt(**prompt)
        held = [Held(f"{group_id}-{index:03d}", index, group_id) for index in range(size)]
        self.samples.update({sample.sample_id: sample for sample in held})
        return held

    def count(self, verb: str) -> int:
        return sum(name == verb for name, _ in self.requests)

    def lose_lease(self, sample: Held) -> None:
        """As if it had expired and somebody else had leased it."""
        sample.lease_id = self._take_lease_id()

    async def Lease(self, request: pb.LeaseRequest, context: Context) -> pb.LeaseResponse:
        self._check("Lease", request)
        deadline = asyncio.get_running_loop().time() + request.wait.ToTimedelta().total_seconds()
        while True:
            groups = self._lease(request.max_samples)
            if groups or asyncio.get_running_loop().time() >= deadline:
                break
            await asyncio.sleep(0.01)
        response = pb.LeaseResponse(groups=groups)
        response.lease_ttl.FromNanoseconds(int(self.ttl_s * 1e9))
        return response

    async def Extend(self, request: pb.ExtendRequest, context: Context) -> pb.ExtendResponse:
        self._check("Extend", request)
        self._refuse(self.refuse_extending, [item.sample_id for item in request.samples if item.HasField("delta")])
        response = pb.ExtendResponse(results=[self._extend(sample) for sample in request.samples])
        if self.apply_extend_then_fail:
            self.apply_extend_then_fail -= 1
            raise UnavailableError("the answer is lost")
        return response

    async def Complete(self, request: pb.CompleteRequest, context: Context) -> pb.CompleteResponse:
        self._check("Complete", request)
        self._refuse(self.refuse_complete, [item.sample_id for item in request.samples])
        parsed = [
            wire.parse_sample(item.sample, max_bytes=1 << 20, max_tokens=4096, max_metadata_bytes=4096)
            for item in request.samples
        ]
        if any(sample.finish_reason == self.refuse_samples_with_finish for sample in parsed):
            raise InvalidArgumentError("not this one", field="sample")
        results = []
        for item, sample in zip(request.samples, parsed, strict=True):
            held = self._leased(item.sample_id, item.lease_id)
            if held is not None:
                assert held.sample is None, "completed twice"
                held.sample, held.leased = sample, False
            results.append(_result(item.sample_id, held))
        return pb.CompleteResponse(results=results)

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        self._check("Release", request)
        results = []
        for item in request.samples:
            held = self._leased(item.sample_id, item.lease_id)
            if held is not None:
                held.released, held.leased = item, False
                held.attempts += item.reason == pb.RELEASE_REASON_SAMPLE_ERROR
            results.append(_result(item.sample_id, held))
        return pb.ReleaseResponse(results=results)

    async def RegisterReplica(self, request: pb.RegisterReplicaRequest, context: Context) -> pb.RegisterReplicaResponse:
        self._check("RegisterReplica", request)
        self.replicas.append(request.replica)
        return pb.RegisterReplicaResponse()

    def _check(self, verb: str, request: Any) -> None:
        if self.down:
            raise UnavailableError("down", field="buffer")
        self.requests.append((verb, request))

    def _refuse(self, refusals: dict[str, PolyheadError], sample_ids: Iterable[str]) -> None:
        for sample_id in sample_ids:
            if sample_id in refusals:
                raise refusals[sample_id]

    def _take_lease_id(self) -> int:
        self._next_lease += 1
        return self._next_lease

    def _lease(self, max_samples: int) -> list[pb.LeasedGroup]:
        groups: dict[str, pb.LeasedGroup] = {}
        for held in self.samples.values():
            final = held.released is not None and held.released.reason in (
                pb.RELEASE_REASON_DROP,
                pb.RELEASE_REASON_FATAL,
            )
            again = held.released is None or (self.releasing and not final)
            if max_samples and not held.leased and held.sample is None and again:
                max_samples -= 1
                held.lease_id, held.leased = self._take_lease_id(), True
                group = groups.setdefault(
                    held.group,
                    pb.LeasedGroup(
                        group_id=held.group,
                        prompt=self.prompts[held.group],
                        prompt_ordinal=int(held.group[1:]),
                    ),
                )
                group.samples.append(
                    pb.LeasedSample(
                        sample_id=held.sample_id,
                        index=held.index,
                        lease_id=held.lease_id,
                        attempt=held.attempts,
                        partial=held.deltas,
                    )
                )
        return list(groups.values())

    def _leased(self, sample_id: str, lease_id: int) -> Held | None:
        held = self.samples[sample_id]
        return held if held.leased and held.lease_id == lease_id else None

    def _extend(self, item: pb.ExtendedSample) -> pb.SampleResult:
        held = self._leased(item.sample_id, item.lease_id)
        if held is not None and item.HasField("delta"):
            if item.delta.from_token != held.saved:
                return pb.SampleResult(sample_id=item.sample_id, outcome=pb.OUTCOME_CONFLICT, saved_tokens=held.saved)
            held.deltas.append(item.delta)
        return _result(item.sample_id, held)


def _result(sample_id: str, held: Held | None) -> pb.SampleResult:
    return pb.SampleResult(sample_id=sample_id, outcome=pb.OUTCOME_OK if held is not None else pb.OUTCOME_LEASE_LOST)
