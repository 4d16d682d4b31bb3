"""The buffer's verbs as async methods: deadlines set, transport failures retried, refusals as typed errors."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Self

import grpc
import stamina
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import buffer_pb2_grpc, sample_pb2
from services.common import rpc
from services.common.errors import LimitError, PolyheadError, UnavailableError, from_rpc_error
from services.common.splice import Spliced
from services.common.versions import Version

CALL_TIMEOUT_S = 10.0
# A long poll is given this much on top of its wait before the transport is taken for broken.
POLL_SLACK_S = 5.0
RETRY_FOR_S = 60.0

_TRANSIENT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    # gRPC sheds load with CANCELLED when thousands of calls are pending.
    grpc.StatusCode.CANCELLED,
}


def _is_transient(error: Exception) -> bool:
    if isinstance(error, UnavailableError):
        return True
    return isinstance(error, grpc.aio.AioRpcError) and error.code() in _TRANSIENT


def _kind(code: grpc.StatusCode) -> type[PolyheadError]:
    """The error for a status that no service typed: only what may pass by itself is worth waiting for."""
    if code in _TRANSIENT:
        return UnavailableError
    return LimitError if code is grpc.StatusCode.RESOURCE_EXHAUSTED else PolyheadError


class BufferClient:
    """One channel to the buffer. Every verb is safe to repeat, so each is retried for up to `retry_for_s`.

    Raises the typed errors of `services.common.errors`; UnavailableError when the buffer stays away, LimitError for a
    message that is too big, and PolyheadError when the buffer itself failed.
    """

    def __init__(self, address: str, *, retry_for_s: float = RETRY_FOR_S, message_mb: int = 64) -> None:
        self._channel = rpc.channel(address, message_mb=message_mb)
        self._stub = buffer_pb2_grpc.BufferServiceStub(self._channel)
        self._max_bytes = message_mb * rpc.MIB
        self._retry_for_s = retry_for_s
        self._address = address

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def submit(self, request_id: str, prompts: Sequence[sample_pb2.Prompt]) -> pb.SubmitResponse:
        return await self._call("Submit", pb.SubmitRequest(request_id=request_id, prompts=prompts))

    async def lease(
        self,
        stage: sample_pb2.Stage,
        replica_id: str,
        *,
        max_samples: int = 0,
        wait_s: float = 0.0,
        include_payload: bool = True,
        weight_version: Version | None = None,
        epoch: int = 0,
        step: int = 0,
    ) -> pb.LeaseResponse:
        """One logical call, however often it is repeated: what a lost answer had leased comes with the next one."""
        request = pb.LeaseRequest(
            stage=stage,
            replica_id=replica_id,
            max_samples=max_samples,
            include_payload=include_payload,
            weight_version=weight_version.to_proto() if weight_version else None,
            epoch=epoch,
            step=step,
            request_id="" if stage == sample_pb2.STAGE_TRAIN else uuid.uuid4().hex,
        )
        request.wait.CopyFrom(_duration(wait_s))
        return await self._call("Lease", request, timeout_s=wait_s + POLL_SLACK_S)

    async def fetch(self, sample_ids: Sequence[str], *, include_prompt: bool = False) -> pb.FetchResponse:
        return await self._call("Fetch", pb.FetchRequest(sample_ids=sample_ids, include_prompt=include_prompt))

    async def extend(self, replica_id: str, samples: Sequence[pb.ExtendedSample]) -> pb.ExtendResponse:
        return await self._call("Extend", pb.ExtendRequest(replica_id=replica_id, samples=samples))

    async def complete(
        self, stage: sample_pb2.Stage, replica_id: str, samples: Sequence[pb.CompletedSample]
    ) -> pb.CompleteResponse:
        request = Spliced(pb.CompleteRequest(stage=stage, replica_id=replica_id))
        for each in samples:
            request.append(pb.CompleteRequest.SAMPLES_FIELD_NUMBER, each.SerializeToString())
        return await self._call("Complete", request, biggest="samples")

    async def release(
        self, stage: sample_pb2.Stage, replica_id: str, samples: Sequence[pb.ReleasedSample]
    ) -> pb.ReleaseResponse:
        return await self._call("Release", pb.ReleaseRequest(stage=stage, replica_id=replica_id, samples=samples))

    async def list_partials(self, max_groups: int = 0) -> pb.ListPartialsResponse:
        return await self._call("ListPartials", pb.ListPartialsRequest(max_groups=max_groups))

    async def prefer_groups(self, group_ids: Sequence[str]) -> pb.PreferGroupsResponse:
        return await self._call("PreferGroups", pb.PreferGroupsRequest(group_ids=group_ids))

    async def commit_step(
        self,
        epoch: int,
        step: int,
        batch_lease_id: int,
        outcome: pb.StepOutcome = pb.STEP_OUTCOME_TRAINED,
    ) -> pb.CommitStepResponse:
        request = pb.CommitStepRequest(epoch=epoch, step=step, batch_lease_id=batch_lease_id, outcome=outcome)
        return await self._call("CommitStep", request)

    async def publish_version(self, version: Version) -> pb.PublishVersionResponse:
        return await self._call("PublishVersion", pb.PublishVersionRequest(version=version.to_proto()))

    async def get_watermark(self, epoch: int, step: int) -> pb.Watermark:
        response = await self._call("GetWatermark", pb.GetWatermarkRequest(epoch=epoch, step=step))
        return response.watermark

    async def confirm_checkpoint(self, epoch: int, oldest_kept_step: int) -> pb.ConfirmCheckpointResponse:
        request = pb.ConfirmCheckpointRequest(epoch=epoch, oldest_kept_step=oldest_kept_step)
        return await self._call("ConfirmCheckpoint", request)

    async def acquire_epoch(self, holder: str, known_epoch: int = 0) -> pb.AcquireEpochResponse:
        return await self._call("AcquireEpoch", pb.AcquireEpochRequest(holder=holder, known_epoch=known_epoch))

    async def recover(self, epoch: int, step: int, watermark: pb.Watermark | None = None) -> pb.RecoverResponse:
        return await self._call("Recover", pb.RecoverRequest(epoch=epoch, step=step, watermark=watermark))

    async def register_replica(self, replica: pb.Replica) -> pb.RegisterReplicaResponse:
        return await self._call("RegisterReplica", pb.RegisterReplicaRequest(replica=replica))

    async def list_replicas(self, role: pb.Role = pb.ROLE_UNSPECIFIED) -> list[pb.Replica]:
        response = await self._call("ListReplicas", pb.ListReplicasRequest(role=role))
        return list(response.replicas)

    async def get_ledger(self) -> pb.GetLedgerResponse:
        return await self._call("GetLedger", pb.GetLedgerRequest())

    async def list_samples(
        self, state: sample_pb2.SampleState, limit: int, page_token: str = ""
    ) -> pb.ListSamplesResponse:
        request = pb.ListSamplesRequest(state=state, limit=limit, page_token=page_token)
        return await self._call("ListSamples", request)

    async def requeue(self, sample_ids: Sequence[str]) -> pb.RequeueResponse:
        return await self._call("Requeue", pb.RequeueRequest(sample_ids=sample_ids))

    async def import_groups(self, request_id: str, groups: Sequence[pb.SampleGroup]) -> pb.ImportResponse:
        return await self._call("Import", pb.ImportRequest(request_id=request_id, groups=groups))

    async def _call(
        self, verb: str, request: Message | Spliced, timeout_s: float = CALL_TIMEOUT_S, biggest: str = ""
    ) -> Any:
        """`biggest` is the field that makes a spliced request big."""
        size = request.size if isinstance(request, Spliced) else request.ByteSize()
        if size > self._max_bytes:
            over = f"{size} bytes in one call, at most {self._max_bytes}"
            raise LimitError(over, field=f"{verb} {_biggest(request) if isinstance(request, Message) else biggest}")
        method = getattr(self._stub, verb)
        try:
            async for attempt in stamina.retry_context(
                on=_is_transient, attempts=None, timeout=self._retry_for_s, wait_initial=0.05, wait_max=2.0
            ):
                with attempt:
                    try:
                        return await method(request, timeout=timeout_s)
                    except grpc.aio.AioRpcError as error:
                        if (typed := from_rpc_error(error)) is not None:
                            raise typed from None
                        raise
        except grpc.aio.AioRpcError as error:
            kind = _kind(error.code())
            raise kind(f"buffer {verb} failed: {error.code().name} {error.details()}", field=self._address) from error
        raise AssertionError("unreachable: the retry loop returns or raises")


def _biggest(request: Message) -> str:
    """The name of the field that makes a message big: the one that repeats."""
    return next((field.name for field, _ in request.ListFields() if field.is_repeated), "")


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
