"""The ways to push that are compared on one engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from services.common.process import free_port
from services.common.weight_group import WeightGroup

if TYPE_CHECKING:
    from tests.gpu.push_bench import Bench

ALL = 1 << 20
"""MiB: room for any model here."""
_FULL_BYTES = 16.4e9


@dataclass(frozen=True)
class Variant:
    """Sizes are for a model of 16.4 GB; a smaller one takes them in proportion."""

    name: str
    bucket_mb: float
    staging_mb: float
    """Of the engine, for weights ahead of the pause; 0: SGLang receives by its own means."""
    mode: str = "in_place"
    pushes: int = 5
    every: int = 1
    """Tokens of a request that the engine sends at a time."""
    apart_s: float = 0.2
    """Between a push and the window that it is compared with, and from there to the next push."""

    def scaled(self, num_bytes: int) -> Variant:
        if num_bytes > _FULL_BYTES / 4:
            return self
        ratio = num_bytes / _FULL_BYTES
        staging_mb = self.staging_mb if self.staging_mb == ALL else self.staging_mb * ratio
        return replace(self, bucket_mb=self.bucket_mb * ratio, staging_mb=staging_mb)


VARIANTS = (
    Variant("all ahead", 1024, ALL, pushes=10),
    Variant("all ahead, four tokens at a time", 1024, ALL, pushes=10, every=4),
    Variant("2 of 2 GiB ahead", 2048, 4096, pushes=10),
    Variant("none ahead, 2 GiB", 2048, 0),
    # Prompts and what was generated are prefilled again, one request after the other.
    Variant("all ahead, retract", 1024, ALL, mode="retract", pushes=2, apart_s=2.5),
)
VERSIONS, SLIME = "versions", "slime"
STEPS = [*(variant.name for variant in VARIANTS[:-1]), VERSIONS, SLIME, VARIANTS[-1].name]
"""In this order: what is worth most comes first, what strains the engine most comes last."""
SLIME_BUCKET = 512 << 20


async def slime_sequence(bench: Bench) -> float:
    """Seconds from the pause to generation going on as slime does it: abort, flush, one broadcast per tensor."""
    link, weights = bench.link, bench.tensors()
    await link.stage_memory(0)
    name, port = "slime", free_port("127.0.0.1")
    joining = asyncio.create_task(
        link.client.init_group(
            name=name,
            backend=bench.options.backend,
            master_address="127.0.0.1",
            master_port=port,
            world_size=2,
            rank_offset=1,
            timeout_s=60.0,
        )
    )
    group = await asyncio.to_thread(
        lambda: WeightGroup(
            backend=bench.options.backend,
            address="127.0.0.1",
            port=port,
            rank=0,
            world_size=2,
            name=name,
            timeout_s=60.0,
            device=bench.options.device,
        )
    )
    await joining
    buckets: list[list[str]] = [[]]
    size = 0
    for tensor_name, tensor in weights.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if buckets[-1] and size + num_bytes > SLIME_BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor_name)
        size += num_bytes
    seconds = []
    for label in ("slime-0", "slime-1"):  # the first one connects
        await bench.start_requests(label, bench.length(10, 0.2))
        await asyncio.sleep(0.5)
        began = time.monotonic()
        await link.client._post("/pause_generation", {"mode": "abort"})
        await link.client.flush()
        await link.client.begin_update()
        for bucket in buckets:
            await _one_by_one(bench, group, {each: weights[each] for each in bucket}, name)
        await link.client.end_update()
        await link.client.resume()
        seconds.append(time.monotonic() - began)
        requests = await bench.finish_requests()
        aborted = sum(request["end"] != "length" for request in requests)
    await link.client.destroy_group(name)
    group.close()
    print(f"slime's sequence: {seconds[-1]:.3f} s, {aborted} of {len(requests)} aborted", flush=True)
    return round(seconds[-1], 3)


async def _one_by_one(bench: Bench, group: WeightGroup, weights: Mapping[str, torch.Tensor], group_name: str) -> None:
    body = {
        "names": list(weights),
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()],
        "shapes": [list(tensor.shape) for tensor in weights.values()],
        "group_name": group_name,
        "flush_cache": False,
    }
    answer = asyncio.create_task(bench.link.client._post("/update_weights_from_distributed", body, 60.0))

    def send() -> None:
        works = [dist.broadcast(tensor, src=0, group=group._group, async_op=True) for tensor in weights.values()]
        for work in works:
            assert work is not None
            work.wait()

    await asyncio.to_thread(send)
    await answer
