"""One run over two engines behind the router. An engine, the router, the worker and then both engines are killed while
they generate, and one engine while it is pushed to. It ends as if nothing had happened.
"""

from __future__ import annotations

import importlib.util
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from polyhead.v1 import sample_pb2
from services.common.versions import Version
from tests.kit.runs import Request, Run, surviving

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sglang_router") is None, reason="needs sglang-router")

STEPS = 160
SAMPLES = 16
# Steps between two kills.
APART = 15
INFLIGHT = 32
TOKENS = 48
RATE = 60
SAVE_S = 0.2
STREAM_INTERVAL = 2
KILLS = {"engine-0": ("engine-0",), "router": ("router",), "rollout": ("rollout",), "all": ("engine-0", "engine-1")}


@dataclass(frozen=True)
class Kill:
    """Times are in seconds since the epoch."""

    step: int
    looked_at: float
    saved: int
    """Tokens that the buffer had acknowledged of samples in generation, as of `looked_at` or later."""
    killed_at: float


def in_generation(run: Run) -> int:
    """Tokens saved of samples in generation."""
    ledger = run.ledger()
    rows = ledger.counts if ledger is not None else ()
    return sum(row.completion_tokens for row in rows if row.state == sample_pb2.SAMPLE_STATE_GENERATING)


def kill(run: Run, victims: tuple[str, ...]) -> Kill:
    processes = [run.victim(name) for name in victims]
    run.wait_for(lambda: in_generation(run) > INFLIGHT * TOKENS // 4, within_s=60)
    looked_at, saved = time.time(), in_generation(run)
    for process in processes:
        assert process is not None
        process.kill()
    return Kill(run.step(), looked_at, saved, time.time())


def kill_mid_push(run: Run) -> Version:
    """Engine 1, at a moment when its push has begun and cannot have ended: it was stopped before. Returns the version
    of that push."""
    engine = psutil.Process(run.child("engine-1"))
    engine.suspend()
    before = pushed(run, engine=1)
    # The pushes of a version to both engines begin together.
    run.wait_for(lambda: pushed(run, engine=0) > max(before, pushed(run, engine=1)), within_s=60)
    version = pushed(run, engine=0)
    engine.kill()
    return version


def pushed(run: Run, *, engine: int) -> Version:
    """The newest version of an engine's complete pushes."""
    done = [line for line in run.lines("pushes") if line["ok"] and line["engine"] == engine]
    return max((Version.parse(line["version"]) for line in done), default=Version(0, 0))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, flags: list[str]) -> tuple[Run, dict[str, Kill], Version]:
    """The finished run, its kills, and the version whose push was broken off."""
    run_dir: Path = tmp_path_factory.mktemp("engines") / "run"
    run = Run(
        run_dir,
        *flags,
        *("--num-rollout", str(STEPS), "--run-dir", str(run_dir), "--rollout.engines", "2"),
        *("--rollout-max-response-len", str(TOKENS), "--rollout.max_inflight", str(INFLIGHT)),
        *("--rollout.engine.decode_rate", str(RATE), "--rollout.engine.stream_interval", str(STREAM_INTERVAL)),
        *("--rollout.save_interval_s", str(SAVE_S), "--rollout.engine.args.log-requests", "true"),
    )
    kills: dict[str, Kill] = {}
    try:
        for number, (name, victims) in enumerate(KILLS.items()):
            run.wait_for(lambda due=5 + APART * number: run.step() >= due, within_s=120)
            kills[name] = kill(run, victims)
        run.wait_for(lambda: run.step() >= 5 + APART * len(KILLS), within_s=120)
        broken = kill_mid_push(run)
        run.wait_for(lambda: pushed(run, engine=1) > broken, within_s=60)
        assert run.finish(within_s=200) == 0, run.tail()
    finally:
        run.process.kill()
    return run, kills, broken


@pytest.mark.timeout(500)
def test_every_sample_is_finished_once(killed):
    run, _, _ = killed
    summary, steps = run.summary(), surviving(run.steps())
    assert sorted(steps) == list(range(1, STEPS + 1))
    trained = [group for line in steps.values() for group in line["group_ids"]]
    assert len(trained) == len(set(trained)) == 4 * STEPS
    assert summary["ledger_imbalance"] == 0
    assert summary["ledger"]["dead"] == 0
    assert sum(summary["ledger"]["dropped"].values()) == 0
    assert summary["ledger"]["consumed"] + summary["ledger"]["retired"] == SAMPLES * STEPS


@pytest.mark.parametrize("name", KILLS)
def test_what_was_killed_came_back_and_training_went_on(killed, name):
    run, kills, _ = killed
    assert all(len(run.summary()["processes"][victim]) >= 2 for victim in KILLS[name])
    assert max(surviving(run.steps())) >= kills[name].step + APART


@pytest.mark.parametrize("name", KILLS)
def test_acknowledged_tokens_are_not_generated_again(killed, name):
    """What the store had of samples in generation is part of the prompt with which they are resumed, unless they were
    finished between the look and the kill, or run on in the engine that was spared."""
    run, kills, _ = killed
    kill = kills[name]
    by_sample: dict[str, list[Request]] = defaultdict(list)
    for request in run.requests():
        by_sample[request.sample_id].append(request)
    kept = 0
    for first, *later in by_sample.values():
        if first.started_at > kill.killed_at or not is_held([first, *later], kill):
            continue
        resumed = next((each for each in later if each.started_at > kill.killed_at), None)
        last = [first, *later][-1]
        kept += (resumed.prompt if resumed is not None else last.prompt + last.tokens) - first.prompt
    assert kill.saved <= kept


def is_held(requests: list[Request], kill: Kill) -> bool:
    """Whether the sample was in generation at the look: its last request before the kill had not ended by then."""
    before = [each for each in requests if each.started_at <= kill.killed_at]
    return before[-1].ended_at is None or before[-1].ended_at >= kill.looked_at or len(before) < len(requests)


def test_only_a_short_tail_is_lost_and_only_with_the_worker_or_all_engines(killed):
    run, _, _ = killed
    tail = INFLIGHT * (2 * SAVE_S * RATE + STREAM_INTERVAL)
    discarded = run.summary()["tokens_discarded_by_reason"]
    assert discarded.keys() <= {"replica_lost", "engine_lost", "unavailable"}
    assert all(tokens <= tail for tokens in discarded.values())


def test_a_push_that_broke_off_is_made_up_for_and_held_up_nobody(killed):
    run, _, broken = killed
    lines = [line for line in run.lines("pushes") if line["version"] == str(broken)]
    assert [line["ok"] for line in lines if line["engine"] == 0] == [True]
    assert not lines[[line["engine"] for line in lines].index(1)]["ok"]
    assert pushed(run, engine=1) > broken


def test_the_summary_names_both_engines_and_the_router(killed):
    run, _, _ = killed
    engine = run.summary()["engine"]
    assert engine.pop("name").startswith("torch_engine/")
    assert engine == {"engines": 2, "replicas": 1, "router": True}
    assert run.left_behind() == []
