"""Random inputs to every built-in scorer, for ten seconds."""

from __future__ import annotations

import pytest

from tests.property import scorer_fuzz

SECONDS, SEED = 10, 0


@pytest.mark.timeout(300)
def test_any_input_has_a_verdict_or_a_reason() -> None:
    print(dict(scorer_fuzz.run(SECONDS, SEED)))
