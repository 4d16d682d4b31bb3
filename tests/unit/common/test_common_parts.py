"""Messages of more parts than memory is for, told from large ones before they are parsed."""

from __future__ import annotations

import pytest
from google.protobuf.internal.encoder import _VarintBytes

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.errors import LimitError
from services.common.parts import MAX_PARTS, check_parts


def check(message: type, data: bytes) -> None:
    check_parts(data, message.DESCRIPTOR, "request")


# Empty spans, with what they are in around them.
SPANS = b"\x32\x00" * (1 << 20)
for tag in (0x32, 0x0A, 0x1A, 0x12):
    SPANS = bytes([tag]) + _VarintBytes(len(SPANS)) + SPANS


def of_size(message: type, part: bytes) -> bytes:
    return part * max(1, (2 << 20) // len(part))


def test_a_large_message_of_few_parts_passes() -> None:
    row = pb.CompletedSample(sample_id="g00000000-000", lease_id=1, sample=bytes(4 << 20))
    check(pb.CompleteRequest, pb.CompleteRequest(replica_id="r", samples=[row] * 8).SerializeToString())
    segment = sample_pb2.Segment(token_ids=bytes(1 << 20), spans=[sample_pb2.WeightVersionSpan(end=1)] * 4096)
    groups = [pb.SampleGroup(samples=[pb.GroupSample(sample=sample_pb2.Sample(segments=[segment]))])] * 2
    check(pb.ImportRequest, pb.ImportRequest(request_id="i", groups=groups).SerializeToString())


@pytest.mark.parametrize(
    ("message", "part", "field"),
    [
        (pb.SubmitRequest, b"\x12\x00", "request.prompts"),
        (pb.FetchRequest, b"\x0a\x00", "request.sample_ids"),
        (pb.LeaseRequest, b"\x18\x01", "request.max_samples"),
        (pb.LeaseRequest, b"\x78\x01", "request"),
        (pb.ImportRequest, SPANS, "request.groups.samples.sample.segments.spans"),
    ],
)
def test_one_of_many_parts_is_refused_where_they_are(message: type, part: bytes, field: str) -> None:
    with pytest.raises(LimitError, match=f"more than {MAX_PARTS} parts") as refused:
        check(message, of_size(message, part))
    assert refused.value.field == field


@pytest.mark.parametrize("part", [b"\x12\x05", b"\x12\xff\xff\xff\xff\x0f", b"\x80" * 11, b"\x0b", b"\x09\x00"])
def test_what_is_malformed_is_left_to_the_parser(part: bytes) -> None:
    check(pb.SubmitRequest, bytes([0x0A, 0x80, 0x80, 0x80, 0x01]) + bytes(2 << 20) + part)
