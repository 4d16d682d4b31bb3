"""Token arrays and the checks of a Sample."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyhead.v1 import sample_pb2
from services.common import wire
from services.common.errors import InvalidArgumentError, LimitError
from services.common.versions import Version

INT32 = st.integers(-(2**31), 2**31 - 1)
LIMITS = {"max_bytes": 10_000, "max_tokens": 100, "max_metadata_bytes": 50}


@given(st.lists(INT32))
def test_tokens_round_trip(values: list[int]) -> None:
    data = wire.encode_tokens(values)
    assert len(data) == 4 * len(values)
    assert wire.decode_tokens(data).tolist() == values
    assert data == b"".join(value.to_bytes(4, "little", signed=True) for value in values)


@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_logprobs_round_trip(values: list[float]) -> None:
    assert wire.decode_logprobs(wire.encode_logprobs(values)).tolist() == values


@given(st.lists(st.integers(0, 1)))
def test_masks_round_trip(values: list[int]) -> None:
    assert wire.decode_mask(wire.encode_mask(values)).tolist() == values


def test_decoding_copies_nothing() -> None:
    decoded = wire.decode_tokens(wire.encode_tokens([1, 2, 3]))
    assert not decoded.flags.owndata
    assert not decoded.flags.writeable


def span(start: int, end: int, step: int = 0) -> sample_pb2.WeightVersionSpan:
    return sample_pb2.WeightVersionSpan(version=Version(1, step).to_proto(), start=start, end=end)


def segment() -> sample_pb2.Segment:
    return sample_pb2.Segment(
        token_ids=wire.encode_tokens([5, 6, 7, 8, 9]),
        num_tokens=5,
        prompt_length=2,
        loss_mask=wire.encode_mask([1, 0, 1]),
        rollout_logprobs=wire.encode_logprobs([-0.5, 0.0, -2.0]),
        spans=[span(0, 1), span(1, 3, 1)],
    )


def sample() -> sample_pb2.Sample:
    return sample_pb2.Sample(sample_id="g00000001-000", segments=[segment(), segment()])


def parse(message: sample_pb2.Sample) -> sample_pb2.Sample:
    return wire.parse_sample(message.SerializeToString(), **LIMITS)


def test_a_sound_sample_passes_unchanged() -> None:
    assert parse(sample()) == sample()


def test_a_completion_of_no_tokens_passes() -> None:
    empty = sample_pb2.Segment(token_ids=wire.encode_tokens([1]), num_tokens=1, prompt_length=1)
    assert parse(sample_pb2.Sample(segments=[empty])).segments[0] == empty
    assert wire.completion_length(empty) == 0


def _set(**fields: object) -> Callable[[sample_pb2.Sample], None]:
    def change(message: sample_pb2.Sample) -> None:
        for name, value in fields.items():
            setattr(message.segments[1], name, value)

    return change


def _spans(*spans: sample_pb2.WeightVersionSpan) -> Callable[[sample_pb2.Sample], None]:
    def change(message: sample_pb2.Sample) -> None:
        del message.segments[1].spans[:]
        message.segments[1].spans.extend(spans)

    return change


MALFORMED = [
    (lambda message: message.ClearField("segments"), "sample.segments"),
    (_set(token_ids=b"1234567"), "sample.segments[1].token_ids"),
    (_set(token_ids=wire.encode_tokens([5, 6, 7, 8])), "sample.segments[1].token_ids"),
    (_set(token_ids=wire.encode_tokens([5, 6, 7, -1, 9])), "sample.segments[1].token_ids[3]"),
    (_set(prompt_length=6), "sample.segments[1].prompt_length"),
    (_set(prompt_length=1), "sample.segments[1].loss_mask"),
    (_set(loss_mask=b"\1\1"), "sample.segments[1].loss_mask"),
    (_set(loss_mask=b"\1\0\2"), "sample.segments[1].loss_mask[2]"),
    (_set(rollout_logprobs=b"\0" * 8), "sample.segments[1].rollout_logprobs"),
    (_set(rollout_logprobs=wire.encode_logprobs([-1, np.nan, -1])), "sample.segments[1].rollout_logprobs[1]"),
    (_set(rollout_logprobs=wire.encode_logprobs([-1, -1, -np.inf])), "sample.segments[1].rollout_logprobs[2]"),
    (_set(rollout_logprobs=wire.encode_logprobs([0.5, -1, -1])), "sample.segments[1].rollout_logprobs[0]"),
    (_set(digest=1), "sample.segments[1].digest"),
    (_spans(), "sample.segments[1].spans"),
    (_spans(span(0, 2)), "sample.segments[1].spans"),
    (_spans(span(0, 4)), "sample.segments[1].spans"),
    (_spans(span(0, 1), span(2, 3)), "sample.segments[1].spans[1]"),
    (_spans(span(0, 2), span(1, 3)), "sample.segments[1].spans[1]"),
    (_spans(span(0, 0), span(0, 3)), "sample.segments[1].spans[0]"),
    (_spans(sample_pb2.WeightVersionSpan(start=0, end=3)), "sample.segments[1].spans[0].version"),
]


@pytest.mark.parametrize(("change", "field"), MALFORMED)
def test_every_malformed_field_is_named(change: Callable[[sample_pb2.Sample], None], field: str) -> None:
    message = sample()
    change(message)
    with pytest.raises(InvalidArgumentError) as caught:
        parse(message)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("limit", "field"),
    [
        ({"max_bytes": 20}, "sample"),
        ({"max_tokens": 9}, "sample.segments"),
        ({"max_metadata_bytes": 3}, "sample.prompt.metadata_json"),
    ],
)
def test_limits_are_named(limit: dict[str, int], field: str) -> None:
    message = sample()
    message.prompt.metadata_json = '"é"'  # 3 characters, 4 bytes
    with pytest.raises(LimitError) as caught:
        wire.parse_sample(message.SerializeToString(), **{**LIMITS, **limit})
    assert caught.value.field == field


@given(st.binary(max_size=300))
def test_any_bytes_are_a_sample_or_refused(data: bytes) -> None:
    try:
        parsed = wire.parse_sample(data, **LIMITS)
    except (InvalidArgumentError, LimitError) as error:
        assert error.field.startswith("sample")  # noqa: PT017
    else:
        assert len(parsed.segments) > 0


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_spans_laid_end_to_end_pass(lengths: list[int]) -> None:
    ends = np.cumsum(lengths).tolist()
    spans = [span(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    wire.check_spans(spans, 0, ends[-1], "spans")
