"""The collective of a push between two processes, and what happens when one of them goes away."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from services.common.process import free_port
from services.common.weight_group import WeightGroup

ROOT = Path(__file__).parents[3]
NUM_BYTES = 8 << 20
LISTENING = "0A"
# 127.0.0.1 and ::1, as /proc/net/tcp writes them.
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


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
        # Its imports are no part of any time limit.
        assert hear(process) == "started"
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


def listening_on(pid: int) -> set[str]:
    """Local addresses of the process's listening TCP sockets, of both families, as the kernel lists them (hex)."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            inodes.add(str(entry.readlink()).removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == LISTENING and row[9] in inodes}


def test_both_ends_listen_on_loopback_only() -> None:
    port = free_port()
    before = listening_on(os.getpid())
    with peer(port, 60) as process:
        group = lead(port)
        assert hear(process) == "joined"
        ours = listening_on(os.getpid())
        assert ours - before <= LOOPBACK
        assert ours & LOOPBACK
        assert listening_on(process.pid) <= LOOPBACK
        group.close()


def test_a_port_that_is_taken_is_an_error_of_the_collective() -> None:
    in_use = pytest.raises(torch.distributed.DistError, match="in use")
    with socket.create_server(("127.0.0.1", 0)) as taken, in_use:
        lead(taken.getsockname()[1], timeout_s=1.0)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)])
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


@pytest.mark.long
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
