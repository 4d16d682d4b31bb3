"""How fast weights get from flat buckets into a model on one GPU, by the ways there are to copy many tensors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

REPEATS = 6


def copy_seconds(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> Mapping[str, list[float]]:
    """For each way, medians of [the CPU's seconds, all seconds]."""

    def one_by_one() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    ways: dict[str, Callable[[], None]] = {
        "copy_": one_by_one,
        "_foreach_copy_": lambda: torch._foreach_copy_(targets, sources),
    }
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_by_one()
    ways["graph of copy_"] = graph.replay
    return {name: _timed(way) for name, way in ways.items()}


def _timed(way: Callable[[], None]) -> list[float]:
    cpu, both = [], []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        began = time.monotonic()
        way()
        cpu.append(time.monotonic() - began)
        torch.cuda.synchronize()
        both.append(time.monotonic() - began)
    return [round(statistics.median(times[1:]), 5) for times in (cpu, both)]
