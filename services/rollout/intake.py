"""Leased groups become records; those that cannot be generated are given back at once."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.errors import InvalidArgumentError, LimitError
from services.rollout.outbox import GivenBack
from services.rollout.prompting import Prompter
from services.rollout.records import Group, SampleRecord

log = structlog.get_logger()


class Intake:
    """The prompt is tokenised once for all samples of a group."""

    def __init__(
        self,
        prompter: Prompter,
        complete: Callable[[SampleRecord], None],
        release: Callable[[GivenBack], None],
    ) -> None:
        self._prompter = prompter
        self._complete = complete
        self._release = release

    def accept(self, leased: pb.LeasedGroup, context_length: int | None) -> list[SampleRecord]:
        """The records that need generation. A partial that had already ended is completed, a prompt that does not
        fit drops its group as OVERSIZE, one that cannot be rendered is FATAL to its samples.
        """
        try:
            prompt_ids = self._prompter.encode(leased.prompt, context_length)
        except LimitError as error:
            self._give_back_all(leased, pb.RELEASE_REASON_DROP, sample_pb2.DROP_REASON_OVERSIZE, str(error))
            return []
        except InvalidArgumentError as error:
            self._give_back_all(leased, pb.RELEASE_REASON_FATAL, sample_pb2.DROP_REASON_UNSPECIFIED, str(error))
            return []
        group = Group(leased.group_id, leased.prompt, prompt_ids)
        limit = self._prompter.token_limit(len(prompt_ids), context_length)
        return [
            record for sample in leased.samples if (record := self._record(group, leased, sample, limit)) is not None
        ]

    def _record(self, group: Group, leased: pb.LeasedGroup, sample: pb.LeasedSample, limit: int) -> SampleRecord | None:
        sampling = self._prompter.sampling_params(leased.prompt_ordinal, sample.index)
        record = SampleRecord(group, sample, sampling, limit)
        try:
            record.restore(sample.partial)
        except InvalidArgumentError as error:
            self._release(GivenBack(record, pb.RELEASE_REASON_FATAL, error=str(error), keep_partial=False))
            return None
        record.finish = self._prompter.ended(record.token_ids, limit)
        if record.finish != sample_pb2.FINISH_REASON_UNSPECIFIED:
            self._complete(record)
            return None
        return record

    def _give_back_all(
        self,
        leased: pb.LeasedGroup,
        reason: pb.ReleaseReason,
        drop_reason: sample_pb2.DropReason,
        error: str,
    ) -> None:
        log.warning("prompt_unusable", group_id=leased.group_id, reason=error)
        group = Group(leased.group_id, leased.prompt, ())
        for sample in leased.samples:
            record = SampleRecord(group, sample, sample_pb2.SamplingParams(), 0)
            self._release(GivenBack(record, reason, drop_reason, " ".join(error.split())[:500], keep_partial=False))
