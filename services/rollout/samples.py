"""A finished record as the Sample that is stored."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from polyhead.v1 import sample_pb2
from services.common import wire
from services.common.config.models import SamplingConfig
from services.rollout.prompting import Prompter
from services.rollout.records import SampleRecord, spans_to_proto

log = structlog.get_logger()


class SampleBuilder:
    """Builds Samples as buffer.Complete takes them: serialized, one segment each."""

    def __init__(self, prompter: Prompter, sampling: SamplingConfig) -> None:
        self._prompter = prompter
        self._exact = sampling.top_p >= 1.0 and sampling.top_k <= 0
        if not self._exact:
            log.warning("behaviour_not_exact", top_p=sampling.top_p, top_k=sampling.top_k)

    def build(self, records: Sequence[SampleRecord], engine: str) -> list[bytes]:
        """One serialized Sample per record. `engine` names what generated them."""
        texts = self._prompter.decode([record.token_ids for record in records])
        return [self._build(record, text, engine) for record, text in zip(records, texts, strict=True)]

    def _build(self, record: SampleRecord, text: str, engine: str) -> bytes:
        prompt_ids = record.group.prompt_ids
        length = len(record.token_ids)
        segment = sample_pb2.Segment(
            token_ids=wire.encode_tokens([*prompt_ids, *record.token_ids]),
            num_tokens=len(prompt_ids) + length,
            prompt_length=len(prompt_ids),
            loss_mask=b"\x01" * length,
            rollout_logprobs=wire.encode_logprobs(record.logprobs),
            spans=spans_to_proto(record.spans),
            first_token_unix_us=record.first_token_us,
            last_token_unix_us=record.last_token_us,
        )
        segment.digest = wire.segment_digest(segment)
        sample = sample_pb2.Sample(
            sample_id=record.sample_id,
            group_id=record.group.group_id,
            index=record.index,
            prompt=record.group.prompt,
            sampling=record.sampling,
            segments=[segment],
            completion=text,
            finish_reason=record.finish,
            behaviour_exact=self._exact,
            engine=engine,
        )
        return sample.SerializeToString()
