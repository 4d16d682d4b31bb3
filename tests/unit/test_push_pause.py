"""How tests/gpu/push.py finds a pause in the times at which tokens came."""

import pytest

from tests.gpu.push_pause import pauses, went_on


def stream(*gaps):
    """Tokens that come one by one, at first every second."""
    times = [0.0, 1.0, 2.0, 3.0, 4.0]
    for gap in gaps:
        times.append(times[-1] + gap)
    return [(at, count + 1) for count, at in enumerate(times)]


def test_a_pause_is_the_longest_gap_less_the_median():
    requests = [stream(3.0, 1.0, 1.0, 9.0), stream(2.0, 1.0, 1.0, 1.0, 1.0)]
    found = pauses(requests, begin=4.5, end=5.5)
    assert (found.p50_s, found.max_s, found.requests) == pytest.approx((1.5, 2.0, 2))


def test_a_pause_that_lasts_into_the_next_window_is_found_out():
    """Both windows would see the same gap."""
    requests = [stream(1.0, 1.0, 1.0, 1.0), stream(4.0)]
    assert pauses(requests, 4.2, 4.4).max_s == pauses(requests, 6.0, 6.2).max_s
    assert not went_on(requests, end=4.4, by=6.0)
    assert went_on(requests, end=4.4, by=8.5)
