"""What real SGLang says of its weights when it has loaded a directory, for one directory after the other."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path

from services.common.config import Config
from services.rollout.engines.launch import engine_command
from services.rollout.engines.process import EngineProcess
from tests.kit.pushes.canaries import EngineAddress, checksum

START_S = 600.0


def sglang_checksums(models: Sequence[Path]) -> list[str]:
    """An engine is started on the first, and loads the others from their directories."""
    return asyncio.run(_checksums(models))


async def _checksums(models: Sequence[Path]) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="ref-") as directory:
        sections = {
            "run": {"dir": directory},
            "model": {"hf_checkpoint": models[0]},
            "rollout": {"engine": {"kind": "sglang", "context_length": 128, "max_running_requests": 8}},
        }
        command = engine_command(Config.model_validate(sections))
        process = EngineProcess(command, Path(directory) / "engine.log")
        try:
            await process.ready(START_S)
            address = EngineAddress(process.pid, [process.pid], "sglang", process.client.url, process.client.admin_key)
            sums = [await checksum(address)]
            for model in models[1:]:
                await process.client.update_from_disk(str(model), version="reference", flush=True, timeout_s=60.0)
                sums.append(await checksum(address))
        finally:
            await process.close()
    return sums
