"""Messages put together from serialized parts are those that protobuf makes."""

from __future__ import annotations

import pytest

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.splice import Spliced, serializer


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 1 << 21])
def test_a_spliced_message_is_the_message(size: int) -> None:
    payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
    score = sample_pb2.Score(reward=0.5, scorer="exact")
    sample = Spliced(pb.LeasedSample(sample_id="g00000001-000", lease_id=7))
    sample.append(pb.LeasedSample.SAMPLE_FIELD_NUMBER, payload)
    sample.append(pb.LeasedSample.SCORE_FIELD_NUMBER, score.SerializeToString())
    group = Spliced(pb.LeasedGroup(group_id="g00000001", samples=[pb.LeasedSample(index=3)]))
    group.append(pb.LeasedGroup.SAMPLES_FIELD_NUMBER, sample)
    answer = Spliced(pb.LeaseResponse(batch_lease_id=9))
    answer.append(pb.LeaseResponse.GROUPS_FIELD_NUMBER, group)

    data = serializer(pb.LeaseResponse.SerializeToString)(answer)

    spliced = pb.LeasedSample(sample_id="g00000001-000", lease_id=7, sample=payload, score=score)
    whole = pb.LeasedGroup(group_id="g00000001", samples=[pb.LeasedSample(index=3), spliced])
    assert pb.LeaseResponse.FromString(data) == pb.LeaseResponse(batch_lease_id=9, groups=[whole])
    assert len(data) == answer.size
