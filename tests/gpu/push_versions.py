"""Which version made each token across three pushes: claimed by the record, decided by teacher forcing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from services.common.versions import Version
from services.rollout.engines.client import EngineClient
from tests.gpu.independent_record import generate, verify
from tests.gpu.models import random_weights
from tests.gpu.push_variants import VARIANTS

if TYPE_CHECKING:
    from tests.gpu.push_bench import Bench

PUSHES = 3


async def named_by_teacher_forcing(bench: Bench, where: dict[str, str]) -> dict[str, Any]:
    """Pushes the weights of `PUSHES` + 1 seeds while requests run, by the first variant."""
    variant = VARIANTS[0].scaled(bench.num_bytes)
    await bench.link.stage_memory(variant.staging_mb)
    await bench.link.join(variant.mode)
    snapshot = bench.snapshot(variant.bucket_mb)
    shape, options = bench.scene.shape, bench.options
    models = [_model(shape, seed, options.dtype, options.device) for seed in range(PUSHES + 1)]

    async def bring(number: int) -> Version:
        snapshot.fill(models[number].named_parameters())
        await bench.link.push(snapshot)
        return bench.link.version

    async with EngineClient(where["url"], where["key"]) as client:
        records, late = await generate(client, len(models), bring)
    await bench.link.leave()
    return verify(records, models) | {"overlap_schedule": late, "pushes": PUSHES, **options.host}


def _model(shape: dict[str, Any], seed: int, dtype: torch.dtype, device: str) -> Qwen3ForCausalLM:
    with torch.device(device):
        model = Qwen3ForCausalLM(Qwen3Config(**shape)).to(dtype).eval()
    model.load_state_dict(random_weights(shape, seed, dtype, device), strict=False)
    model.tie_weights()
    return model
