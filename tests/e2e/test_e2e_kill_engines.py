"""One run over two engines behind the router. An engine, the router, the worker and then both engines are killed while
they generate; an engine, the router and the worker while a push is under way. It ends as if nothing had happened.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from polyhead.v1 import sample_pb2
from services.common.versions import Version
from tests.kit.runs import Request, Run, surviving

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("sglang_router") is None, reason="needs sglang-router"),
    pytest.mark.long,
]

STEPS = 64
SAMPLES = 16
# Steps between two kills.
APART = 6
INFLIGHT = 32
TOKENS = 48
RATE = 60
SAVE_S = 0.2
STREAM_INTERVAL = 2
KILLS = {
    "engine-0": ("engine-0",),
    "router": ("router",),
    "rollout": ("rollout",),
    "all": ("engine-0", "engine-1"),
    "engine-1 mid-push": ("engine-1",),
    "router mid-push": ("router",),
    "rollout mid-push": ("rollout",),
}
MID_PUSH = [name for name in KILLS if name.endswith("mid-push")]
# Every sample has a reward of its own: without a signal the weights would stay what they are, and so would log-probs.
REWARD = f"""
def even(args, sample, **kwargs):
    return sum(ord(character) % 2 == 0 for character in sample.response) / {TOKENS}
"""
LEARNING_RATE = 1e-4
# Two computations of one token's log-prob in float32, against weights that are one step apart.
SAME_WEIGHTS, OTHER_WEIGHTS = 1e-9, 1e-6


@dataclass(frozen=True)
class Kill:
    """Times are in seconds since the epoch."""

    step: int
    saved: dict[str, int]
    """Tokens that the buffer had acknowledged of each sample in generation just before."""
    killed_at: float
    pushing: Version | None = None
    """The version whose push to engine 1 was under way."""


def in_generation(run: Run) -> dict[str, int]:
    """Tokens saved of each sample in generation that has some."""
    listed = run.samples(sample_pb2.SAMPLE_STATE_GENERATING)
    return {each.sample_id: tokens for each in listed if (tokens := each.record.completion_tokens)}


def kill_generating(run: Run, victims: tuple[str, ...]) -> Kill:
    run.wait_for(lambda: sum(in_generation(run).values()) > INFLIGHT * TOKENS // 4, within_s=60)
    return kill(run, victims)


def kill_mid_push(run: Run, victims: tuple[str, ...]) -> Kill:
    """Engine 1 is stopped, so that a push to it that has begun cannot end before the kill."""
    engine = psutil.Process(run.child("engine-1"))
    try:
        run.wait_for(lambda: is_held_up(run, engine), within_s=60)
        return kill(run, victims, pushing=pushed(run, engine=0))
    finally:
        with suppress(psutil.NoSuchProcess):
            engine.resume()


def is_held_up(run: Run, engine: psutil.Process) -> bool:
    """Stops engine 1. It runs on when no push begins: the next step may wait for the very samples that it holds."""
    if pushed(run, engine=0) != pushed(run, engine=1):
        return False  # it may still be joining
    engine.suspend()
    # The pushes of a version to both engines begin together. Seen twice: the line of a push that has ended is not late.
    for _ in range(8):
        behind = pushed(run, engine=0) > pushed(run, engine=1)
        time.sleep(0.25)
        if behind and pushed(run, engine=0) > pushed(run, engine=1):
            return True
    engine.resume()
    return False


def kill(run: Run, victims: tuple[str, ...], pushing: Version | None = None) -> Kill:
    processes = [run.victim(name) for name in victims]
    saved = in_generation(run)
    for process in processes:
        assert process is not None
        process.kill()
    return Kill(run.step(), saved, time.time(), pushing)


def pushed(run: Run, *, engine: int) -> Version:
    """The newest version of an engine's complete pushes."""
    done = [line for line in run.lines("pushes") if line["ok"] and line["engine"] == engine]
    return max((Version.parse(line["version"]) for line in done), default=Version(0, 0))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, flags: list[str]) -> tuple[Run, dict[str, Kill]]:
    """The finished run and its kills."""
    run_dir: Path = tmp_path_factory.mktemp("engines") / "run"
    plugins = tmp_path_factory.mktemp("plugins")
    (plugins / "signal_reward.py").write_text(REWARD)
    run = Run(
        run_dir,
        *flags,
        *("--num-rollout", str(STEPS), "--run-dir", str(run_dir), "--rollout.engines", "2"),
        *("--rollout-max-response-len", str(TOKENS), "--rollout.max_inflight", str(INFLIGHT)),
        *("--rollout.engine.decode_rate", str(RATE), "--rollout.engine.stream_interval", str(STREAM_INTERVAL)),
        *("--rollout.save_interval_s", str(SAVE_S), "--rollout.engine.args.log-requests", "true"),
        *("--custom-rm-path", "signal_reward:even", "--plugins.paths", json.dumps([str(plugins)])),
        # Retracted requests are computed anew, so that a token's log-prob is that of its version and of nothing else.
        *("--lr", str(LEARNING_RATE), "--rollout.pause_mode", "retract"),
    )
    kills: dict[str, Kill] = {}
    try:
        for number, (name, victims) in enumerate(KILLS.items()):
            run.wait_for(lambda due=5 + APART * number: run.step() >= due, within_s=120)
            kills[name] = (kill_mid_push if name in MID_PUSH else kill_generating)(run, victims)
        assert run.finish(within_s=200) == 0, run.tail()
    finally:
        run.process.kill()
    return run, kills


