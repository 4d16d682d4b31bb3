"""How many samples a replica may hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.rollout.capacity import Lengths, capacity
from services.rollout.engines.messages import EngineLoad, ServerInfo

DEFAULT = 64


def engine(slots: int | None = None, tokens: int | None = None, context: int | None = None) -> ServerInfo:
    return ServerInfo("engine/1", context, max_running_requests=slots, kv_tokens=tokens)


def room(*engines, expected: float = 100, limit: int | None = None) -> int:
    return capacity(engines, expected_tokens=expected, default_slots=DEFAULT, limit=limit)


def test_slots_are_the_bound_where_memory_is_none():
    assert room((engine(slots=64, tokens=64 * 100), None)) == 64
    assert room((engine(slots=64, tokens=1_000_000), None), (engine(slots=8), None)) == 72
    # A queue of an engine that has the memory is one that will be served in a moment.
    assert room((engine(slots=64), EngineLoad(60, 10, 0, 6400, 64))) == 64


def test_a_request_never_needs_more_than_the_context():
    assert room((engine(slots=64, tokens=64 * 50, context=50), None), expected=10_000) == 64


def test_memory_is_the_bound_where_requests_are_long():
    assert room((engine(slots=64, tokens=2000), None)) == 20
    assert room((engine(slots=64, tokens=2000), EngineLoad(20, 0, 2000, 1000, 64))) == 10
    assert room((engine(slots=64, tokens=10), None)) == 1


def test_what_the_engine_says_of_itself_goes_before_what_it_was_started_with():
    assert room((engine(slots=64, tokens=10_000), EngineLoad(0, 0, 0, 3200, 32))) == 32


def test_longer_requests_leave_room_for_fewer():
    lengths = Lengths(max_response_len=50)
    assert lengths.expected == 50
    lengths.leased(10)
    lengths.leased(30)
    assert lengths.expected == 70
    rooms = []
    for length in (100, 200, 400):
        for _ in range(2000):
            lengths.completed(length)
        rooms.append(room((engine(slots=64, tokens=4000), None), expected=lengths.expected))
    assert rooms == pytest.approx([40, 20, 10], abs=1)


def test_a_queue_beside_free_slots_means_that_memory_is_short():
    short = engine(slots=64, tokens=4000)
    assert room((short, EngineLoad(30, 5, 3900, 4000, 64))) == 30
    assert room((short, EngineLoad(30, 0, 3900, 4000, 64))) == 40
    # Nothing has been taken up yet.
    assert room((short, EngineLoad(0, 40, 0, 4000, 64))) == 20


def test_the_setting_is_a_cap():
    assert room((engine(slots=64), None), limit=16) == 16
    assert room((engine(slots=8), None), limit=16) == 8


def test_an_engine_that_says_nothing_is_taken_to_have_the_configured_slots():
    assert room((None, None)) == DEFAULT
    assert room((engine(), None), (engine(), None)) == 2 * DEFAULT
    assert room() == 0


@given(
    slots=st.integers(1, 500),
    tokens=st.integers(1, 10**6),
    expected=st.floats(0, 10**5),
    running=st.integers(0, 500),
    waiting=st.integers(0, 500),
)
def test_every_engine_gets_at_least_one_sample_and_never_more_than_its_slots(slots, tokens, expected, running, waiting):
    load = EngineLoad(running, waiting, 0, tokens, slots)
    assert 1 <= room((engine(slots, tokens), load), expected=expected) <= slots
