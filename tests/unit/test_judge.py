"""The outside ledger's judge finds each kind of violation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kit.faults.judge import Kept, judge

TOKENS = b"abcdefgh"


def saved(name: str = "g00000000-000", start: int = 0, tokens: bytes = TOKENS[:4]) -> dict:
    return {"kind": "saved", "id": name, "lease": 1, "from": start, "tokens": tokens.hex()}


def generated(name: str = "g00000000-000", digest: str = "d0", tokens: bytes = TOKENS, outcome: str = "OK") -> dict:
    outcome = f"OUTCOME_{outcome}"
    return {"kind": "generated", "id": name, "lease": 1, "outcome": outcome, "digest": digest, "tokens": tokens.hex()}


def scored(name: str = "g00000000-000", reward: float = 1.0, outcome: str = "OK") -> dict:
    return {"kind": "scored", "id": name, "lease": 1, "outcome": f"OUTCOME_{outcome}", "reward": reward}


def leased(step: int = 1, digest: str = "d0", name: str = "g00000000-000", reward: float = 1.0) -> dict:
    return {"kind": "leased", "epoch": 1, "step": step, "samples": {name: [digest, reward]}}


def committed(step: int = 1, name: str = "g00000000-000", epoch: int = 1) -> dict:
    return {"kind": "committed", "epoch": epoch, "step": step, "ids": [name]}


def pushed(epoch: int) -> dict:
    return {"kind": "pushed", "epoch": epoch, "step": 1, "by": "rollout-1"}


LINES = [saved(), saved(start=1, tokens=TOKENS[4:]), generated(), scored(), leased(), committed()]
METRICS = [{"step": 1, "epoch": 1, "group_ids": ["g00000000"]}]
KEPT = Kept({"g00000000-000": ["consumed"], "g00000001-000": [1]}, accepted=2)


def test_an_orderly_run_is_clean() -> None:
    repeated = [generated(outcome="DUPLICATE"), scored(outcome="DUPLICATE")]
    begun = saved("g00000001-000", tokens=TOKENS[:4])
    late = {"step": 1, "epoch": 0, "group_ids": ["g00000007"]}
    undone = {"step": 2, "epoch": 1, "group_ids": ["g00000001"]}
    again = {"kind": "recovered", "epoch": 2, "step": 1}
    lines = [*LINES, *repeated, begun, pushed(1), pushed(2), pushed(2), again]
    verdict = judge(lines, [*METRICS, late, undone], replace(KEPT, partials={"g00000001-000": TOKENS}))
    assert verdict.clean, str(verdict)
    assert verdict.closed == {"consumed": 1}
    assert verdict.steps == 1


@pytest.mark.parametrize(
    ("lines", "metrics", "kept"),
    [
        ([*LINES, generated("g00000001-000")], METRICS, KEPT),
        (LINES, METRICS, Kept({}, accepted=0)),
        ([saved(tokens=b"zzzz"), *LINES[2:]], METRICS, KEPT),
        (LINES, [{"step": 2, "epoch": 1, "group_ids": ["g00000000"]}], KEPT),
        (LINES, METRICS, Kept({"g00000000-000": [6], "g00000001-000": [1]}, accepted=2)),
        ([*LINES, saved("g00000001-000")], METRICS, KEPT),
        ([*LINES, scored("g00000001-000")], METRICS, Kept({**KEPT.states, "g00000001-000": [3]}, accepted=2)),
    ],
    ids=[
        "completion lost",
        "store emptied",
        "tokens generated again",
        "step missing",
        "trained and still there",
        "partial lost",
        "score lost",
    ],
)
def test_what_was_lost_is_found(lines: list, metrics: list, kept: Kept) -> None:
    assert judge(lines, metrics, kept).lost


@pytest.mark.parametrize(
    ("lines", "metrics", "kept"),
    [
        ([*LINES, generated()], METRICS, KEPT),
        ([*LINES, generated(digest="d1", outcome="DUPLICATE")], METRICS, KEPT),
        ([*LINES, leased(2, digest="d1")], METRICS, KEPT),
        (LINES, [*METRICS, {"step": 2, "epoch": 1, "group_ids": ["g00000000"]}], KEPT),
        (LINES, METRICS, Kept({"g00000000-000": ["consumed", 6], "g00000001-000": [1]}, accepted=2)),
        ([*LINES, committed(name="g00000001-000", epoch=2)], METRICS, KEPT),
        ([*LINES, scored()], METRICS, KEPT),
        ([*LINES, leased(reward=0.0)], METRICS, KEPT),
        ([*LINES, pushed(2), pushed(1)], METRICS, KEPT),
    ],
    ids=[
        "completed twice",
        "two contents",
        "leased other content",
        "trained twice",
        "two states",
        "other batch",
        "scored twice",
        "trained with another reward",
        "pushed by a superseded trainer",
    ],
)
def test_what_was_doubled_is_found(lines: list, metrics: list, kept: Kept) -> None:
    assert judge(lines, metrics, kept).doubled


@pytest.mark.parametrize("accepted", [1, 3])
def test_an_imbalance_is_found(accepted: int) -> None:
    assert judge(LINES, METRICS, Kept(KEPT.states, accepted)).imbalance
