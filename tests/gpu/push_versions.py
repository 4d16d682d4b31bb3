"""Which version made each token across three pushes: claimed by the record, decided by teacher forcing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from services.common.fp8 import dequantise
from services.common.model_files import SCALE_SUFFIX
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
    weights = [_weights(bench, seed) for seed in range(PUSHES + 1)]

    async def bring(number: int) -> Version:
        snapshot.fill(weights[number].items())
        await bench.link.push(snapshot)
        print(f"  versions: pushed {bench.link.version}", flush=True)
        return bench.link.version

    async with EngineClient(where["url"], where["key"]) as client:
        records, late = await generate(client, len(weights), bring)
    await bench.link.leave()
    models = [_model(bench, each) for each in weights]
    figures = await asyncio.to_thread(verify, records, models)
    return figures | {"overlap_schedule": late, "pushes": PUSHES, "fp8": bench.scene.fp8, **bench.options.host}


def _weights(bench: Bench, seed: int) -> dict[str, torch.Tensor]:
    return random_weights(bench.scene.shape, seed, bench.dtype, bench.options.device)


def _model(bench: Bench, weights: dict[str, torch.Tensor]) -> Qwen3ForCausalLM:
    """With the weights that the engine has: those in fp8 are what their values and scales stand for."""
    with torch.device(bench.options.device):
        model = Qwen3ForCausalLM(Qwen3Config(**bench.scene.shape)).to(bench.dtype).eval()
    snapshot = bench.snapshot(1024)
    snapshot.fill(weights.items())
    held = dict(snapshot.views)
    for name in bench.form.fp8:
        held[name] = dequantise(held[name], held.pop(name + SCALE_SUFFIX), bench.dtype)
    model.load_state_dict(held, strict=False)
    model.tie_weights()
    return model
