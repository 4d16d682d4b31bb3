"""One run of two buffers in which every victim is struck, and its network and clocks; an outside ledger has the
last word.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tests.kit.faults import rivals
from tests.kit.faults.judge import Verdict
from tests.kit.faults.rounds import Round
from tests.kit.faults.shares import VICTIMS, Shares
from tests.kit.systems import small_inputs

SEED = 7
STRIKES = 1


@pytest.fixture(scope="module")
def struck(tmp_path_factory: pytest.TempPathFactory) -> tuple[Round, Verdict]:
    root: Path = tmp_path_factory.mktemp("chaos")
    small_inputs(root / "inputs")
    (root / "round").mkdir()
    round_ = Round(root / "round", SEED, Shares(STRIKES, SEED), buffers=2)
    round_.strike(time.monotonic() + 200, threading.Event())
    return round_, round_.settle()


@pytest.mark.timeout(400)
def test_nothing_is_lost_or_doubled(struck: tuple[Round, Verdict]) -> None:
    _, verdict = struck
    assert verdict.clean, f"seed {SEED}: {verdict}"


def test_training_advanced_and_the_outside_ledger_saw_it(struck: tuple[Round, Verdict]) -> None:
    _, verdict = struck
    assert verdict.steps >= 5
    assert verdict.acknowledged["committed"] >= verdict.steps
    assert verdict.acknowledged["generated"] >= 16 * verdict.steps * 0.9


@pytest.mark.parametrize("victim", VICTIMS)
def test_every_victim_was_struck(struck: tuple[Round, Verdict], victim: str) -> None:
    round_, _ = struck
    assert round_.tally.strikes(victim) >= STRIKES


def test_the_network_and_the_clocks_were_struck(struck: tuple[Round, Verdict]) -> None:
    round_, _ = struck
    assert round_.tally.links.total() >= STRIKES
    assert round_.tally.clocks.total() >= STRIKES


@pytest.mark.long
@pytest.mark.timeout(400)
def test_of_two_trainers_the_older_is_fenced(tmp_path: Path) -> None:
    """Row 25 of the crash matrix: it froze with a step trained and not committed, while the second took over."""
    small_inputs(tmp_path / "inputs")
    (tmp_path / "round").mkdir()
    outcome = rivals.two_trainers(tmp_path / "round", SEED, "trainer.CommitStep.before")
    assert outcome.status == rivals.FENCED
    assert outcome.late_commits == 0
    assert outcome.verdict.clean, str(outcome.verdict)
