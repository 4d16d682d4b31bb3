"""More or fewer replicas while a run goes on: what may be asked for, and what the launcher makes of it."""

from __future__ import annotations

import asyncio
import sys

import pytest

from services.cli import scale, supervisor
from services.cli.fleet import Fleet
from services.cli.lock import sole_launcher
from services.cli.main import main
from services.cli.supervisor import Child, Supervisor
from services.common.config import dump, load
from services.common.errors import PolyheadError

# Says farewell as a replica does, a while after it was told to.
REPLICA = """
import signal, sys, time
def leave(*_):
    time.sleep(0.2)
    print("farewell", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print("ready", flush=True)
while True: signal.pause()
"""


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "config.toml").write_text(dump(load(None, {"run.dir": str(tmp_path)})))
    with sole_launcher(tmp_path):
        yield tmp_path


class Launched:
    """A fleet of small processes instead of replicas."""

    def __init__(self, run_dir):
        self.said = []
        self.dir = run_dir
        self.supervisor = Supervisor(asyncio.Event(), lambda *_: None)
        self.fleet = Fleet(load(run_dir / "config.toml"), self.supervisor, self.start, self.said.append)

    def start(self, role, index):
        log = self.dir / f"{role}-{index}.log"
        return self.supervisor.add(Child(role, [sys.executable, "-c", REPLICA], log, index))

    def indices(self, role):
        return sorted(child.index for child in self.supervisor.children if child.role == role and child.running)

    async def until(self, role, indices):
        async with asyncio.timeout(20):
            while self.indices(role) != indices or not all(self.is_ready(role, index) for index in indices):
                await asyncio.sleep(0.02)

    def is_ready(self, role, index):
        return (self.dir / f"{role}-{index}.log").read_text().endswith("ready\n")


async def test_a_fleet_grows_and_shrinks_to_the_last_wish(run_dir):
    launched = Launched(run_dir)
    launched.fleet.settle()
    await launched.until("rollout", [0])
    following = asyncio.create_task(launched.fleet.follow())
    try:
        assert main(["scale", "rollout=3", "reward=2", "--run-dir", str(run_dir)]) == 0
        await launched.until("rollout", [0, 1, 2])
        await launched.until("reward", [0, 1])
        assert main(["scale", "rollout=1", "--run-dir", str(run_dir)]) == 0
        await launched.until("rollout", [0])
        for index in (1, 2):
            assert (run_dir / f"rollout-{index}.log").read_text() == "ready\nfarewell\n"
        assert launched.indices("reward") == [0, 1], "the other role's wish stays"
        assert main(["scale", "rollout=2", "--run-dir", str(run_dir)]) == 0
        await launched.until("rollout", [0, 1])
        assert launched.said == [
            *("rollout: 1 → 3 replicas", "reward: 1 → 2 replicas"),
            *("rollout: 3 → 1 replicas", "rollout: 1 → 2 replicas"),
        ]
    finally:
        following.cancel()
        await launched.supervisor.end(launched.supervisor.children, 5)


async def test_an_index_is_not_filled_before_its_last_process_has_left(run_dir):
    launched = Launched(run_dir)
    scale.wish(run_dir, {"rollout": 2})
    following = asyncio.create_task(launched.fleet.follow())
    try:
        await launched.until("rollout", [0, 1])
        first = next(child for child in launched.supervisor.children if child.index == 1 and child.role == "rollout")
        launched.supervisor.tell(first)
        launched.fleet.settle()
        assert sum(child.index == 1 for child in launched.supervisor.children if child.role == "rollout") == 1
        await launched.supervisor.end([first], 5)
        await launched.until("rollout", [0, 1])
    finally:
        following.cancel()
        await launched.supervisor.end(launched.supervisor.children, 5)


async def test_a_wish_that_cannot_be_is_told_once_and_changes_nothing(run_dir):
    launched = Launched(run_dir)
    (run_dir / "scale.json").write_text('{"rollout": "many"}')
    launched.fleet._read()
    launched.fleet._read()
    assert len(launched.said) == 1
    assert launched.said[0].startswith("not scaled: ")
    launched.fleet.settle()
    assert launched.indices("rollout") == [0]
    await launched.supervisor.end(launched.supervisor.children, 5)


async def fails_for_good(launched, index):
    """The supervisor finds a replica that has ended, and will not start again."""
    child = next(child for child in launched.supervisor.children if (child.role, child.index) == ("rollout", index))
    child.process.kill()
    child.process.wait()
    child.restarts = supervisor.MAX_RESTARTS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Child, "stable", property(lambda one: one is not child))
        launched.supervisor._bring_back(child, -9)


