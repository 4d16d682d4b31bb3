"""A run whose rewards come over HTTP from a server elsewhere, by slime's remote_rm."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.kit.runs import Run


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


@pytest.mark.long
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
