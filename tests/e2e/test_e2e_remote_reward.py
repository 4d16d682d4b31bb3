"""Runs whose rewards come from servers elsewhere: over gRPC from one that goes away, and by slime's remote_rm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from polyhead.v1 import sample_pb2
from services.common.process import die_with_parent, free_port
from tests.kit.runs import ROOT, Run, polyhead

STEPS = 24
AWAY_FROM_STEP = 6
# Four groups of four a step, four steps of staleness and the one that is trained.
MOST_IN_THE_WORKS = 5 * 16


def server(port: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "examples/reward_server.py", f"127.0.0.1:{port}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"},
        preexec_fn=partial(die_with_parent, os.getpid()),
    )


@pytest.fixture(scope="module")
def outage(tmp_path_factory: pytest.TempPathFactory, flags: list[str]) -> tuple[Run, dict[str, object]]:
    """The finished run, and what was seen while its reward server was away."""
    run_dir = tmp_path_factory.mktemp("remote") / "run"
    port = free_port()
    remote = {"kind": "grpc", "urls": f"grpc://127.0.0.1:{port}", "breaker_reset_s": "0.5", "breaker_max_reset_s": "1"}
    settings = [part for key, value in remote.items() for part in (f"--reward.remote.{key}", value)]
    process = server(port)
    try:
        time.sleep(1)
        command = [*flags, "--reward.scorer", "remote", *settings, "--num-rollout", str(STEPS)]
        run = Run(run_dir, *command, "--run-dir", str(run_dir))
        run.wait_for(lambda: run.step() >= AWAY_FROM_STEP, within_s=90)
        process.kill()
        process.wait()
        seen = _while_away(run)
        process = server(port)
        assert run.finish(within_s=120) == 0, run.tail()
    finally:
        process.kill()
        process.wait()
    return run, seen


def _while_away(run: Run) -> dict[str, object]:
    """Waits until everything that may be generated waits for its score, and looks on for some seconds."""
    generated = sample_pb2.SAMPLE_STATE_GENERATED
    counts: list[dict[int, int]] = []

    def all_wait() -> bool:
        if (ledger := run.ledger()) is not None:
            assert ledger.imbalance == 0
            counts.append({count.state: count.samples for count in ledger.counts})
        busy = (sample_pb2.SAMPLE_STATE_GENERATING, sample_pb2.SAMPLE_STATE_READY, sample_pb2.SAMPLE_STATE_TRAINING)
        return bool(counts) and counts[-1].get(generated, 0) > 16 and not any(counts[-1].get(state) for state in busy)

    run.wait_for(all_wait, within_s=60)
    step = run.step()
    time.sleep(4)
    all_wait()
    status = polyhead("status", str(run.dir)).stdout
    return {"step": step, "later": run.step(), "waiting": counts[-1].get(generated, 0), "status": status}


@pytest.mark.timeout(300)
def test_without_scores_generation_stops_and_the_samples_wait(outage):
    _, seen = outage
    assert seen["later"] == seen["step"] < STEPS
    assert 16 < seen["waiting"] <= MOST_IN_THE_WORKS
    assert "UNAVAILABLE" in seen["status"]
    assert "breaker" in seen["status"]


def test_the_run_goes_on_when_the_server_is_back(outage):
    run, _ = outage
    assert [line["step"] for line in run.steps()] == list(range(1, STEPS + 1))


def test_nothing_is_lost_in_the_outage_and_no_score_is_invented(outage):
    run, _ = outage
    summary = run.summary()
    assert summary["ledger_imbalance"] == 0
    assert summary["ledger"]["dead"] == 0
    assert sum(summary["ledger"]["dropped"].values()) == 0
    assert summary["ledger"]["consumed"] + summary["ledger"]["retired"] == 16 * STEPS
    # What the server gives is never 0.
    assert min(line["reward_mean"] for line in run.steps()) > 1 / 17
    assert run.left_behind() == []


class _RemoteRm(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked: list[dict[str, object]] = []  # noqa: RUF012 - of the one server there is

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        answer = json.dumps({"score": 0.25 + 0.5 * (len(self.asked) % 2), "asked": len(self.asked)}).encode()
        self.send_response(200 if len(self.asked) % 5 else 500)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Nothing: the run has its own log."""


@contextmanager
def remote_rm() -> Iterator[str]:
    served = ThreadingHTTPServer(("127.0.0.1", 0), _RemoteRm)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{served.server_port}/reward"
    finally:
        served.shutdown()
        served.server_close()


@pytest.mark.timeout(180)
def test_slimes_flags_get_rewards_over_http_though_a_fifth_of_the_calls_fail(tmp_path: Path, flags: list[str]):
    run_dir = tmp_path / "run"
    with remote_rm() as url:
        more = ["--rm-type", "remote_rm", "--rm-url", url, "--num-rollout", "8", "--reward.remote.backoff_s", "0.05"]
        run = Run(run_dir, *flags, *more, "--run-dir", str(run_dir))
        assert run.finish(within_s=150) == 0, run.tail()
    summary = run.summary()
    assert (summary["ledger_imbalance"], summary["ledger"]["dead"]) == (0, 0)
    assert {"prompt", "response", "label"} == set(_RemoteRm.asked[0])
    assert all(0.25 <= line["reward_mean"] <= 0.75 for line in run.steps())
