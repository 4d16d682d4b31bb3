"""Killed at any moment of a save, or refused by the disk: what was there before loads, whole, or what comes after."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kit.trainer_saves import LOST_ANOTHER, REFUSED, SAVED

KILLED = -signal.SIGKILL
OLD, REPLACED, NEW = "e1.s10", "e1.s20", "e2.s20"


@pytest.fixture(
    scope="module", params=[(1, 13), pytest.param((2, 29), marks=pytest.mark.long)], ids=["one rank", "two ranks"]
)
def saves(request: Any, tmp_path_factory: Any) -> list[dict[str, Any]]:
    ranks, stride = request.param
    directory = tmp_path_factory.mktemp("saves") / "runs"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kit.trainer_saves", str(directory), str(ranks), str(stride)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'protos'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.timeout(300)
def test_a_save_that_is_killed_leaves_a_whole_checkpoint(saves: list[dict[str, Any]]) -> None:
    struck = [each for each in saves if "line" in each]
    for each in struck:
        assert each["whole"], each
        assert each["left"] == [f"step_{step:08d}" for step in each["steps"]], each
        assert set(each["statuses"]) <= {SAVED, KILLED, LOST_ANOTHER}, each
        if KILLED not in each["statuses"]:
            assert each["loaded"] == NEW, each
    for rank in {each["rank"] for each in struck}:
        first, again = (
            [each for each in struck if (each["rank"], each["again"]) == (rank, of)] for of in (False, True)
        )
        for tried, before in ((first, [OLD]), (again, [REPLACED, OLD])):
            loaded = [each["loaded"] for each in tried]
            # In this order: what was there, if it is to be replaced perhaps the one before it, and what is there then.
            assert loaded == sorted(loaded, key=[*before, NEW].index), loaded
            assert loaded[0] == before[0]
            assert loaded[-1] == NEW
            assert tried[0]["statuses"][rank] == KILLED


def test_a_disk_that_refuses_one_rank_leaves_the_previous_checkpoint(saves: list[dict[str, Any]]) -> None:
    refused = [each for each in saves if "refused" in each]
    assert refused
    for each in refused:
        assert each["statuses"][0] == REFUSED
        assert set(each["statuses"][1:]) <= {SAVED}
        assert (each["loaded"], each["whole"], each["temporary"]) == (OLD, True, 0)
