"""What the wire can do by itself: broadcasts back to back from the first GPU to another one, between two processes.

``push_raw.py BACKEND DEVICE PORT BYTES`` is the other one.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
import uuid

import torch

from services.common.process import free_port
from services.common.weight_group import WeightGroup

MESSAGES, REPEATS = 8, 6


def raw_gb_per_s(backend: str, device: str, gpu: int, num_bytes: int) -> float:
    """Median over repeats of `MESSAGES` messages of `num_bytes` each; the first repeat connects and is left out."""
    port = free_port("127.0.0.1")
    name = f"raw-{uuid.uuid4().hex[:8]}"
    other = "cpu" if device == "cpu" else f"cuda:{gpu}"
    command = [sys.executable, "-m", "tests.gpu.push_raw", backend, other, str(port), str(num_bytes), name]
    process = subprocess.Popen(command, env=os.environ)
    try:
        seconds = _broadcasts(backend, device, port, num_bytes, name, rank=0)
        process.wait(30)
    finally:
        process.kill()
    return round(MESSAGES * num_bytes / statistics.median(seconds[1:]) / 1e9, 1)


def _broadcasts(backend: str, device: str, port: int, num_bytes: int, name: str, rank: int) -> list[float]:
    group = WeightGroup(
        backend=backend,
        address="127.0.0.1",
        port=port,
        rank=rank,
        world_size=2,
        name=name,
        timeout_s=60.0,
        device=device,
    )
    flat = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(REPEATS):
        began = time.monotonic()
        group.broadcast(*[flat] * MESSAGES)
        seconds.append(time.monotonic() - began)
    group.close()
    return seconds


if __name__ == "__main__":
    if sys.argv[2] != "cpu":
        torch.cuda.set_device(sys.argv[2])
    _broadcasts(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], rank=1)
