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
from services.rollout.engines.messages import Chunk, EngineSpan, EngineUnavailableError, Finish
from services.rollout.records import Group, SampleRecord

FRESH, CARRIED = sample_pb2.KV_ORIGIN_FRESH, sample_pb2.KV_ORIGIN_CARRIED
V1, V2, V3 = Version(1, 1), Version(1, 2), Version(1, 3)


def record(partial=()) -> SampleRecord:
    group = Group("g00000000", sample_pb2.Prompt(text="1"), [7])
    leased = pb.LeasedSample(sample_id="g00000000-000", lease_id=1, partial=partial)
    made = SampleRecord(group, leased, sample_pb2.SamplingParams(), 100)
    made.restore(leased.partial)
    return made


def chunk(count: int, total: int, spans=None, stated=None, finish=None) -> Chunk:
    engine_spans = None if spans is None else [EngineSpan(str(version), start, end) for version, start, end in spans]
    version = None if stated is None else str(stated)
    return Chunk([5] * count, [-1.0] * count, total, engine_spans, version, finish, "")


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


def test_tokens_of_an_uncertain_version_wait_for_the_engines_word():
    """An event that spans a push may hold tokens of both versions: only the final one says which."""
    made = record()
    made.begin(V1)
    made.extend(chunk(4, 4, stated=V1), V1, in_place)
    assert made.savable == 4
    made.extend(chunk(4, 8, stated=V2), V2, in_place)
    made.extend(chunk(4, 12, stated=V2), V2, in_place)
    assert (made.savable, made.unsaved) == (4, 12)
    assert [(span.start, span.end) for span in made.delta().spans] == [(0, 4)]
    made.extend(chunk(1, 13, [(V1, 0, 6), (V2, 6, 13)], finish=Finish.LENGTH), V2, in_place)
    assert made.savable == 13
    assert plain(made) == [(V1, 0, 6, FRESH), (V2, 6, 13, CARRIED)]


def test_a_single_token_after_a_push_is_certain():
    made = record()
    made.begin(V1)
    made.extend(chunk(1, 1, stated=V1), V1, in_place)
    made.extend(chunk(1, 2, stated=V2), V2, in_place)
    made.extend(chunk(1, 3, stated=V2), V2, in_place)
    assert made.savable == 3
    assert plain(made) == [(V1, 0, 1, FRESH), (V2, 1, 3, CARRIED)]


def test_a_token_that_arrives_while_its_engine_is_being_updated_is_uncertain():
    made = record()
    made.begin(V1)
    made.extend(chunk(1, 1, stated=V2), V1, in_place)
    assert made.savable == 0


def test_an_engine_that_never_tells_is_taken_at_the_streams_word():
    made = record()
    made.begin(V1)
    made.extend(chunk(2, 2), V1, in_place)
    made.extend(chunk(3, 5, finish=Finish.STOP), V2, in_place)
    assert made.savable == 5
    assert plain(made) == [(V1, 0, 2, FRESH), (V2, 2, 5, CARRIED)]


@pytest.mark.parametrize("logprob", [float("nan"), float("inf"), float("-inf"), 0.1])
def test_what_is_no_log_probability_is_refused_and_not_kept(logprob):
    made = record()
    made.begin(V1)
    with pytest.raises(InvalidArgumentError, match="rollout_logprobs"):
        made.extend(Chunk([1, 2], [-1.0, logprob], 2, None, None, None, ""), V1, fresh)
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
