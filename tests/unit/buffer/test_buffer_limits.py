"""The limits of the design, at their real figures: what is on the limit passes, what is over it is named."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.buffer import validation
from services.common import wire
from services.common.buffer_client import BufferClient
from services.common.config.models import LimitsConfig
from services.common.errors import InvalidArgumentError, LimitError
from services.common.versions import Version

LIMITS = LimitsConfig()
TOKENS, SAMPLE, METADATA, MESSAGE = 131_072, 8 << 20, 64 << 10, 64 << 20


def sample(tokens: int = 4) -> sample_pb2.Sample:
    span = sample_pb2.WeightVersionSpan(version=Version(1, 0).to_proto(), start=0, end=tokens - 1)
    segment = sample_pb2.Segment(
        token_ids=wire.encode_tokens([1] * tokens),
        num_tokens=tokens,
        prompt_length=1,
        loss_mask=b"\1" * (tokens - 1),
        rollout_logprobs=wire.encode_logprobs([-1.0] * (tokens - 1)),
        spans=[span],
    )
    return sample_pb2.Sample(
        sample_id="g00000000-000", group_id="g00000000", segments=[segment], finish_reason=sample_pb2.FINISH_REASON_STOP
    )


def complete(message: sample_pb2.Sample) -> None:
    row = pb.CompletedSample(sample_id="g00000000-000", lease_id=1, sample=message.SerializeToString())
    validation.generated(pb.CompleteRequest(replica_id="r", samples=[row]), LIMITS, None)


def with_tokens(over: int) -> None:
    complete(sample(TOKENS + over))


def with_bytes(over: int) -> None:
    message = sample()
    message.completion = "x" * (SAMPLE - 10)
    message.completion = "x" * (SAMPLE - 10 + SAMPLE - message.ByteSize() + over)
    assert message.ByteSize() == SAMPLE + over
    complete(message)


def with_metadata(over: int) -> None:
    message = sample()
    message.prompt.metadata_json = json.dumps({"": "é" * ((METADATA - 8) // 2) + "x" * over}, ensure_ascii=False)
    complete(message)


def with_delta(over: int) -> None:
    delta = sample_pb2.TokenDelta(
        from_token=TOKENS - 1 + over,
        token_ids=wire.encode_tokens([1]),
        rollout_logprobs=wire.encode_logprobs([-1.0]),
        spans=[
            sample_pb2.WeightVersionSpan(version=Version(1, 0).to_proto(), start=TOKENS - 1 + over, end=TOKENS + over)
        ],
    )
    row = pb.ExtendedSample(sample_id="g00000000-000", lease_id=1, delta=delta)
    validation.extensions(pb.ExtendRequest(replica_id="r", samples=[row]), LIMITS)


def with_prompt_metadata(over: int) -> None:
    prompt = sample_pb2.Prompt(text="p", metadata_json=json.dumps({"": "x" * (METADATA - 8 + over)}))
    validation.prompts(pb.SubmitRequest(request_id="a", prompts=[prompt]), LIMITS)


def with_prompt(over: int) -> None:
    prompt = sample_pb2.Prompt(text="x" * (SAMPLE - 10))
    prompt.text = "x" * (SAMPLE - 10 + SAMPLE - prompt.ByteSize() + over)
    validation.prompts(pb.SubmitRequest(request_id="a", prompts=[prompt]), LIMITS)


def with_score(over: int) -> None:
    score = sample_pb2.Score(reward=1.0, scorer="x" * (METADATA - 20))
    score.scorer = "x" * (METADATA - 20 + METADATA - score.ByteSize() + over)
    row = pb.CompletedSample(sample_id="g00000000-000", lease_id=1, score=score)
    validation.scored(pb.CompleteRequest(replica_id="r", samples=[row]), LIMITS)


def with_rows(over: int) -> None:
    row = pb.ExtendedSample(sample_id="g00000000-000", lease_id=1)
    validation.extensions(pb.ExtendRequest(replica_id="r", samples=[row] * (1024 + over)), LIMITS)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (with_tokens, "samples[0].sample.segments"),
        (with_bytes, "samples[0].sample"),
        (with_metadata, "samples[0].sample.prompt.metadata_json"),
        (with_delta, "samples[0].delta"),
        (with_prompt_metadata, "prompts[0].metadata_json"),
        (with_prompt, "prompts[0]"),
        (with_score, "samples[0].score"),
        (with_rows, "samples"),
    ],
)
def test_a_limit_is_named_when_it_is_passed(make: Callable[[int], None], field: str) -> None:
    make(0)
    with pytest.raises(LimitError) as refused:
        make(1)
    assert refused.value.field == field


def submitted(**fields: object) -> None:
    validation.prompts(pb.SubmitRequest(request_id="a", prompts=[sample_pb2.Prompt(**fields)]), LIMITS)


def completed(**fields: object) -> None:
    message = sample()
    for name, value in fields.items():
        place, _, last = name.rpartition("__")
        target = message.segments[0].spans[0] if place == "span" else message.sampling if place else message
        if last == "step":
            target.version.step = value
        elif last == "metadata_json":
            message.prompt.metadata_json = value
        else:
            setattr(target, last, value)
    complete(message)


def scored(**fields: object) -> None:
    row = pb.CompletedSample(sample_id="g00000000-000", lease_id=1, score=sample_pb2.Score(**fields))
    validation.scored(pb.CompleteRequest(replica_id="r", samples=[row]), LIMITS)


def leased(lease_id: int) -> None:
    row = pb.ExtendedSample(sample_id="g00000000-000", lease_id=lease_id)
    validation.extensions(pb.ExtendRequest(replica_id="r", samples=[row]), LIMITS)


@pytest.mark.parametrize(
    ("send", "field"),
    [
        (lambda: submitted(text=""), "prompts[0].input"),
        (lambda: submitted(text="a", metadata_json="{"), "prompts[0].metadata_json"),
        (lambda: submitted(text="a", metadata_json="[]"), "prompts[0].metadata_json"),
        (lambda: submitted(text="a", metadata_json='{"a": NaN}'), "prompts[0].metadata_json"),
        (lambda: submitted(text="a", tools_json="{}"), "prompts[0].tools_json"),
        (lambda: submitted(messages_json='[{"content": "a"}]'), "prompts[0].messages_json"),
        (lambda: submitted(messages_json="[" * 100_000), "prompts[0].messages_json"),
        (lambda: completed(prompt__metadata_json="null"), "samples[0].sample.prompt.metadata_json"),
        (lambda: completed(finish_reason=77), "samples[0].sample.finish_reason"),
        (lambda: completed(sampling__temperature=float("nan")), "samples[0].sample.sampling"),
        (lambda: completed(span__step=(1 << 40) + 1), "samples[0].sample.segments[0].spans[0].version.step"),
        (lambda: completed(span__kv=9), "samples[0].sample.segments[0].spans[0].kv"),
        (lambda: scored(reward=float("inf")), "samples[0].score.reward"),
        (lambda: scored(parts={"acc": float("nan")}), "samples[0].score.parts[acc]"),
        (lambda: leased(1 << 60), "samples[0].lease_id"),
    ],
)
def test_what_no_client_means_is_named(send: Callable[[], None], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        send()
    assert refused.value.field == field


async def test_a_message_over_the_limit_is_not_sent() -> None:
    rows = [pb.CompletedSample(sample_id="a", lease_id=1, sample=bytes(SAMPLE))] * (MESSAGE // SAMPLE)
    async with BufferClient("127.0.0.1:1", retry_for_s=0.1) as client:
        with pytest.raises(LimitError) as refused:
            await client.complete(sample_pb2.STAGE_GENERATE, "r", rows)
    assert refused.value.field == "Complete samples"
