"""The collective of a push between two processes, and what happens when one of them goes away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from services.common.process import free_port
from services.common.weight_group import WeightGroup

ROOT = Path(__file__).parents[3]
NUM_BYTES = 8 << 20


@contextmanager
def peer(port: int, timeout_s: float) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/kit/weight_group_peer.py"), str(port), str(NUM_BYTES), str(timeout_s)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}", "OMP_NUM_THREADS": "1"},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


def lead(port: int, timeout_s: float = 60.0) -> WeightGroup:
    return WeightGroup(
        backend="gloo", address="127.0.0.1", port=port, rank=0, world_size=2, name=f"w{port}", timeout_s=timeout_s
    )


def say(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin is not None
    process.stdin.write(text)
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_buckets_arrive_as_they_were_sent_and_both_leave() -> None:
    port = free_port()
    generator = torch.Generator().manual_seed(0)
    with peer(port, 60) as process:
        group = lead(port)
        assert hear(process) == "joined"
        for _ in range(3):
            flat = torch.randint(0, 256, (NUM_BYTES,), dtype=torch.uint8, generator=generator)
            say(process, "next\n")
            group.broadcast(flat)
            assert int(hear(process)) == int(flat.sum(dtype=torch.int64))
        group.close()
        group.close()
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_member_that_is_gone_is_an_error_and_no_hang(number: signal.Signals) -> None:
    """The test's own time limit would end a broadcast that never comes back."""
    port = free_port()
    with peer(port, 60) as process:
        group = lead(port, timeout_s=4.0)
        assert hear(process) == "joined"
        os.kill(process.pid, number)
        with pytest.raises(RuntimeError):
            group.broadcast(torch.zeros(NUM_BYTES, dtype=torch.uint8))
        group.close()


def test_a_member_that_never_comes_is_an_error() -> None:
    with pytest.raises(torch.distributed.DistError):
        lead(free_port(), timeout_s=1.0)


def test_two_groups_live_side_by_side() -> None:
    """One channel for each replica: a group that broke leaves the other alone."""
    ports = [free_port(), free_port()]
    with peer(ports[0], 60) as first, peer(ports[1], 60) as second:
        groups = [lead(port, timeout_s=20.0) for port in ports]
        assert [hear(first), hear(second)] == ["joined", "joined"]
        first.kill()
        first.wait()
        flat = torch.ones(NUM_BYTES, dtype=torch.uint8)
        with pytest.raises(RuntimeError):
            groups[0].broadcast(flat)
        say(second, "next\n")
        groups[1].broadcast(flat)
        assert int(hear(second)) == NUM_BYTES
        for group in groups:
            group.close()
