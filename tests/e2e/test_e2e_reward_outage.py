"""Runs whose reward server fails in every way, one after the other: generation waits, nothing is lost or invented.

Each fault lasts OUTAGE_S seconds from when everything waits for it: `make outage` has a minute, and all faults over
both transports.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AutoTokenizer

from polyhead.v1 import sample_pb2
from services.common import wire
from tests.kit.failing_reward_server import FAULTS, FailingServer, failing_server, reward_of
from tests.kit.faults import witness
from tests.kit.faults.points import Points
from tests.kit.runs import Run, polyhead

QUICK_S = 2.0
OUTAGE_S = float(os.environ.get("POLYHEAD_OUTAGE_S", QUICK_S))
# Within a lane, what the transport has no part in is seen over one of them only.
OF_KIND = {"grpc": ("gone", "NaN")} if OUTAGE_S == QUICK_S else {"http": FAULTS, "grpc": FAULTS}
# Between two faults.
STEPS_APART = 2
# Four groups of four a step, four steps of staleness and the one that is trained.
BATCH = 16
MOST_IN_THE_WORKS = 5 * BATCH
GENERATED, SCORING = sample_pb2.SAMPLE_STATE_GENERATED, sample_pb2.SAMPLE_STATE_SCORING
BUSY = (sample_pb2.SAMPLE_STATE_GENERATING, sample_pb2.SAMPLE_STATE_TRAINING)


class Seen(NamedTuple):
    """During a fault."""

    step: int
    """When everything waited."""
    later: int
    """At the end of it."""
    waiting: int
    imbalance: int
    status: str


class Finished(NamedTuple):
    run: Run
    seen: dict[str, Seen]
    lines: list[dict[str, object]]
    """What the buffer acknowledged to the services."""
    tokenizer: AutoTokenizer


@pytest.fixture(scope="module", params=OF_KIND)
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, inputs: Path, flags: list[str]
) -> Finished:
    directory = tmp_path_factory.mktemp(f"outage-{request.param}")
    points = Points(directory / "points")
    with failing_server(request.param) as server:
        remote = {"kind": server.kind, "urls": server.url, "timeout_s": "1", "backoff_s": "0.05"}
        remote |= {"breaker_reset_s": "0.3", "breaker_max_reset_s": "1"}
        settings = [part for key, value in remote.items() for part in (f"--reward.remote.{key}", value)]
        command = [*flags, "--reward.scorer", "remote", *settings, "--num-rollout", "60"]
        run = Run(directory / "run", *command, "--run-dir", str(directory / "run"), environment=points.environment())
        seen = {fault: _through(run, server, fault) for fault in OF_KIND[server.kind]}
        assert run.finish(within_s=180) == 0, run.tail()
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    return Finished(run, seen, witness.read(points.directory / "witness"), tokenizer)


def _through(run: Run, server: FailingServer, fault: str) -> Seen:
    begin = run.step()
    run.wait_for(lambda: run.step() >= begin + STEPS_APART, within_s=90)
    server.become(fault)
    seen = _look(run)
    server.become("")
    return seen


def _look(run: Run) -> Seen:
    """Waits until everything that may be generated waits for its score, and looks on."""
    counts: dict[int, int] = {}
    imbalances: list[int] = []

    def all_wait() -> bool:
        if (ledger := run.ledger()) is not None:
            imbalances.append(ledger.imbalance)
            counts.clear()
            counts.update({count.state: count.samples for count in ledger.counts})
        # Groups that had their scores before may wait for those that make a batch of them.
        is_busy = any(map(counts.get, BUSY)) or counts.get(sample_pb2.SAMPLE_STATE_READY, 0) >= BATCH
        return counts.get(GENERATED, 0) + counts.get(SCORING, 0) > BATCH and not is_busy

    run.wait_for(all_wait, within_s=90)
    step, until = run.step(), time.monotonic() + OUTAGE_S
    run.wait_for(lambda: time.monotonic() > until, within_s=OUTAGE_S + 10)
    all_wait()
    waiting = counts.get(GENERATED, 0) + counts.get(SCORING, 0)
    return Seen(step, run.step(), waiting, max(map(abs, imbalances)), polyhead("status", str(run.dir)).stdout)


@pytest.mark.timeout(1200)
def test_generation_stops_and_the_samples_wait(finished: Finished) -> None:
    for fault, seen in finished.seen.items():
        assert seen.later == seen.step, fault
        assert BATCH < seen.waiting <= MOST_IN_THE_WORKS, fault
        assert seen.imbalance == 0, fault
        assert "breaker" in seen.status, fault


def test_the_run_goes_on_by_itself_and_loses_nothing(finished: Finished) -> None:
    steps = [line["step"] for line in finished.run.steps()]
    assert steps == list(range(1, len(steps) + 1))
    summary = finished.run.summary()
    ledger = summary["ledger"]
    assert (summary["ledger_imbalance"], ledger["dead"], sum(ledger["dropped"].values())) == (0, 0, 0)
    assert ledger["consumed"] + ledger["retired"] == BATCH * len(steps)
    assert {len(each) for name, each in summary["processes"].items() if name != "launcher"} == {1}
    assert finished.run.left_behind() == []


def test_every_reward_is_what_the_server_gives(finished: Finished) -> None:
    lines = finished.lines
    texts = {line["id"]: _text(finished, str(line["tokens"])) for line in lines if line["kind"] == "generated"}
    scored = {line["id"]: line["reward"] for line in lines if line["kind"] == "scored"}
    trained = {name: each[1] for line in lines if line["kind"] == "leased" for name, each in line["samples"].items()}
    assert len(trained) == BATCH * len(finished.run.steps())
    assert set(trained) <= set(scored) <= set(texts)
    assert 0 not in scored.values()
    assert scored == {name: reward_of(texts[str(name)]) for name in scored}
    assert trained == {name: scored[name] for name in trained}


def _text(finished: Finished, tokens: str) -> str:
    ids = wire.decode_tokens(bytes.fromhex(tokens)).tolist()
    text: str = finished.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.encode(errors="replace").decode()
