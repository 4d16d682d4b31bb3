"""Random histories with kills: the Redis store on a real Valkey answers exactly what the reference store answers."""

from __future__ import annotations

import pytest

from tests.property import histories

COMMANDS, PARTS, HISTORIES = 80, 8, 200


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(PARTS))
def test_nothing_is_lost_or_doubled_and_both_stores_answer_alike(number: int) -> None:
    seen = histories.run(number, HISTORIES // PARTS, COMMANDS)
    print(dict(seen))
    assert seen["kill_store"]
    assert seen["restart_buffer"]
