"""The quantiser: its kernel bit for bit against torch's operations and an independent one, and how fast it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from services.common.model_files import scale_shape
from services.trainer.weights.quantise import FP8, quantise, quantise_plain
from tests.gpu.models import QWEN3_8B
from tests.kit.fp8_reference import quantise_reference

SHAPES = ((128, 128), (4096, 4096), (12_288, 4096), (1, 1), (130, 127), (1000, 5), (3, 5000))
REFERENCE_ELEMENTS = 1 << 18
SIZES = {"small": 0.02, "one": 1.0, "huge": 1e38, "subnormal": 1e-40, "zero": 0.0}
LAYERS, REPEATS = 36, 10

Tell = Callable[[str, Mapping[str, Any]], None]


def measure_quantiser(device: str, host: Mapping[str, Any], tell: Tell) -> None:
    """Each result goes to `tell` as soon as it is there."""
    exact = {name: _differing(weight) for name, weight in _cases(device)}
    for name, differing in exact.items():
        print(f"quantise {name}: {differing}", flush=True)
    tell("differing", {"cases": len(exact), "not_equal": {name: each for name, each in exact.items() if any(each)}})
    speed = _speed(device, LAYERS if device != "cpu" else 1)
    print(f"quantise: {speed}", flush=True)
    tell("speed", speed | {"host": dict(host)})


def _cases(device: str) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator(device).manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        for n, k in SHAPES if device != "cpu" else (SHAPES[0], *SHAPES[3:]):
            for name, size in SIZES.items():
                weight = torch.randn(n, k, generator=generator, device=device).clamp_(-3, 3).mul_(size)
                yield f"{kind} {n}x{k} {name}", weight.to(dtype)
        exponents = torch.linspace(0, -14, 128 * 128, device=device).view(128, 128)
        yield f"{kind} every exponent", (2.0**exponents).to(dtype)


def _places(weight: torch.Tensor, device: str | torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    shape = tuple(weight.shape)
    return torch.empty(shape, dtype=FP8, device=device), torch.empty(scale_shape(shape), device=device)


def _differing(weight: torch.Tensor) -> list[int]:
    """How many values and scales differ: from torch's operations where the weight is, from those on the CPU, and from
    the independent quantiser.
    """
    values, scales = _places(weight, weight.device)
    quantise(weight, values, scales)
    found = []
    for other in (weight, weight.cpu()):
        plain = _places(other, other.device)
        quantise_plain(other, *plain)
        found += [_count(values, plain[0]), _count(scales, plain[1])]
    if weight.numel() <= REFERENCE_ELEMENTS:
        codes, expected = quantise_reference(weight.float().cpu().numpy())
        found.append(int((values.view(torch.uint8).cpu().numpy() != codes).sum()))
        found.append(int((scales.cpu().numpy().view(np.uint32) != expected.view(np.uint32)).sum()))
    return found


def _count(one: torch.Tensor, other: torch.Tensor) -> int:
    return int((one.view(torch.uint8).cpu() != other.view(torch.uint8).cpu()).sum())


def _speed(device: str, layers: int) -> dict[str, float]:
    """Of all projections of the large model: GB/s read and written, beside torch's copy of the same bytes read."""
    hidden, inner = QWEN3_8B["hidden_size"], QWEN3_8B["intermediate_size"]
    rows = [hidden, 1024, 1024, hidden, inner, inner]
    shapes = [*((each, hidden) for each in rows), (hidden, inner)]
    weights = [torch.randn(shape, device=device).mul_(0.02).bfloat16() for shape in shapes for _ in range(layers)]
    places = [_places(weight, device) for weight in weights]
    copies = [torch.empty_like(weight) for weight in weights]
    read = sum(weight.numel() * 2 for weight in weights)
    written = sum(values.numel() + 4 * scales.numel() for values, scales in places)
    repeats = REPEATS if device != "cpu" else 1

    def fused() -> None:
        for weight, place in zip(weights, places, strict=True):
            quantise(weight, *place)

    def plain() -> None:
        for weight, place in zip(weights, places, strict=True):
            quantise_plain(weight, *place)

    def copy() -> None:
        torch._foreach_copy_(copies, weights)

    seconds = {name: _timed(work, device, repeats) for name, work in (("fused", fused), ("copy", copy))}
    seconds["plain"] = _timed(plain, device, 1)
    return {
        "parameters": read // 2,
        "fused_s": seconds["fused"],
        "fused_gb_per_s": (read + written) / seconds["fused"] / 1e9,
        "copy_s": seconds["copy"],
        "copy_gb_per_s": 2 * read / seconds["copy"] / 1e9,
        "torch_operations_s": seconds["plain"],
    }


def _timed(work: Callable[[], None], device: str, repeats: int) -> float:
    """Seconds of one call, by the device's clock where it has one, after one that compiles."""
    work()
    if device == "cpu":
        began = time.monotonic()
        work()
        return time.monotonic() - began
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats
