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
from services.rollout.records import Arrival, Group, SampleRecord

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


def fresh(version):
    return Arrival(FRESH, late=False)


def in_place(version):
    return Arrival(CARRIED, late=False)


def late(version):
    """In place on an engine that decodes one pass ahead."""
    return Arrival(CARRIED, late=True)


def plain(made: SampleRecord):
    return [(span.version, span.start, span.end, span.kv) for span in made.spans]


def spans_of(delta: sample_pb2.TokenDelta):
    return [(Version.from_proto(span.version), span.start, span.end, span.kv) for span in delta.spans]


def generated(*chunks: Chunk, arrival_of, sent=V1) -> SampleRecord:
    made = record()
    made.begin(sent)
    for each in chunks:
        made.extend(each, sent, arrival_of)
    return made


@pytest.mark.parametrize(
    ("arrival_of", "claimed", "expected"),
    [
        (in_place, [(V1, 0, 5)], [(V1, 0, 5, FRESH)]),
        (late, [(V1, 0, 5)], [(V1, 0, 5, FRESH)]),
        (in_place, [(V1, 0, 3), (V2, 3, 5)], [(V1, 0, 3, FRESH), (V2, 3, 5, CARRIED)]),
        (fresh, [(V1, 0, 3), (V2, 3, 5)], [(V1, 0, 3, FRESH), (V2, 3, 5, FRESH)]),
        (late, [(V1, 0, 3), (V2, 3, 5)], [(V1, 0, 4, FRESH), (V2, 4, 5, CARRIED)]),
        # The pass that was running brought the last token.
        (late, [(V1, 0, 4), (V2, 4, 5)], [(V1, 0, 5, FRESH)]),
        # Pushes as close as they can be: one token between, and none.
        (late, [(V1, 0, 1), (V2, 1, 2), (V3, 2, 5)], [(V1, 0, 2, FRESH), (V2, 2, 3, CARRIED), (V3, 3, 5, CARRIED)]),
        (late, [(V1, 0, 3), (V2, 3, 4), (V3, 4, 5)], [(V1, 0, 4, FRESH), (V2, 4, 5, CARRIED)]),
        (late, [(V1, 0, 2), (V3, 2, 5)], [(V1, 0, 3, FRESH), (V3, 3, 5, CARRIED)]),
        (in_place, [(V1, 0, 2), (V3, 2, 5)], [(V1, 0, 2, FRESH), (V3, 2, 5, CARRIED)]),
        # Without a token at the pause, it was prefilled before, in part or whole, or after it: nobody says.
        (in_place, [(V2, 0, 5)], [(V2, 0, 5, CARRIED)]),
        (fresh, [(V2, 0, 5)], [(V2, 0, 5, FRESH)]),
        (late, [(V2, 0, 5)], [(V1, 0, 1, FRESH), (V2, 1, 5, CARRIED)]),
        (late, [(V2, 0, 2), (V3, 2, 5)], [(V1, 0, 1, FRESH), (V2, 1, 3, CARRIED), (V3, 3, 5, CARRIED)]),
    ],
)
def test_what_the_engine_says_of_a_request_stamps_it(arrival_of, claimed, expected):
    assert plain(generated(chunk(5, 5, claimed), arrival_of=arrival_of)) == expected


@pytest.mark.parametrize("arrival_of", [in_place, late])
def test_a_request_that_a_faster_engine_took_is_never_stamped_newer_than_it_is(arrival_of):
    """With several engines a request counts as sent under the oldest version: one that a push overtook before its first
    token looks the same as one that went to an engine which had the newer version already.
    """
    made = generated(chunk(5, 5, [(V2, 0, 5)]), arrival_of=arrival_of, sent=V1)
    assert plain(made)[-1] == (V2, int(arrival_of is late), 5, CARRIED)
    assert arrival_of is in_place or plain(made)[0] == (V1, 0, 1, FRESH)


def test_a_request_that_a_slower_engine_took_was_prefilled_by_its_own_version():
    """An engine may hold an older version than the request was sent under."""
    for chunks in (
        [chunk(2, 2, [(V1, 0, 2)]), chunk(3, 5, [(V1, 0, 4), (V2, 4, 5)])],
        [chunk(2, 2, stated=V1), chunk(2, 4, stated=V1), chunk(1, 5, stated=V2)],
    ):
        made = generated(*chunks, arrival_of=in_place, sent=V2)
        assert plain(made) == [(V1, 0, 4, FRESH), (V2, 4, 5, CARRIED)]


def test_each_version_has_its_own_way_of_arriving():
    """In place, then retracted: the engine drains its pass before it retracts."""
    made = generated(
        chunk(9, 9, [(V1, 0, 3), (V2, 3, 6), (V3, 6, 9)]),
        arrival_of=lambda version: late(version) if version == V2 else fresh(version),
    )
    assert plain(made) == [(V1, 0, 4, FRESH), (V2, 4, 6, CARRIED), (V3, 6, 9, FRESH)]


