"""What is measured on one engine: pushes under load, each beside a window of the same length without one."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from services.trainer.weights.form import EngineForm
from services.trainer.weights.snapshot import MIB, Snapshot, build_manifest
from tests.gpu.models import projections, random_weights
from tests.gpu.push_link import Link
from tests.gpu.push_pause import Pauses, lost, pauses, went_on
from tests.gpu.push_process import JsonProcess
from tests.gpu.push_variants import Variant

PROMPT = 32
# Requests decode for so long before the first push.
SETTLED_S = 1.0
# About what a push takes of the time of the requests, and what is added for the first and the last.
PUSH_S = 0.1
MARGIN_S = 2.0

FIELDS = (
    "model_params",
    "dtype",
    "mode",
    "transport",
    "running_requests",
    "pause_p50_s",
    "pause_max_s",
    "gb_per_s",
    "raw_nccl_gb_per_s",
    "slime_sequence_s",
    "aborted",
    "tokens_lost",
    "tokens_recomputed",
    "digests_equal",
    "conditions",
)


@dataclass(frozen=True)
class Scene:
    """One engine start, and all that is measured on it."""

    name: str
    shape: dict[str, Any]
    length: int
    """Tokens of each request: as many as last for 7 s."""
    engine: dict[str, Any]
    versions: bool = False
    """Whether the version of each token is found by teacher forcing too."""
    fp8: bool = False
    """Whether the engine has its projections in block-wise fp8."""
    steps: tuple[str, ...] | None = None
    """What is measured, of all that is wanted; None: all of it."""


@dataclass(frozen=True)
class Push:
    """When it was, when the window without one began that is as long, and its phases."""

    begin: float
    end: float
    control: float
    trace: dict[str, float]


class Bench:
    """What all rows of one engine share."""

    def __init__(self, scene: Scene, options: argparse.Namespace, link: Link, loaders: list[JsonProcess]) -> None:
        self.scene = scene
        self.options = options
        self.link = link
        self.loaders = loaders
        self.dtype = torch.bfloat16 if scene.fp8 else options.dtype
        self.weights = [random_weights(scene.shape, seed, self.dtype, options.device) for seed in (0, 1)]
        """The engine's own, and others."""
        self.form = EngineForm(fp8=projections(self.weights[0]) if scene.fp8 else frozenset())
        self.checksum = ""
        """Of the engine that loaded the exported directory."""
        self.requests = options.requests

    def length(self, pushes: int, apart_s: float) -> int:
        """Tokens that last for so many pushes with their windows, and the time before the first."""
        return round(self.scene.length * (pushes * (PUSH_S + 2 * apart_s) + MARGIN_S) / 7)

    @property
    def params(self) -> int:
        return sum(tensor.numel() for tensor in self.weights[0].values())

    @property
    def num_bytes(self) -> int:
        """On the wire."""
        return build_manifest(self.weights[0], 1 << 40, self.form).num_bytes

    @property
    def trained_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.weights[0].values())

    def snapshot(self, bucket_mb: float) -> Snapshot:
        manifest = build_manifest(self.weights[0], int(bucket_mb * MIB), self.form)
        return Snapshot(manifest, torch.device(self.options.device), self.form)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The engine's own weights as they travel."""
        snapshot = self.snapshot(1024)
        snapshot.fill(self.weights[0].items())
        return snapshot.views

    async def start_requests(self, label: str, length: int, every: int = 1) -> None:
        each = self.requests // len(self.loaders)
        start = {"requests": each, "length": length, "prompt": PROMPT, "label": label, "every": every}
        start["vocab"] = self.scene.shape["vocab_size"]
        await asyncio.gather(
            *(loader.ask({"start": start | {"first": each * index}}, 120) for index, loader in enumerate(self.loaders))
        )

    async def finish_requests(self) -> list[dict[str, Any]]:
        answers = await asyncio.gather(*(loader.ask({"finish": True}, 240) for loader in self.loaders))
        return [request for answer in answers for request in answer["requests"]]

    async def measure(self, variant: Variant) -> dict[str, Any]:
        """One row: several pushes under load, after one without that makes buffers and connections."""
        await self.link.stage_memory(variant.staging_mb)
        await self.link.join(variant.mode)
        snapshot = self.snapshot(variant.bucket_mb)
        snapshot.fill(self.weights[0].items())
        await self.link.push(snapshot)  # repairs the engine too, if the variant before has failed
        length = self.length(variant.pushes, variant.apart_s)
        await self.start_requests(variant.name, length, variant.every)
        await asyncio.sleep(SETTLED_S)
        pushes = []
        for number in range(variant.pushes):
            # The engine's own weights come last.
            snapshot.fill(self.weights[(variant.pushes - 1 - number) % 2].items())
            pushes.append(await self._push(snapshot, variant.apart_s))
        requests = await self.finish_requests()
        await self.link.leave()
        equal = await self.link.checksum() == self.checksum
        return self._row(variant, requests, pushes, equal)

    async def _push(self, snapshot: Snapshot, apart_s: float) -> Push:
        begin = time.monotonic()
        pushed = await self.link.push(snapshot)
        end = time.monotonic()
        trace = dict(pushed.trace) | {"pause_s": pushed.pause_s, "fill_s": snapshot.fill_s()}
        trace |= await self.link.timings()
        await asyncio.sleep(apart_s)
        control = time.monotonic()
        await asyncio.sleep(end - begin + apart_s)
        return Push(begin, end, control, trace)

    def _row(self, variant: Variant, requests: list[dict[str, Any]], pushes: list[Push], equal: bool) -> dict[str, Any]:
        arrivals = [request["arrivals"] for request in requests]
        length = self.length(variant.pushes, variant.apart_s)
        # Those at the end may have come too late, when requests had their last token.
        pushes = [push for push in pushes if all(times and times[-1][0] > push.control for times in arrivals)]
        assert pushes, "the requests ended before the first push did"
        apart = all(went_on(arrivals, push.end, push.control) for push in pushes)
        assert apart, "a pause reached into the window that it is to be compared with"
        seen = [pauses(arrivals, push.begin, push.end) for push in pushes]
        control = [pauses(arrivals, push.control, push.control + push.end - push.begin) for push in pushes]
        aborted, missing = lost(requests, length)
        phases = {
            name: statistics.median(push.trace.get(name, 0.0) for push in pushes) for name in sorted(pushes[-1].trace)
        }
        wire_s = phases.get("ahead_s", 0.0) + phases["send_s"]
        raw = self.options.raw_gb_per_s
        row = {
            "model_params": self.params,
            "dtype": "float8_e4m3fn" if self.scene.fp8 else str(self.dtype).removeprefix("torch."),
            "mode": variant.mode,
            "transport": self.options.backend,
            "running_requests": min(each.requests for each in seen),
            "pause_p50_s": round(statistics.median(each.p50_s for each in seen), 4),
            "pause_max_s": round(max(each.max_s for each in seen), 4),
            "gb_per_s": round(self.num_bytes / wire_s / 1e9, 1),
            "raw_nccl_gb_per_s": None,
            "slime_sequence_s": None,
            "aborted": aborted,
            "tokens_lost": missing,
            "tokens_recomputed": _recomputed(variant.mode, arrivals, [push.begin for push in pushes]),
            "digests_equal": equal,
            "conditions": {
                "variant": variant.name,
                "bucket_mb": variant.bucket_mb,
                "staging_mb": variant.staging_mb,
                "bytes": self.num_bytes,
                "raw_nccl_s": raw and round(self.num_bytes / raw / 1e9, 4),
                # Of the trainer's weights, read and written: what it takes to gather, quantise and flatten them.
                "fill_gb_per_s": round((self.trained_bytes + self.num_bytes) / phases["fill_s"] / 1e9, 1),
                "pushes": len(seen),
                "control_p50_s": round(statistics.median(each.p50_s for each in control), 4),
                "control_max_s": round(max(each.max_s for each in control), 4),
                "each_push": [
                    _figures(pause, without, push.trace["pause_s"])
                    for pause, without, push in zip(seen, control, pushes, strict=True)
                ],
                "push_s": round(statistics.median(push.end - push.begin for push in pushes), 4),
                "median_gap_s": round(seen[-1].median_gap_s, 5),
                "tokens_at_a_time": variant.every,
                "phases_s": {name: round(value, 5) for name, value in phases.items()},
                "request_tokens": length,
                **self.options.host,
            },
        }
        assert set(row) == set(FIELDS)
        return row


def _figures(pause: Pauses, control: Pauses, service_s: float) -> dict[str, float]:
    """Of one push and the window that it is compared with, and how long the replica held the engine."""
    return {
        "p50_s": round(pause.p50_s, 4),
        "max_s": round(pause.max_s, 4),
        "control_p50_s": round(control.p50_s, 4),
        "control_max_s": round(control.max_s, 4),
        "service_s": round(service_s, 4),
    }


def _recomputed(mode: str, requests: list[list[Any]], begins: list[float]) -> int:
    """In place nothing is. Retracted requests are prefilled again: their prompts and what they had."""
    if mode != "retract":
        return 0
    had = [
        max((count for at, count in arrivals if at <= begin), default=0) for arrivals in requests for begin in begins
    ]
    return sum(PROMPT + count for count in had)
