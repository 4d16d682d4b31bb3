"""Weight versions, against a history that is kept as a tree of weights."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyhead.v1 import sample_pb2
from services.common.versions import Version, steps_between

VERSIONS = st.builds(Version, st.integers(0, 2**32 - 1), st.integers(0, 2**63))


@given(VERSIONS)
def test_text_and_message_round_trip(version: Version) -> None:
    assert Version.parse(str(version)) == version
    assert Version.from_proto(version.to_proto()) == version
    assert Version.from_proto(sample_pb2.WeightVersion.FromString(version.to_proto().SerializeToString())) == version


@pytest.mark.parametrize("text", ["", "default", "e1", "s2", "e1.s", "e1.s2 ", "e-1.s2", "E1.s2", "e1.s2.s3", "e1s2"])
def test_other_texts_are_no_versions(text: str) -> None:
    with pytest.raises(ValueError, match="not a weight version"):
        Version.parse(text)


def test_the_example_of_the_documentation() -> None:
    assert steps_between(Version(1, 13), Version(2, 12), {2: 10}) == 3 + 2


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 100)), min_size=1, max_size=6))
def test_distances_are_those_of_the_tree(epochs: list[tuple[int, int]]) -> None:
    """Each epoch recovers some step of the present history, then trains on. The distance of two weights is the number
    of training steps from one back to their last common ancestor and on to the other."""
    line: list[int] = [0]  # ids of the weights of the present history, by step
    made = 1
    lines: dict[Version, list[int]] = {}
    forks: dict[int, int] = {}
    for epoch, (steps, where) in enumerate(epochs, start=1):
        forks[epoch] = 0 if epoch == 1 else where % len(line)
        line = line[: forks[epoch] + 1]
        lines[Version(epoch, forks[epoch])] = list(line)
        for _ in range(steps):
            line.append(made)
            made += 1
            lines[Version(epoch, len(line) - 1)] = list(line)
    for older, one in lines.items():
        for newer, other in lines.items():
            if older <= newer:
                shared = sum(a == b for a, b in zip(one, other, strict=False))
                assert steps_between(older, newer, forks) == (len(one) - shared) + (len(other) - shared)