@pytest.mark.parametrize(
    ("arrival_of", "interval", "expected"),
    [
        (in_place, 1, [(V1, 0, 8, FRESH), (V2, 8, 16, CARRIED)]),
        (late, 1, [(V1, 0, 9, FRESH), (V2, 9, 16, CARRIED)]),
        (in_place, 8, [(V1, 0, 15, FRESH), (V2, 15, 24, CARRIED)]),
        (late, 8, [(V1, 0, 16, FRESH), (V2, 16, 24, CARRIED)]),
    ],
)
def test_tokens_are_stamped_by_position_until_the_engine_tells(arrival_of, interval, expected):
    """It states what it serves with each event, which may begin with tokens of the version before."""
    versions = [V1] * (8 // interval) + [V2] * (16 // interval if interval > 1 else 8)
    chunks = [chunk(interval, interval * (at + 1), stated=version) for at, version in enumerate(versions)]
    made = generated(*chunks, arrival_of=arrival_of)
    assert plain(made) == expected
    assert spans_of(made.delta()) == expected  # all of it may be saved
    claimed = [(V1, 0, 10), (V2, 10, made.unsaved)]
    made.extend(chunk(0, made.unsaved, claimed, finish=Finish.LENGTH), V2, arrival_of)
    boundary = 11 if arrival_of is late else 10
    assert plain(made) == [(V1, 0, boundary, FRESH), (V2, boundary, made.unsaved, CARRIED)]


@pytest.mark.parametrize(("arrival_of", "old"), [(in_place, 3), (fresh, 3), (late, 4)])
def test_a_first_event_after_a_push_is_not_stamped_newer_than_it_is(arrival_of, old):
    made = generated(chunk(4, 4, stated=V2), chunk(4, 8, stated=V2), arrival_of=arrival_of)
    assert plain(made) == [(V1, 0, old, FRESH), (V2, old, 8, arrival_of(V2).kv)]


def test_two_pushes_within_one_event():
    made = generated(chunk(4, 4, stated=V1), chunk(4, 8, stated=V3), chunk(4, 12, stated=V3), arrival_of=late)
    assert plain(made) == [(V1, 0, 8, FRESH), (V3, 8, 12, CARRIED)]


def test_tokens_that_come_with_the_end_of_an_aborted_request_were_held_back_before_it():
    made = generated(chunk(4, 4, stated=V1), chunk(3, 7, stated=V2, finish=Finish.ABORT), arrival_of=in_place)
    assert plain(made) == [(V1, 0, 7, FRESH)]


def test_an_engine_that_never_tells_is_taken_at_the_replicas_word():
    made = record()
    made.begin(V1)
    made.extend(chunk(2, 2), V1, in_place)
    made.extend(chunk(3, 5), V2, in_place)
    made.extend(chunk(2, 7, finish=Finish.STOP), V2, in_place)
    assert plain(made) == [(V1, 0, 4, FRESH), (V2, 4, 7, CARRIED)]


@pytest.mark.parametrize("tells", [True, False])
def test_a_resumed_request_adds_to_what_was_there(tells):
    def event(count, total, *spans):
        return chunk(count, total, spans) if tells else chunk(count, total, stated=spans[-1][0])

    made = record()
    made.begin(V1)
    made.extend(event(2, 2, (V1, 0, 2)), V1, late)
    made.begin(V2)
    made.extend(event(1, 1, (V2, 0, 1)), V2, late)
    made.extend(event(1, 2, (V2, 0, 1), (V3, 1, 2)), V3, late)
    made.extend(event(1, 3, (V2, 0, 1), (V3, 1, 3)), V3, late)
    assert plain(made) == [(V1, 0, 2, FRESH), (V2, 2, 4, FRESH), (V3, 4, 5, CARRIED)]
    assert made.rid == "g00000000-000.1.2"


def test_a_resumed_request_of_the_same_version_makes_one_span():
    made = record()
    for _ in range(2):
        made.begin(V1)
        made.extend(chunk(2, 2, [(V1, 0, 2)]), V1, fresh)
    assert plain(made) == [(V1, 0, 4, FRESH)]


def test_what_is_cut_off_goes_with_its_log_probs_and_spans():
    made = generated(chunk(5, 5, [(V1, 0, 3), (V2, 3, 5)]), arrival_of=in_place)
    made.truncate(4)
    assert (len(made.token_ids), len(made.logprobs)) == (4, 4)
    assert plain(made) == [(V1, 0, 3, FRESH), (V2, 3, 4, CARRIED)]
    made.truncate(2)
    assert plain(made) == [(V1, 0, 2, FRESH)]


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
    with pytest.raises(EngineUnavailableError, match="default"):
        made.extend(chunk(1, 1, stated="default"), V1, fresh)
    assert made.token_ids == []


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
