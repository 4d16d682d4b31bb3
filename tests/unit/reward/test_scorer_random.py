"""A coin per sample, and the same one whenever it is tossed."""

from __future__ import annotations

from services.reward.scorers.chance import score
from tests.kit.reward_items import item


def test_a_score_is_repeated() -> None:
    tossed = [score(item("", sample_id=f"g{number}-0")).reward for number in range(2000)]
    assert tossed == [score(item("other", "label", sample_id=f"g{number}-0")).reward for number in range(2000)]
    assert set(tossed) == {0.0, 1.0}
    assert 900 < sum(tossed) < 1100


def test_any_id() -> None:
    assert {score(item("", sample_id=name)).reward for name in ("", "\ud800", "\x00", "é" * 10_000)} <= {0.0, 1.0}
