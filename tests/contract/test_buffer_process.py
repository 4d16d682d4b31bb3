"""``python -m services.buffer`` as the launcher runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.process import free_port
from tests.kit import valkey

CONFIG = """
[data]
prompt_data = "{data}"
[store]
url = "{store}"
[buffer]
address = "{address}"
"""


def start(directory: Path, *, rows: str, store: str, address: str = "127.0.0.1:0") -> subprocess.Popen[str]:
    (directory / "rows.jsonl").write_text(rows)
    config = directory / "run.toml"
    config.write_text(CONFIG.format(data=directory / "rows.jsonl", store=store, address=address))
    return subprocess.Popen(
        [sys.executable, "-m", "services.buffer", "-c", str(config)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_serves_and_leaves_on_sigterm(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with valkey.running() as server:
        process = start(tmp_path, rows='{"input": "a"}\n', store=server.url, address=address)
        try:
            with grpc.insecure_channel(address) as channel:
                grpc.channel_ready_future(channel).result(timeout=20)
                answer = health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(service=""), timeout=5, wait_for_ready=True
                )
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        finally:
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=20)
    assert process.returncode == 0, log


@pytest.mark.parametrize(
    ("rows", "store", "line"),
    [
        ('{"input": "a"}\n{"input":', "unix:///nowhere", "rows.jsonl:2: is not valid JSON"),
        ('{"input": "a"}\n', "embedded", 'store.url: "embedded" is started by "polyhead up"'),
    ],
)
def test_what_cannot_run_ends_in_one_line(tmp_path: Path, rows: str, store: str, line: str) -> None:
    process = start(tmp_path, rows=rows, store=store)
    _, log = process.communicate(timeout=20)
    assert process.returncode == 2
    assert line in log.splitlines()[-1]
    assert "Traceback" not in log
