"""I13 on a long-tailed length mix: what is trained, what is lost, and whether `length_bias` says so."""

from __future__ import annotations

import pytest

from tests.kit.length_simulation import BATCH, LengthSimulation

STEPS = 25


@pytest.mark.parametrize(("max_staleness", "seed"), [(1, 1), (4, 2)])
async def test_wait_trains_every_group_in_time_whatever_its_length(max_staleness: int, seed: int) -> None:
    outcome = await LengthSimulation("wait", max_staleness, seed, STEPS).run()
    due = {ordinal for ordinal, born in outcome.births.items() if born + 1 + max_staleness <= STEPS}
    assert due <= set(outcome.trained)
    late = {ordinal: at for ordinal, at in outcome.trained.items() if at > outcome.births[ordinal] + 1 + max_staleness}
    assert (late, outcome.lost_samples, outcome.length_bias) == ({}, 0, 0.0)


@pytest.mark.parametrize(("max_staleness", "seed"), [(1, 3), (4, 4)])
async def test_drop_loses_the_long_ones_and_length_bias_says_how_much(max_staleness: int, seed: int) -> None:
    outcome = await LengthSimulation("drop", max_staleness, seed, STEPS).run()
    assert outcome.lost_samples > 0
    assert outcome.masked_tokens == 0
    assert outcome.length_bias == pytest.approx(outcome.own_length_bias)
    assert outcome.length_bias > 1.2


async def test_mask_loses_no_sample_but_tokens_over_the_bound() -> None:
    outcome = await LengthSimulation("mask", 1, 5, STEPS).run()
    assert (outcome.lost_samples, len(outcome.trained)) == (0, STEPS * BATCH)
    assert 0 < outcome.masked_tokens < outcome.trained_tokens
