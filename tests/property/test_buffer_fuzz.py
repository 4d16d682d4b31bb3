"""Malformed requests of every kind, for a minute."""

from __future__ import annotations

import pytest

from tests.property import fuzz

SECONDS, SEED = 60, 0


@pytest.mark.timeout(600)
def test_what_is_malformed_is_refused_by_name_and_changes_nothing() -> None:
    print(dict(fuzz.run(SECONDS, SEED)))
