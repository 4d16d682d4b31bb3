# ruff: noqa: N802 - gRPC names the methods
"""The buffer's gRPC face: checks requests, issues prompts, lets leases wait. Keeps nothing that the store does not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import structlog
from google.protobuf.duration_pb2 import Duration

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import buffer_pb2_grpc, sample_pb2
from services.buffer import convert, operator_checks, policy, records, validation
from services.buffer.field_checks import check_count, check_name, check_step
from services.buffer.ids import SampleRef, group_id, parse_sample_id
from services.buffer.memory_watch import MemoryWatch
from services.buffer.prompts import PromptSource
from services.buffer.records import IssuedPrompt, LeasedGroup, Released
from services.buffer.store import Store
from services.buffer.wakeups import Wakeups
from services.common.blobs import Blobs
from services.common.config.models import BufferConfig
from services.common.errors import InvalidArgumentError, LimitError, PolyheadError, UnavailableError
from services.common.rpc import MIB
from services.common.splice import Spliced
from services.common.versions import Version

log = structlog.get_logger()

MAX_WAIT_S = 60.0
_STAGES = (sample_pb2.STAGE_GENERATE, sample_pb2.STAGE_SCORE, sample_pb2.STAGE_TRAIN)


class BufferService(buffer_pb2_grpc.BufferServiceServicer):
    """`source` is None for a run that only gets submitted prompts, `blobs` for one whose samples refer to none."""

    def __init__(
        self,
        store: Store,
        source: PromptSource | None,
        watch: MemoryWatch,
        config: BufferConfig,
        group_size: int,
        blobs: Blobs | None = None,
    ) -> None:
        self._store = store
        self._source = source
        self._watch = watch
        self._config = config
        self._group_size = group_size
        self._blobs = blobs
        self.retired = asyncio.Event()
        self._wakeups = Wakeups()
        # Of the payloads, partials and prompts in an answer: the other half is for records and one more sample.
        self._answer_bytes = config.limits.message_mb * MIB // 2
        self._lease_ttl = _duration(config.lease_ttl_s)
        self._returning: set[asyncio.Task[None]] = set()

    async def Submit(self, request: pb.SubmitRequest, context: Any) -> pb.SubmitResponse:
        prompts = validation.prompts(request, self._config.limits)
        orders = await self._store.submit(request.request_id, prompts)
        self._wakeups.wake(sample_pb2.STAGE_GENERATE)
        return pb.SubmitResponse(group_ids=[group_id(order) for order in orders])

    async def Lease(self, request: pb.LeaseRequest, context: Any) -> Spliced:
        validation.check_lease(request)
        request.max_samples = min(request.max_samples, self._config.limits.samples_per_rpc)
        clock = asyncio.get_running_loop().time
        until = clock() + min(request.wait.ToNanoseconds() / 1e9, MAX_WAIT_S)
        version = request.weight_version
        kind = (version.epoch, version.step) if request.stage == sample_pb2.STAGE_GENERATE else None
        while True:
            with self._wakeups.queue(request.stage, kind) as ticket:
                lease = await self._lease_unless_cancelled(request)
                left_s = until - clock()
                if lease.groups or left_s <= 0 or _is_in_vain(lease) or not await ticket.wait(left_s):
                    return self._lease_response(request, lease)

    async def _lease_unless_cancelled(self, request: pb.LeaseRequest) -> records.Lease:
        """Leases; what a caller who hung up meanwhile was given goes back at once instead of when its time is over."""
        leasing = asyncio.ensure_future(self._lease(request))
        try:
            return await asyncio.shield(leasing)
        except asyncio.CancelledError:
            task = asyncio.ensure_future(self._return(request.stage, leasing))
            self._returning.add(task)
            task.add_done_callback(self._returning.discard)
            raise

    async def _return(self, stage: sample_pb2.Stage, leasing: asyncio.Future[records.Lease]) -> None:
        try:
            lease = await leasing
            if stage != sample_pb2.STAGE_TRAIN:  # a batch is its trainer's, whoever asks
                await self._release_all(stage, lease)
        except PolyheadError as error:  # the leases end by themselves
            log.info("lease_not_returned", reason=str(error))

    async def _release_all(self, stage: sample_pb2.Stage, lease: records.Lease) -> None:
        samples = [
            Released(SampleRef(group.order, sample.index), sample.lease_id, pb.RELEASE_REASON_DRAIN)
            for group in lease.groups
            for sample in group.samples
        ]
        if samples:
            await self._store.release(stage, samples)
            self._wakeups.wake(stage)

    async def _lease(self, request: pb.LeaseRequest) -> records.Lease:
        if request.stage == sample_pb2.STAGE_TRAIN:
            lease = await self._store.lease_train(
                request.epoch, request.step, payload=request.include_payload, max_bytes=self._answer_bytes
            )
        elif request.stage == sample_pb2.STAGE_SCORE:
            lease = await self._store.lease_score(
                request.replica_id,
                request.max_samples,
                payload=request.include_payload,
                request_id=request.request_id,
                max_bytes=self._answer_bytes,
            )
        else:
            lease = await self._lease_generate(request)
        if lease.closed_groups:
            self._wakeups.wake(sample_pb2.STAGE_GENERATE)
        if lease.groups and lease.left_over:
            self._wakeups.wake(request.stage)
        return lease

    async def _lease_generate(self, request: pb.LeaseRequest) -> records.Lease:
        """Leases, issuing prompts as long as there is room for more groups than the store holds."""
        groups: list[LeasedGroup] = []
        closed = 0
        try:
            while True:
                lease = await self._lease_generate_turn(request, groups)
                groups += lease.groups
                closed += lease.closed_groups
                if not lease.wanted or self._source is None:
                    return records.Lease(groups, lease.waiting, closed_groups=closed, left_over=lease.left_over)
                prompts = [IssuedPrompt(at, self._source.prompt(at).SerializeToString()) for at in lease.wanted]
                await self._store.issue(lease.cursor, prompts)
        except PolyheadError as error:
            if not groups:
                raise
            log.warning("lease_cut_short", groups=len(groups), reason=str(error))
            return records.Lease(groups, closed_groups=closed, left_over=True)

    async def _lease_generate_turn(self, request: pb.LeaseRequest, groups: Sequence[LeasedGroup]) -> records.Lease:
        """What is still wanted beside `groups`, which earlier turns of the same request have leased."""
        return await self._store.lease_generate(
            request.replica_id,
            request.max_samples - _count(groups),
            Version.from_proto(request.weight_version),
            admit=self._watch.admit,
            request_id=request.request_id,
            more=bool(groups),
            max_bytes=max(0, self._answer_bytes - _size(groups)),
        )

    def _lease_response(self, request: pb.LeaseRequest, lease: records.Lease) -> Spliced:
        response = pb.LeaseResponse(batch_lease_id=lease.batch_lease_id)
        if not lease.groups and lease.waiting is not None:
            waiting = self._reason(request.stage, lease.waiting)
            response.waiting_for.CopyFrom(convert.waiting_for(request.stage, waiting))
        if request.stage != sample_pb2.STAGE_TRAIN:
            response.lease_ttl.CopyFrom(self._lease_ttl)
        answer = Spliced(response)
        for group in lease.groups:
            answer.append(pb.LeaseResponse.GROUPS_FIELD_NUMBER, convert.leased_group(group, self._group_size))
        return answer

    def _reason(self, stage: int, waiting: records.Waiting) -> records.Waiting:
        """What is behind a reason of the store, which does not know why no group is admitted."""
        closed_for_memory = stage == sample_pb2.STAGE_TRAIN and not self._watch.admit
        return policy.for_memory(waiting) if closed_for_memory else waiting

    async def Fetch(self, request: pb.FetchRequest, context: Any) -> Spliced:
        ids = check_count(request.sample_ids, self._config.limits, "sample_ids")
        refs = [parse_sample_id(each, f"sample_ids[{number}]") for number, each in enumerate(ids)]
        found = await self._store.fetch(refs, prompts=request.include_prompt)
        size = sum(len(each.payload) + len(each.partial) + len(each.prompt) for each in found)
        if size > self._config.limits.message_mb * MIB:
            raise LimitError(f"{size} bytes in one answer: fetch fewer samples at a time", field="sample_ids")
        return convert.fetched(ids, found)

    async def Extend(self, request: pb.ExtendRequest, context: Any) -> pb.ExtendResponse:
        samples = validation.extensions(request, self._config.limits)
        report = await self._store.extend(samples)
        return pb.ExtendResponse(results=convert.results(samples, report))

    async def Complete(self, request: pb.CompleteRequest, context: Any) -> pb.CompleteResponse:
        if request.stage == sample_pb2.STAGE_GENERATE:
            samples = validation.generated(request, self._config.limits, self._blobs)
            report = await self._store.complete_generate(samples)
            self._wakeups.wake(sample_pb2.STAGE_SCORE)
            return pb.CompleteResponse(results=convert.results(samples, report))
        if request.stage == sample_pb2.STAGE_SCORE:
            scored = validation.scored(request, self._config.limits)
            report = await self._store.complete_score(scored)
            self._wake(report.ready_groups, report.closed_groups)
            return pb.CompleteResponse(results=convert.results(scored, report))
        raise InvalidArgumentError("must be GENERATE or SCORE: a batch is completed by CommitStep", field="stage")

    async def Release(self, request: pb.ReleaseRequest, context: Any) -> pb.ReleaseResponse:
        samples = validation.released(request, self._config.limits)
        report = await self._store.release(request.stage, samples)
        for each in samples:
            if each.error:
                log.warning("sample_released", order=each.ref.order, index=each.ref.index, error=each.error)
        self._wakeups.wake(request.stage)
        self._wake(report.ready_groups, report.closed_groups)
        return pb.ReleaseResponse(results=convert.results(samples, report))

    async def ListPartials(self, request: pb.ListPartialsRequest, context: Any) -> Spliced:
        most = min(request.max_groups or policy.MAX_PARTIALS, policy.MAX_PARTIALS)
        answer = Spliced(pb.ListPartialsResponse())
        for number, group in enumerate(await self._store.partials(most)):
            message = convert.leased_group(group, self._group_size)
            if number and answer.size + message.size > self._answer_bytes:
                break
            answer.append(pb.ListPartialsResponse.GROUPS_FIELD_NUMBER, message)
        return answer

    async def PreferGroups(self, request: pb.PreferGroupsRequest, context: Any) -> pb.PreferGroupsResponse:
        await self._store.prefer(validation.preferred(request))
        return pb.PreferGroupsResponse()

    async def CommitStep(self, request: pb.CommitStepRequest, context: Any) -> pb.CommitStepResponse:
        validation.check_commit(request)
        trained = request.outcome == pb.STEP_OUTCOME_TRAINED
        applied = await self._store.commit_step(request.epoch, request.step, request.batch_lease_id, trained=trained)
        if not trained:
            log.warning("step_skipped", epoch=request.epoch, step=request.step)
            self._wakeups.wake(sample_pb2.STAGE_GENERATE)
        return pb.CommitStepResponse(applied=applied, checkpoint_wanted=self._watch.checkpoint_wanted)

    async def PublishVersion(self, request: pb.PublishVersionRequest, context: Any) -> pb.PublishVersionResponse:
        if not request.HasField("version"):
            raise InvalidArgumentError("must be given", field="version")
        check_step(request.version.step, "version.step")
        await self._store.publish_version(Version.from_proto(request.version))
        self._wakeups.wake_all(sample_pb2.STAGE_GENERATE)
        return pb.PublishVersionResponse()

    async def GetWatermark(self, request: pb.GetWatermarkRequest, context: Any) -> pb.GetWatermarkResponse:
        record = await self._store.watermark(request.epoch, check_step(request.step, "step"))
        return pb.GetWatermarkResponse(watermark=convert.watermark(record))

    async def ConfirmCheckpoint(
        self, request: pb.ConfirmCheckpointRequest, context: Any
    ) -> pb.ConfirmCheckpointResponse:
        kept = check_step(request.oldest_kept_step, "oldest_kept_step")
        retired = await self._store.confirm_checkpoint(request.epoch, kept)
        if retired:
            self.retired.set()
        return pb.ConfirmCheckpointResponse(retired_samples=retired)

    async def AcquireEpoch(self, request: pb.AcquireEpochRequest, context: Any) -> pb.AcquireEpochResponse:
        check_name(request.holder, "holder")
        epoch, step = await self._store.acquire_epoch(validation.check_known_epoch(request))
        log.info("epoch_acquired", epoch=epoch, step=step, holder=request.holder)
        return pb.AcquireEpochResponse(epoch=epoch, step=step)

    async def Recover(self, request: pb.RecoverRequest, context: Any) -> pb.RecoverResponse:
        validation.check_recover(request)
        watermark = convert.watermark_record(request.watermark) if request.HasField("watermark") else None
        recovered = await self._store.recover(request.epoch, request.step, watermark)
        log.info("recovered", epoch=request.epoch, step=request.step, returned_groups=recovered.returned_groups)
        for stage in _STAGES:
            self._wakeups.wake_all(stage)
        return pb.RecoverResponse(returned_groups=recovered.returned_groups, replayed_steps=recovered.replayed_steps)

    async def RegisterReplica(self, request: pb.RegisterReplicaRequest, context: Any) -> pb.RegisterReplicaResponse:
        replica, ttl_s = request.replica, self._config.replica_ttl_s
        validation.check_replica(replica, self._config.limits)
        data = replica.SerializeToString()
        floor = await self._store.register_replica(replica.replica_id, data, int(ttl_s * 1000))
        return pb.RegisterReplicaResponse(ttl=_duration(ttl_s), floor_version=floor.to_proto() if floor else None)

    async def ListReplicas(self, request: pb.ListReplicasRequest, context: Any) -> pb.ListReplicasResponse:
        replicas = [pb.Replica.FromString(data) for data in await self._store.list_replicas()]
        return pb.ListReplicasResponse(
            replicas=[each for each in replicas if request.role in (pb.ROLE_UNSPECIFIED, each.role)]
        )

    async def GetLedger(self, request: pb.GetLedgerRequest, context: Any) -> pb.GetLedgerResponse:
        record = await self._store.ledger(admit=self._watch.admit)
        waiting = {
            stage: self._reason(stage, reason)
            for stage, reason in record.waiting.items()
            # with a data set, a lease would issue prompts instead of waiting for them
            if self._source is None or reason.code != "prompts"
        }
        return convert.ledger(replace(record, waiting=waiting))

    async def ListSamples(self, request: pb.ListSamplesRequest, context: Any) -> pb.ListSamplesResponse:
        start = operator_checks.page(request, self._config.limits)
        return convert.page(await self._store.list_samples(request.state, start, request.limit))

    async def Requeue(self, request: pb.RequeueRequest, context: Any) -> pb.RequeueResponse:
        ids = check_count(request.sample_ids, self._config.limits, "sample_ids")
        refs = [parse_sample_id(each, f"sample_ids[{number}]") for number, each in enumerate(ids)]
        found = await self._store.requeue(refs)
        self._wakeups.wake(sample_pb2.STAGE_GENERATE)
        return pb.RequeueResponse(results=convert.requeued(ids, found))

    async def Import(self, request: pb.ImportRequest, context: Any) -> pb.ImportResponse:
        groups = operator_checks.imported(request, self._config.limits, self._group_size, self._blobs)
        if not self._watch.admit:
            raise UnavailableError("the store's memory is short: no group is admitted", field="groups")
        orders, ready_groups = await self._store.import_groups(request.request_id, groups)
        self._wakeups.wake(sample_pb2.STAGE_SCORE)
        self._wake(ready_groups, 0)
        return pb.ImportResponse(group_ids=[group_id(order) for order in orders])

    def _wake(self, ready_groups: int, closed_groups: int) -> None:
        if ready_groups:
            self._wakeups.wake(sample_pb2.STAGE_TRAIN)
        if closed_groups:
            self._wakeups.wake(sample_pb2.STAGE_GENERATE)


def _is_in_vain(lease: records.Lease) -> bool:
    """Whether nothing that may arrive changes the answer: the caller has to come with another weight version."""
    return lease.waiting is not None and lease.waiting.code in policy.VERSION_REFUSED


def _count(groups: Sequence[LeasedGroup]) -> int:
    return sum(len(group.samples) for group in groups)


def _size(groups: Sequence[LeasedGroup]) -> int:
    """Bytes of the prompts and partials."""
    return sum(len(group.prompt) + sum(len(sample.partial) for sample in group.samples) for group in groups)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
