"""What users' functions see of a leased sample."""

from __future__ import annotations

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.versions import Version
from services.reward.items import item_of_sample
from services.reward.scorers.user import to_sample

GROUP = pb.LeasedGroup(group_id="g00000003", group_size=8, order=3)


def made_by(*versions: Version, metadata: str = "") -> sample_pb2.Sample:
    spans = [
        sample_pb2.WeightVersionSpan(version=version.to_proto(), start=at, end=at + 1)
        for at, version in enumerate(versions)
    ]
    return sample_pb2.Sample(
        prompt=sample_pb2.Prompt(text="What?", metadata_json=metadata), segments=[sample_pb2.Segment(spans=spans)]
    )


def test_a_sample_that_was_continued_says_where_it_began() -> None:
    continued = made_by(Version(1, 4), Version(2, 3), metadata='{"difficulty": 2}')
    assert to_sample(item_of_sample(continued, GROUP)).metadata == {"difficulty": 2, "start_rollout_id": 4}


def test_a_sample_of_one_version_does_not() -> None:
    assert to_sample(item_of_sample(made_by(Version(1, 4), Version(1, 4)), GROUP)).metadata == {}


def test_what_the_data_set_says_stands() -> None:
    named = made_by(Version(1, 4), Version(1, 5), metadata='{"start_rollout_id": 9}')
    assert to_sample(item_of_sample(named, GROUP)).metadata == {"start_rollout_id": 9}
