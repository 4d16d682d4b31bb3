"""A program that is watched: how it ends, and what it leaves to say."""

from __future__ import annotations

import asyncio
import sys

import psutil
import pytest

from services.rollout.engines.child import ChildProcess


@pytest.fixture
async def start(tmp_path):
    started = []

    def run(script: str) -> ChildProcess:
        started.append(ChildProcess([sys.executable, "-c", script], {}, tmp_path / "log"))
        return started[-1]

    yield run
    for child in started:
        await child.end(0.0)


async def test_the_end_of_the_log_is_told_in_one_line_without_colours(start):
    child = start("print('first'); print('\\x1b[31mno room\\x1b[0m'); raise SystemExit(3)")
    await child.ended()
    assert (child.running, child.status) == (False, 3)
    assert child.last_words("ended").endswith("log ends: first | no room")
    assert child.usage_error() is None


async def test_a_secret_in_the_log_is_not_told_and_none_of_the_runs_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYHEAD_STORE__PASSWORD", "hunter2")
    monkeypatch.setenv("polyhead_rollout__engine__admin_key", "hunter3")
    script = "import os; print('the-key hunter2', sorted(x for x in os.environ if 'polyhead' in x.lower()))"
    environment = {"POLYHEAD_OWN": "1"}
    child = ChildProcess([sys.executable, "-c", script], environment, tmp_path / "logs" / "log", ["the-key"])
    await child.ended()
    assert child.last_words("ended").endswith("log ends: *** *** ['POLYHEAD_OWN']")
    assert (tmp_path / "logs" / "log").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "logs").stat().st_mode & 0o777 == 0o700


async def test_a_flag_that_was_refused_is_told_from_other_ends(start):
    child = start("import argparse; argparse.ArgumentParser(prog='x').parse_args(['--what'])")
    assert child.usage_error() is None, "it has not ended"
    await child.ended()
    assert child.usage_error() == "unrecognized arguments: --what"


async def test_what_it_had_started_ends_with_it(start):
    child = start(
        "import subprocess, sys, time\n"
        "started = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('grandchild', started.pid, flush=True)\n"
        "time.sleep(600)"
    )
    while "grandchild" not in child.last_words(""):
        await asyncio.sleep(0.01)
    left = psutil.Process(int(child.last_words("").rpartition(" ")[2]))
    child.kill()
    await child.ended()
    while left.is_running() and left.status() != psutil.STATUS_ZOMBIE:
        await asyncio.sleep(0.01)


async def test_one_that_does_not_end_when_told_is_killed(start, tmp_path):
    child = start("import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)")
    while "deaf" not in child.last_words(""):
        await asyncio.sleep(0.01)
    await child.end(0.05)
    assert child.status == -9
    assert not psutil.pid_exists(child.pid)
