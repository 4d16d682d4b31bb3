"""A few steps of the demo, from a random model, with rewards from the example servers, each in its own process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from services.cli.demo.common import prepare_directory
from services.common.process import die_with_parent, free_port
from tests.kit.runs import ROOT, Run
from tests.kit.tiny_model import build_tiny_qwen3

STEPS = 6
SERVERS = {
    "grpc": ("reward_server.py", "127.0.0.1:{port}", "grpc://127.0.0.1:{port}"),
    "http": ("reward_server_http.py", "{port}", "http://127.0.0.1:{port}/reward"),
}


@contextmanager
def example(kind: str) -> Iterator[str]:
    """The URL of an example that serves."""
    script, address, url = SERVERS[kind]
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, f"examples/{script}", address.format(port=port)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"},
        preexec_fn=partial(die_with_parent, os.getpid()),
    )
    try:
        while process.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
        yield url.format(port=port)
    finally:
        process.kill()
        process.wait()


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", SERVERS)
def test_the_demo_has_its_rewards_from_a_server_elsewhere(tmp_path: Path, kind: str) -> None:
    run_dir = tmp_path / "run"
    # Instead of its own, which is warmed up first.
    prepare_directory(run_dir, "addition", 0)
    build_tiny_qwen3(run_dir / "model")
    with example(kind) as url:
        remote = ["--reward.scorer", "remote", "--reward.remote.kind", kind, "--reward.remote.urls", url]
        run = Run(run_dir, "demo", *remote, "--run.num_rollout", str(STEPS), "--run.dir", str(run_dir))
        assert run.finish(within_s=280) == 0, run.tail()
    summary = run.summary()
    assert (summary["ledger_imbalance"], summary["ledger"]["dead"]) == (0, 0)
    assert [line["step"] for line in run.steps()] == list(range(1, STEPS + 1))
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert len(samples) >= STEPS
    for sample in samples:
        wanted = 1 / (1 + abs(len(sample["completion"]) - len(sample["label"])))
        assert sample["reward"] == pytest.approx(wanted, rel=1e-12)
    assert run.left_behind() == []
