"""One run whose rollout replicas become four while it goes on, and one again. Nobody waits, and nothing is lost."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field

import pytest

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.versions import Version
from tests.kit.runs import Run, polyhead, surviving

STEPS = 64
# A step takes four groups of four samples.
SAMPLES = 16
UNTRAINED = {sample_pb2.SAMPLE_STATE_READY, sample_pb2.SAMPLE_STATE_TRAINING}


class Floor(threading.Thread):
    """The published version as a second reader of the buffer sees it.

    A version that was read has been published: whoever begins later must not be below it. So this is never above the
    buffer's own floor, and behind it by no more than the time between two looks.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(daemon=True)
        self._run = run
        self._seen: list[tuple[float, Version]] = []
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.2):
            if (ledger := self._run.ledger()) is not None:
                self._seen.append((time.time(), Version.from_proto(ledger.published)))

    def end(self) -> None:
        self._ended.set()
        self.join()

    def at(self, moment: float) -> Version:
        return max((version for seen, version in self._seen if seen <= moment), default=Version(0, 0))


@dataclass
class Scaled:
    """The finished run and what was seen on the way."""

    run: Run
    floor: Floor
    joined_at: Version | None = None
    """The version that was published while the others joined."""
    pushed: dict[str, list[Version]] = field(default_factory=lambda: defaultdict(list))
    """Complete pushes by replica, in order."""


def is_still(run: Run) -> bool:
    """No further step can come: there is no whole batch, and nobody scores."""
    ledger = run.ledger()
    if ledger is None or ledger.published.step != ledger.step:
        return False
    return sum(row.samples for row in ledger.counts if row.state in UNTRAINED) < SAMPLES


def all_serve(run: Run, replicas: int) -> bool:
    states = [replica.state for replica in run.replicas()]
    return states == [pb.REPLICA_STATE_SERVING] * replicas


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory, flags: list[str]) -> Scaled:
    run_dir = tmp_path_factory.mktemp("scale") / "run"
    run = Run(
        run_dir,
        *flags,
        *("--num-rollout", str(STEPS), "--run-dir", str(run_dir)),
        # Slow enough, and few enough at a time, that one replica cannot do the work of four.
        *("--rollout.engine.decode_rate", "40", "--rollout.max_inflight", "16"),
        *("--rollout.engine.args.log-requests", "true"),
    )
    run.wait_for(lambda: run.step() >= 1, within_s=90)
    floor = Floor(run)
    floor.start()
    scaled = Scaled(run, floor)
    try:
        grow_between_two_versions(scaled)
        run.wait_for(lambda: len(engines_used(run)) == 4, within_s=60)
        due = run.step() + 10
        run.wait_for(lambda: run.step() >= due, within_s=60)
        assert polyhead("scale", "rollout=1", "--run-dir", str(run_dir)).returncode == 0
        run.wait_for(lambda: all_serve(run, 1), within_s=60)
        assert run.finish(within_s=200) == 0, run.tail()
    finally:
        floor.end()
        run.process.kill()
    for line in run.lines("pushes"):
        if line["ok"]:
            scaled.pushed[line["replica_id"]].append(Version.parse(line["version"]))
    return scaled


def grow_between_two_versions(scaled: Scaled) -> None:
    """With the reward replica stopped, no step is trained and no version published until three more serve."""
    run = scaled.run
    reward = run.victim("reward")
    assert reward is not None
    reward.suspend()
    try:
        run.wait_for(lambda: is_still(run), within_s=60)
        ledger = run.ledger()
        assert ledger is not None
        scaled.joined_at = Version.from_proto(ledger.published)
        grown = polyhead("scale", "rollout=4", "--run-dir", str(run.dir))
        assert grown.stdout == "rollout 1 → 4\n", grown.stderr
        run.wait_for(lambda: all_serve(run, 4), within_s=90)
    finally:
        reward.resume()


def engines_used(run: Run) -> set[str]:
    """The logs of engines that got a request."""
    logs = (run.dir / "logs").glob("engine-*.log")
    return {log.name for log in logs if "request_started" in log.read_text(errors="replace")}


@pytest.mark.timeout(400)
def test_a_replica_that_joins_between_two_versions_gets_the_present_one_and_stops_nobody(scaled):
    first, *joined = scaled.pushed.values()
    assert len(joined) == 3
    assert [versions[0] for versions in joined] == [scaled.joined_at] * 3
    assert scaled.joined_at in first
    for versions in scaled.pushed.values():
        assert versions == sorted(set(versions)), "each version once, in order"


def test_no_request_begins_below_the_floor(scaled):
    requests = scaled.run.requests()
    assert scaled.floor.at(requests[-1].started_at).step > STEPS // 2, "the floor was seen to rise"
    below = [each for each in requests if Version.parse(each.weight_version) < scaled.floor.at(each.started_at)]
    assert below == []


def test_nothing_is_lost_and_nothing_doubled(scaled):
    summary, steps = scaled.run.summary(), surviving(scaled.run.steps())
    assert sorted(steps) == list(range(1, STEPS + 1))
    trained = [group for line in steps.values() for group in line["group_ids"]]
    assert len(trained) == len(set(trained)) == 4 * STEPS
    assert summary["ledger_imbalance"] == 0
    assert summary["ledger"]["dead"] == 0
    assert sum(summary["ledger"]["dropped"].values()) == 0
    assert summary["ledger"]["consumed"] + summary["ledger"]["retired"] == SAMPLES * STEPS


def test_who_was_drained_saved_what_it_held_and_said_farewell(scaled):
    summary = scaled.run.summary()
    assert "replica_lost" not in summary["tokens_discarded_by_reason"]
    assert summary["tokens_discarded"] == sum(summary["tokens_discarded_by_reason"].values())
    assert '"killed"' not in (scaled.run.dir / "logs" / "launcher.log").read_text()
    assert (summary["engine"]["replicas"], len(summary["processes"]["rollout"])) == (4, 4), "nobody was restarted"
    assert scaled.run.left_behind() == []
