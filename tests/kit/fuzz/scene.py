"""Honest clients of a buffer: a run that goes on whatever else is sent, and its requests as they might be now."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import ClassVar

import grpc
from google.protobuf.message import Message

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import buffer_pb2_grpc, sample_pb2
from services.common import wire
from services.common.versions import Version

GENERATE, SCORE, TRAIN = sample_pb2.STAGE_GENERATE, sample_pb2.STAGE_SCORE, sample_pb2.STAGE_TRAIN
TIMEOUT_S = 30.0


class Scene:
    """A replica of each role. `advance` does their work, `request` says what one of them might be sending."""

    def __init__(self, channel: grpc.Channel, rng: random.Random, group_size: int) -> None:
        self._stub = buffer_pb2_grpc.BufferServiceStub(channel)
        self._rng = rng
        self._group_size = group_size
        self._names = itertools.count()
        self._epoch = 0
        self._step = 0
        self._version = Version(0, 0)
        self._mark = pb.Watermark()
        self._groups: Sequence[pb.LeasedGroup] = ()
        self._stage = GENERATE
        self._batch = pb.LeaseResponse()
        self.trained = 0

    def ledger(self) -> pb.GetLedgerResponse:
        return self._stub.GetLedger(pb.GetLedgerRequest(), timeout=TIMEOUT_S)

    def advance(self) -> None:
        """One round of generating, scoring and training. What others did meanwhile may leave it little to do."""
        ledger = self.ledger()
        assert ledger.imbalance == 0, ledger
        try:
            self._take_over(ledger)
            self._generate(self._lease(GENERATE, weight_version=self._version.to_proto()))
            self._score(self._lease(SCORE, include_payload=True))
            self._train()
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.FAILED_PRECONDITION:
                raise
            self._epoch = 0  # somebody else is the trainer, or was for a while

    def _take_over(self, ledger: pb.GetLedgerResponse) -> None:
        self._step = ledger.step
        if self._epoch != ledger.epoch or not ledger.HasField("published") or not self._epoch:
            acquired = self._stub.AcquireEpoch(pb.AcquireEpochRequest(holder="honest"), timeout=TIMEOUT_S)
            self._epoch, self._step = acquired.epoch, acquired.step
            self._stub.Recover(pb.RecoverRequest(epoch=self._epoch, step=self._step), timeout=TIMEOUT_S)
            self._publish()
        elif ledger.published.step < ledger.step:
            self._publish()
        else:
            self._version = Version.from_proto(ledger.published)

    def _publish(self) -> None:
        self._version = Version(self._epoch, self._step)
        self._stub.PublishVersion(pb.PublishVersionRequest(version=self._version.to_proto()), timeout=TIMEOUT_S)

    def _lease(self, stage: sample_pb2.Stage, **fields: object) -> pb.LeaseResponse:
        request = pb.LeaseRequest(stage=stage, replica_id="honest", max_samples=8, **fields)
        leased = self._stub.Lease(request, timeout=TIMEOUT_S)
        if leased.groups:
            self._groups, self._stage = leased.groups, stage
        return leased

    def _generate(self, leased: pb.LeaseResponse) -> None:
        self._stub.Extend(self._extend(leased.groups), timeout=TIMEOUT_S)
        # Some stay leased, until their time is over.
        done = [self._completed(group, each) for group, each in _each(leased.groups) if self._rng.random() < 0.9]
        self._stub.Complete(pb.CompleteRequest(stage=GENERATE, replica_id="honest", samples=done), timeout=TIMEOUT_S)

    def _score(self, leased: pb.LeaseResponse) -> None:
        rows = [self._scored(each) for _, each in _each(leased.groups)]
        self._stub.Complete(pb.CompleteRequest(stage=SCORE, replica_id="honest", samples=rows), timeout=TIMEOUT_S)

    def _train(self) -> None:
        request = pb.LeaseRequest(
            stage=TRAIN, replica_id="honest", epoch=self._epoch, step=self._step + 1, include_payload=True
        )
        self._batch = self._stub.Lease(request, timeout=TIMEOUT_S)
        if not self._batch.groups:
            return
        for _, each in _each(self._batch.groups):
            sample_pb2.Sample.FromString(each.sample)
        self._stub.CommitStep(self._commit(), timeout=TIMEOUT_S)
        self._step += 1
        self.trained += 1
        self._publish()
        asked = pb.GetWatermarkRequest(epoch=self._epoch, step=self._step)
        self._mark = self._stub.GetWatermark(asked, timeout=TIMEOUT_S).watermark
        kept = pb.ConfirmCheckpointRequest(epoch=self._epoch, oldest_kept_step=max(0, self._step - 2))
        self._stub.ConfirmCheckpoint(kept, timeout=TIMEOUT_S)

    # --- what might be sent now -------------------------------------------------------------------------------------

    def request(self) -> tuple[str, Message]:
        """A method's name and a message for it."""
        name = self._rng.choice(list(self._makers))
        return name, self._makers[name](self)

    def _some(self) -> list[tuple[pb.LeasedGroup, pb.LeasedSample]]:
        every = list(_each(self._groups))
        return self._rng.sample(every, min(len(every), self._rng.choice((1, 2, 4))))

    def _ids(self) -> list[str]:
        return [each.sample_id for _, each in self._some()]

    def _name(self) -> str:
        return f"name-{next(self._names)}"

    def _prompt(self) -> sample_pb2.Prompt:
        tools = '[{"type": "function"}]'
        if self._rng.random() < 0.5:
            return sample_pb2.Prompt(text="1+1=", label="2", metadata_json='{"a": [1, 2.5]}', tools_json=tools)
        return sample_pb2.Prompt(messages_json='[{"role": "user", "content": "1+1="}]', metadata_json='{"a": "b"}')

    def _sample(self, prompt: sample_pb2.Prompt) -> sample_pb2.Sample:
        middle = self._version.to_proto()
        spans = [
            sample_pb2.WeightVersionSpan(version=middle, start=0, end=2, kv=sample_pb2.KV_ORIGIN_FRESH),
            sample_pb2.WeightVersionSpan(version=middle, start=2, end=3, kv=sample_pb2.KV_ORIGIN_CARRIED),
        ]
        segment = sample_pb2.Segment(
            token_ids=wire.encode_tokens([1, 2, 3, 4, 5]),
            num_tokens=5,
            prompt_length=2,
            loss_mask=wire.encode_mask([1, 0, 1]),
            rollout_logprobs=wire.encode_logprobs([-0.1, -0.2, -0.3]),
            spans=spans,
            first_token_unix_us=1,
            last_token_unix_us=2,
        )
        return sample_pb2.Sample(
            prompt=prompt,
            sampling=sample_pb2.SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=3),
            segments=[segment],
            completion="three",
            finish_reason=sample_pb2.FINISH_REASON_STOP,
            engine="fuzz/1",
        )

    def _completed(self, group: pb.LeasedGroup, each: pb.LeasedSample) -> pb.CompletedSample:
        sample = self._sample(group.prompt)
        sample.sample_id, sample.group_id, sample.index = each.sample_id, group.group_id, each.index
        data = sample.SerializeToString()
        return pb.CompletedSample(sample_id=each.sample_id, lease_id=each.lease_id, sample=data)

    def _scored(self, each: pb.LeasedSample) -> pb.CompletedSample:
        score = sample_pb2.Score(reward=each.index % 2, parts={"acc": 1.0}, scorer="fuzz", seconds=0.1)
        return pb.CompletedSample(sample_id=each.sample_id, lease_id=each.lease_id, score=score)

    def _complete(self) -> pb.CompleteRequest:
        generating = self._stage == GENERATE
        rows = [self._completed(group, each) if generating else self._scored(each) for group, each in self._some()]
        return pb.CompleteRequest(stage=self._stage, replica_id="honest", samples=rows)

    def _extend(self, groups: Sequence[pb.LeasedGroup]) -> pb.ExtendRequest:
        rows = []
        for _, each in _each(groups):
            start = each.record.completion_tokens
            spans = [sample_pb2.WeightVersionSpan(version=self._version.to_proto(), start=start, end=start + 1)]
            delta = sample_pb2.TokenDelta(
                from_token=start,
                token_ids=wire.encode_tokens([7]),
                rollout_logprobs=wire.encode_logprobs([-0.5]),
                spans=spans,
                first_token_unix_us=1,
            )
            rows.append(pb.ExtendedSample(sample_id=each.sample_id, lease_id=each.lease_id, delta=delta))
        return pb.ExtendRequest(replica_id="honest", samples=rows)

    def _release(self) -> pb.ReleaseRequest:
        rows = [
            pb.ReleasedSample(sample_id=each.sample_id, lease_id=each.lease_id, reason=pb.RELEASE_REASON_DRAIN)
            for _, each in self._some()
        ]
        return pb.ReleaseRequest(stage=self._stage, replica_id="honest", samples=rows)

    def _commit(self) -> pb.CommitStepRequest:
        lease, outcome = self._batch.batch_lease_id, pb.STEP_OUTCOME_TRAINED
        return pb.CommitStepRequest(epoch=self._epoch, step=self._step + 1, batch_lease_id=lease, outcome=outcome)

    def _register(self) -> pb.RegisterReplicaRequest:
        version = self._version.to_proto()
        replica = pb.Replica(
            replica_id="honest",
            role=pb.ROLE_ROLLOUT,
            address="127.0.0.1:1",
            state=pb.REPLICA_STATE_SERVING,
            weight_version=version,
            stats={"tokens_generated": 1.0},
            child_pids={"engine-0": 7},
            engines=[pb.Engine(state=pb.REPLICA_STATE_SERVING, weight_version=version, name="fuzz/1", ranks=1)],
        )
        return pb.RegisterReplicaRequest(replica=replica)

    def _import(self) -> pb.ImportRequest:
        prompt = self._prompt()
        rows = [
            pb.GroupSample(sample=self._sample(prompt), score=sample_pb2.Score(reward=place))
            for place in range(self._group_size)
        ]
        return pb.ImportRequest(request_id=self._name(), groups=[pb.SampleGroup(prompt=prompt, samples=rows)])

    def _lease_request(self) -> pb.LeaseRequest:
        fields = {"epoch": self._epoch, "step": self._step + 1} if self._rng.random() < 0.3 else {}
        stage = TRAIN if fields else self._rng.choice((GENERATE, SCORE))
        version = self._version.to_proto()
        return pb.LeaseRequest(
            stage=stage, replica_id="other", max_samples=2, weight_version=version, request_id=self._name(), **fields
        )

    _makers: ClassVar[dict[str, Callable[[Scene], Message]]] = {
        "Submit": lambda self: pb.SubmitRequest(request_id=self._name(), prompts=[self._prompt()]),
        "Lease": _lease_request,
        "Fetch": lambda self: pb.FetchRequest(sample_ids=self._ids(), include_prompt=True),
        "Extend": lambda self: self._extend(self._groups),
        "Complete": _complete,
        "Release": _release,
        "ListPartials": lambda self: pb.ListPartialsRequest(max_groups=4),
        "PreferGroups": lambda self: pb.PreferGroupsRequest(group_ids=[group.group_id for group, _ in self._some()]),
        "CommitStep": _commit,
        "PublishVersion": lambda self: pb.PublishVersionRequest(version=self._version.to_proto()),
        "GetWatermark": lambda self: pb.GetWatermarkRequest(epoch=self._epoch, step=self._step),
        "ConfirmCheckpoint": lambda self: pb.ConfirmCheckpointRequest(epoch=self._epoch, oldest_kept_step=self._step),
        "AcquireEpoch": lambda self: pb.AcquireEpochRequest(holder="other", known_epoch=self._epoch),
        "Recover": lambda self: pb.RecoverRequest(epoch=self._epoch, step=self._mark.step, watermark=self._mark),
        "RegisterReplica": _register,
        "ListReplicas": lambda self: pb.ListReplicasRequest(role=pb.ROLE_ROLLOUT),
        "GetLedger": lambda self: pb.GetLedgerRequest(),
        "ListSamples": lambda self: pb.ListSamplesRequest(state=self._rng.randrange(1, 12), limit=8),
        "Requeue": lambda self: pb.RequeueRequest(sample_ids=self._ids()),
        "Import": _import,
    }


def _each(groups: Sequence[pb.LeasedGroup]) -> list[tuple[pb.LeasedGroup, pb.LeasedSample]]:
    return [(group, each) for group in groups for each in group.samples]
