"""The receiving end of pushes as a process of its own: a rollout replica's engine, receiver and gRPC service, without
the worker. ``push_replica.py CONFIG``; the requests come from elsewhere, straight to the engine.

Says {"address", "url", "key"} when the engine generates. Then a JSON object a line on standard input, each answered by
one with the same "id": {"staging_bytes": N} changes the memory for weights ahead of the pause, 0 takes them as stock
SGLang does; {"timings": true} asks what the engine's receiver measured. Leaves at the end of its input.
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from pathlib import Path
from typing import Any, cast

from services.common.config import load
from services.common.lifecycle import Process, keep_loaded
from services.rollout.building import build_replica
from services.rollout.engines.engine import Engine
from services.rollout.layout import ModelLayout
from services.rollout.service import RolloutService
from services.rollout.turns import Turns
from services.rollout.weights import WeightReceiver


async def main(path: Path) -> None:
    config = load(path)
    process = Process("rollout", 0, f"rollout-0.{uuid.uuid4().hex[:8]}", asyncio.Event())
    replica, keepers = build_replica(config, process)
    (engine,) = replica.engines
    keeping = [asyncio.create_task(keeper.run()) for keeper in keepers]
    while not engine.attached:
        done, _ = await asyncio.wait(keeping, timeout=0.2)
        for ended in done:
            ended.result()
    receiver = WeightReceiver(
        replica,
        engine,
        ModelLayout.of_directory(config.model.hf_checkpoint, config.model.dtype),
        lambda _: 0,
        timeout_s=config.trainer.weights.timeout_s,
        load_pause_mode="in_place",
    )
    turns = Turns(replica, [receiver], nothing_held, timeout_s=config.trainer.weights.timeout_s, stall_limit_s=300.0)
    service = RolloutService(replica, [receiver], cast("Any", None), turns, process.stop)
    async with service.listening("127.0.0.1:0", message_mb=64) as address:
        keep_loaded()
        client = engine.client
        say({"address": address, "url": client.url, "key": client.admin_key})
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        commands = Commands(engine)
        while line := await reader.readline():
            command = json.loads(line)
            say(await commands.run(command) | {"id": command["id"]})
    for task in keeping:
        task.cancel()
    await asyncio.gather(*keeping, return_exceptions=True)


async def nothing_held() -> int:
    return 0


class Commands:
    def __init__(self, engine: Engine) -> None:
        self._engine, self._receiver = engine, engine.receiver

    async def run(self, command: dict[str, Any]) -> dict[str, Any]:
        if "staging_bytes" in command and self._receiver is not None:
            self._receiver.memory_bytes = command["staging_bytes"]
            self._engine.receiver = self._receiver if command["staging_bytes"] else None
        if "timings" in command and self._engine.receiver is not None:
            return dict(await self._engine.receiver.timings())
        return {}


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
