"""The replica's own record: deltas, spans, and what an engine must not send."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common import wire
from services.common.errors import InvalidArgumentError
from services.common.versions import Version
from services.rollout.engines.messages import Chunk, EngineSpan, EngineUnavailableError
from services.rollout.records import Group, SampleRecord

FRESH, CARRIED = sample_pb2.KV_ORIGIN_FRESH, sample_pb2.KV_ORIGIN_CARRIED
V1, V2, V3 = Version(1, 1), Version(1, 2), Version(1, 3)


def record(partial=()) -> SampleRecord:
    group = Group("g00000000", sample_pb2.Prompt(text="1"), [7])
    leased = pb.LeasedSample(sample_id="g00000000-000", lease_id=1, partial=partial)
    made = SampleRecord(group, leased, sample_pb2.SamplingParams(), 100)
    made.restore(leased.partial)
    return made


def chunk(count: int, total: int, spans=None) -> Chunk:
    engine_spans = None if spans is None else [EngineSpan(str(version), start, end) for version, start, end in spans]
    return Chunk([5] * count, [-1.0] * count, total, engine_spans, None, "")


def fresh(version, sent):
    return FRESH


def in_place(version, sent):
    return FRESH if version == sent else CARRIED


def plain(made: SampleRecord):
    return [(span.version, span.start, span.end, span.kv) for span in made.spans]


def test_a_span_that_crossed_a_push_in_place_is_carried():
    made = record()
    made.begin(V1)
    made.extend(chunk(2, 2, [(V1, 0, 2)]), V1, in_place)
    made.extend(chunk(3, 5, [(V1, 0, 3), (V2, 3, 5)]), V1, in_place)
    assert plain(made) == [(V1, 0, 3, FRESH), (V2, 3, 5, CARRIED)]


def test_a_first_token_after_a_push_was_prefilled_by_older_weights():
    made = record()
    made.begin(V1)
    made.extend(chunk(2, 2, [(V2, 0, 2)]), V2, in_place)
    assert plain(made) == [(V2, 0, 2, CARRIED)]


def test_a_resumed_request_adds_to_what_was_there():
    made = record()
    made.begin(V1)
    made.extend(chunk(2, 2, [(V1, 0, 2)]), V1, in_place)
    assert not made.resumed
    made.begin(V2)
    assert made.resumed
    made.extend(chunk(1, 1, [(V2, 0, 1)]), V2, in_place)
    made.extend(chunk(1, 2, [(V2, 0, 1), (V3, 1, 2)]), V3, in_place)
    assert plain(made) == [(V1, 0, 2, FRESH), (V2, 2, 3, FRESH), (V3, 3, 4, CARRIED)]
    assert made.rid == "g00000000-000.1.2"


def test_a_resumed_request_of_the_same_version_makes_one_span():
    made = record()
    for _ in range(2):
        made.begin(V1)
        made.extend(chunk(2, 2, [(V1, 0, 2)]), V1, fresh)
    assert plain(made) == [(V1, 0, 4, FRESH)]


@pytest.mark.parametrize("logprob", [float("nan"), float("inf"), float("-inf"), 0.1])
def test_what_is_no_log_probability_is_refused_and_not_kept(logprob):
    made = record()
    made.begin(V1)
    with pytest.raises(InvalidArgumentError, match="rollout_logprobs"):
        made.extend(Chunk([1, 2], [-1.0, logprob], 2, None, None, ""), V1, fresh)
    assert made.token_ids == []


def test_a_version_of_nobodys_is_the_engines_fault():
    made = record()
    made.begin(V1)
    with pytest.raises(EngineUnavailableError, match="default"):
        made.extend(chunk(1, 1, [("default", 0, 1)]), V1, fresh)


def test_a_delta_that_does_not_follow_is_refused():
    delta = sample_pb2.TokenDelta(from_token=3, token_ids=wire.encode_tokens([1]))
    with pytest.raises(InvalidArgumentError, match=r"partial.from_token: 3 does not follow 0"):
        record([delta])


@given(
    pieces=st.lists(st.integers(1, 5), min_size=1, max_size=12),
    versions=st.lists(st.integers(0, 3), min_size=60, max_size=60),
    saves=st.lists(st.booleans(), min_size=12, max_size=12),
    moves=st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_saving_and_resuming_loses_nothing(pieces, versions, saves, moves):
    """Tokens and versions survive any sequence of chunks, saves and moves to another replica."""
    versions = sorted(versions)  # token i is of version versions[i]
    partial: list[sample_pb2.TokenDelta] = []
    made, base = record(), 0
    made.begin(Version(1, versions[0]))
    for piece, save, move in zip(pieces, saves, moves, strict=False):
        position = len(made.token_ids)
        spans = [(Version(1, versions[base + at]), at, at + 1) for at in range(position + piece - base)]
        tokens = list(range(position, position + piece))
        made.extend(
            Chunk(
                tokens,
                [-0.5 * token for token in tokens],
                position + piece - base,
                [EngineSpan(str(version), start, end) for version, start, end in spans],
                None,
                "",
            ),
            Version(1, 0),
            fresh,
        )
        if save or move:
            partial.append(made.delta())
            made.saved = len(made.token_ids)
        if move:
            made = record(partial)
            base = len(made.token_ids)
            made.begin(Version(1, versions[base]))
    assert made.token_ids == list(range(sum(pieces)))
    assert made.logprobs == [-0.5 * token for token in made.token_ids]
    stamped = [span.version.step for span in made.spans for _ in range(span.start, span.end)]
    assert stamped == versions[: len(made.token_ids)]
    restored = record([*partial, *([made.delta()] if made.unsaved else [])])
    assert (restored.token_ids, restored.logprobs, restored.spans) == (made.token_ids, made.logprobs, made.spans)
