"""A few faults in weight pushes between real processes; a witness outside them says what was served."""

from __future__ import annotations

import asyncio

import pytest
import torch

from tests.kit.pushes import campaign
from tests.kit.pushes.campaign import PARTS, Campaign, Result

SEED = 5
FAULTS = 10


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    torch.set_num_threads(1)
    part = PARTS["short"]
    made = Campaign(part, tmp_path_factory.mktemp("push"), print)
    return asyncio.run(made.run(campaign.drawn(part, SEED, FAULTS)))


@pytest.mark.timeout(1200)
def test_each_fault_was_carried_out_and_recovered_from(result: Result) -> None:
    assert not result.violations, result.violations
    assert len(result.outcomes) == FAULTS
    assert all(outcome.next_push_s for outcome in result.outcomes)


def test_only_whole_versions_were_served(result: Result) -> None:
    assert not result.mixed
    assert result.answers["engine whole"] > 50
    assert result.answers["replica whole"] > 10


def test_a_superseded_trainer_is_fenced(result: Result) -> None:
    assert all(outcome.fenced == outcome.fault.superseded for outcome in result.outcomes)