async def test_a_replica_that_fails_for_good_is_left_out_until_more_are_asked_for(run_dir):
    launched = Launched(run_dir)
    launched.supervisor._spare = launched.fleet.leave_out
    scale.wish(run_dir, {"rollout": 3})
    following = asyncio.create_task(launched.fleet.follow())
    try:
        await launched.until("rollout", [0, 1, 2])
        await fails_for_good(launched, 1)
        assert scale.read(run_dir) == {"rollout": 2}
        assert "rollout-1 is left out, it failed: exit status -9" in launched.said[-2]
        assert launched.said[-1] == "rollout: 3 → 2 replicas"
        launched.fleet._read()
        launched.fleet.settle()
        assert launched.indices("rollout") == [0, 2], "the others keep their places, and it is not started again"
        assert [child.index for child in launched.supervisor.ended] == [1]
        scale.wish(run_dir, {"rollout": 1})
        await launched.until("rollout", [0])
        scale.wish(run_dir, {"rollout": 2})
        await launched.until("rollout", [0, 1])
    finally:
        following.cancel()
        await launched.supervisor.end(launched.supervisor.children, 5)


async def test_a_wish_that_cannot_be_written_down_does_not_bring_the_failed_one_back(run_dir, monkeypatch):
    launched = Launched(run_dir)
    launched.supervisor._spare = launched.fleet.leave_out
    scale.wish(run_dir, {"rollout": 2})
    launched.fleet._read()
    launched.fleet.settle()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scale, "wish", full)
    await fails_for_good(launched, 0)
    launched.fleet._read()
    launched.fleet.settle()
    assert launched.indices("rollout") == [1]
    assert "No space left" in launched.said[-1]
    await launched.supervisor.end(launched.supervisor.children, 5)


async def test_the_last_stable_replica_and_what_cannot_be_scaled_are_not_left_out(run_dir):
    launched = Launched(run_dir)
    launched.fleet.settle()
    error = PolyheadError("broken")
    (first,) = (child for child in launched.supervisor.children if child.role == "rollout")
    second = launched.start("rollout", 1)
    assert not launched.fleet.leave_out(first, error), "the other has just begun"
    second.up_since = -1e9
    second.told_to_end = True
    assert not launched.fleet.leave_out(first, error), "the other is leaving"
    second.told_to_end = False
    assert not launched.fleet.leave_out(launched.start("buffer", 0), error)
    assert launched.fleet.leave_out(first, error)
    await launched.supervisor.end(launched.supervisor.children, 5)


async def test_a_disk_that_fails_is_told_once_and_following_goes_on(run_dir, monkeypatch):
    launched = Launched(run_dir)
    monkeypatch.setattr("services.cli.fleet.LOOK_EVERY_S", 0.001)
    calls = []

    def broken(*_):
        calls.append(1)
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(scale, "read", broken)
        patch.setattr(launched, "start", broken)
        launched.fleet._start = broken
        following = asyncio.create_task(launched.fleet.follow())
        while len(calls) < 6:
            await asyncio.sleep(0.001)
    launched.fleet._start = launched.start
    await launched.until("rollout", [0])
    assert launched.said == ["not scaled: [Errno 5] Input/output error"]
    assert not following.done()
    following.cancel()
    await launched.supervisor.end(launched.supervisor.children, 5)


def refused(capsys, *arguments):
    assert main(["scale", *arguments]) != 0
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ("rollout=0", "rollout: 0 replicas: at least 1"),
        ("reward=1000", "reward: 1000 replicas: at least 1 and at most 256"),
        ("trainer=2", "trainer: cannot be scaled: rollout and reward can"),
        ("rollout", "rollout: is not ROLE=N"),
        ("rollout=-1", "rollout=-1: is not ROLE=N"),
        ("rollout=two", "rollout=two: is not ROLE=N"),
    ],
)
def test_what_cannot_be_asked_for(run_dir, capsys, request_, reason):
    assert reason in refused(capsys, request_, "--run-dir", str(run_dir))
    assert not (run_dir / "scale.json").exists()


def test_a_role_is_asked_for_once(run_dir, capsys):
    assert "rollout: is asked for twice" in refused(capsys, "rollout=1", "rollout=2", "--run-dir", str(run_dir))


def test_a_fixed_port_and_engines_of_others_cannot_be_scaled(run_dir, capsys):
    fixed = {"run.dir": str(run_dir), "rollout.address": "127.0.0.1:9000"}
    (run_dir / "config.toml").write_text(dump(load(None, fixed)))
    assert "127.0.0.1:9000 is a fixed port" in refused(capsys, "rollout=2", "--run-dir", str(run_dir))
    external = {"run.dir": str(run_dir), "rollout.engine.external": ["http://10.0.0.1:30000"]}
    (run_dir / "config.toml").write_text(dump(load(None, external)))
    assert "rollout.engine.external" in refused(capsys, "rollout=2", "--run-dir", str(run_dir))
    assert main(["scale", "reward=2", "--run-dir", str(run_dir)]) == 0


def test_without_a_run_or_its_launcher(tmp_path, capsys):
    assert "holds no run" in refused(capsys, "rollout=2", "--run-dir", str(tmp_path))
    (tmp_path / "config.toml").write_text(dump(load(None, {"run.dir": str(tmp_path)})))
    assert "no launcher is running" in refused(capsys, "rollout=2", "--run-dir", str(tmp_path))
