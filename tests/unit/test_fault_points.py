"""The fault kit itself: points are where they say, and what is armed is carried out once."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.kit.faults import matrix, points
from tests.kit.faults.shares import HITS, KINDS, OTHERS, VICTIMS, WHOLE, Shares

CHILD = """
import os, sys
from pathlib import Path
from tests.kit.faults import points
points._wrap("os.path:basename", "role.name", Path(sys.argv[1]))
print(os.path.basename("a/b"), flush=True)
print(os.path.basename("a/c"), flush=True)
"""


def child(at: points.Points) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(at.directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("role", sorted(points._FUNCTIONS))
def test_every_point_is_a_function_of_its_service(role: str) -> None:
    for place in points._FUNCTIONS[role].values():
        module, _, path = place.partition(":")
        assert callable(functools.reduce(getattr, path.split("."), importlib.import_module(module)))


def test_the_crash_matrix_names_points_that_exist() -> None:
    every = {name for victim in (*VICTIMS, *OTHERS) for name in matrix.points_of(victim)} | {"rivals", "store.full"}
    every |= {f"stop.{victim}" for victim in VICTIMS if "stop" in KINDS.get(victim, ("stop",))}
    assert {point for stages in matrix.ROWS.values() for at in stages.values() for point in at} <= every


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_armed_point_ends_the_process_there_and_the_next_one_goes_on(tmp_path: Path, when: str) -> None:
    at = points.Points(tmp_path)
    at.arm(f"role.name.{when}")
    struck = child(at)
    assert (struck.returncode, struck.stdout) == (-9, ""), struck.stderr
    assert not at.is_armed(f"role.name.{when}")
    assert len(at.hits(f"role.name.{when}")) == 1
    assert child(at).stdout == "b\nc\n"


def test_rounds_side_by_side_share_the_points_evenly() -> None:
    shares, taken = Shares(WHOLE, seed=0), Counter[str]()
    while (strike := shares.take("engine", Counter())) is not None:
        taken[strike.point or strike.kind] += 1
    points_of = matrix.points_of("engine")
    assert taken.total() == WHOLE + taken["stop"]
    assert {taken[name] for name in points_of} <= {min(taken[name] for name in points_of) + extra for extra in (0, 1)}
    assert {"kill", "freeze", "stop"} < taken.keys()


def test_a_point_that_nobody_reached_is_given_out_again_until_each_was_hit() -> None:
    shares, unreached, hit = Shares(WHOLE, seed=1), Counter[str](), Counter[str]()
    while (strike := shares.take("trainer", unreached)) is not None:
        if strike.point and not unreached[strike.point]:
            unreached[strike.point] += 1
            shares.undo("trainer", strike)
        else:
            hit[strike.point] += 1
    assert all(hit[name] >= HITS for name in matrix.points_of("trainer"))