@pytest.mark.timeout(500)
def test_every_sample_is_finished_once(killed):
    run, _ = killed
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
    run, kills = killed
    for victim in KILLS[name]:
        deaths = sum(victim in victims for victims in KILLS.values())
        assert len(run.summary()["processes"][victim]) > deaths
    assert max(surviving(run.steps())) >= kills[name].step + APART


@pytest.mark.parametrize("name", KILLS)
def test_acknowledged_tokens_are_not_generated_again(killed, name):
    """What the store had of a sample in generation is part of the prompt with which it is resumed, and part of what it
    ends as when it is not: it was finished at about that time, or ran on in the engine that was spared."""
    run, kills = killed
    by_sample: dict[str, list[Request]] = defaultdict(list)
    for request in run.requests():
        by_sample[request.sample_id].append(request)
    again = {}
    for sample_id, saved in kills[name].saved.items():
        first, *later = by_sample[sample_id]
        resumed = next((each for each in later if each.started_at > kills[name].killed_at), None)
        last = [first, *later][-1]
        kept = (resumed.prompt if resumed is not None else last.prompt + last.tokens) - first.prompt
        if kept < saved:
            again[sample_id] = (saved, kept)
    assert not again
    assert name in MID_PUSH or kills[name].saved


def test_only_a_short_tail_is_lost_and_only_with_the_worker_or_all_engines(killed):
    run, _ = killed
    tail = INFLIGHT * (2 * SAVE_S * RATE + STREAM_INTERVAL)
    worker_deaths = sum(victims == ("rollout",) for victims in KILLS.values())
    discarded = run.summary()["tokens_discarded_by_reason"]
    assert discarded.keys() <= {"replica_lost", "engine_lost", "unavailable"}
    assert all(tokens <= worker_deaths * tail for tokens in discarded.values())


@pytest.mark.parametrize("name", MID_PUSH)
def test_a_push_was_under_way_and_only_the_routers_death_leaves_it_be(killed, name):
    run, kills = killed
    kill = kills[name]
    lines = [line for line in run.lines("pushes") if line["version"] == str(kill.pushing)]
    held_up = next(line for line in lines if line["engine"] == 1)
    assert held_up["time"] - held_up["seconds"] < kill.killed_at < held_up["time"]
    assert held_up["ok"] == (KILLS[name] == ("router",)), held_up["error"]
    assert next(line for line in lines if line["engine"] == 0)["ok"], "it held up nobody"
    assert pushed(run, engine=1) > kill.pushing


def test_tokens_were_sampled_by_the_versions_they_name(killed):
    """What a step trains of the very version it trains has the log-probs that the trainer computes: a token of other
    weights among them would show, as all the others do.
    """
    run, _ = killed
    steps = surviving(run.steps()).values()
    fresh = [line["mismatch_kl_fresh"] for line in steps if line["mismatch_kl_fresh"] is not None]
    assert len(fresh) > STEPS // 4
    assert max(fresh) < SAME_WEIGHTS
    assert statistics.median(line["mismatch_kl"] for line in steps) > OTHER_WEIGHTS


def test_the_summary_names_both_engines_and_the_router(killed):
    run, _ = killed
    engine = run.summary()["engine"]
    assert engine.pop("name").startswith("torch_engine/")
    assert engine == {"engines": 2, "replicas": 1, "router": True}
    assert run.left_behind() == []
