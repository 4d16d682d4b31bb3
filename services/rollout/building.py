"""A replica's engines and router as configured, and who keeps them running."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from services.common.config import Config
from services.common.lifecycle import Process
from services.rollout.engines.external import ExternalKeeper, external_addresses
from services.rollout.engines.keeper import EngineKeeper
from services.rollout.engines.launch import engine_command
from services.rollout.engines.router import RouterKeeper
from services.rollout.engines.router_launch import router_command
from services.rollout.replica import Replica


class Keeper(Protocol):
    async def run(self) -> None:
        """Until cancelled."""


def build_replica(config: Config, process: Process) -> tuple[Replica, Sequence[Keeper]]:
    """Nothing is started before the keepers run. Raises ConfigError for what cannot be started as configured."""
    external = external_addresses(config, process.index)
    replica = Replica(process.replica_id, len(external) or config.rollout.engines)
    keepers: list[Keeper] = list(
        _external_keepers(config, replica, external) if external else _engine_keepers(config, replica, process.index)
    )
    if len(replica.engines) > 1:
        replica.router = RouterKeeper(
            router_command(config),
            config.run.dir / "logs" / f"router-{process.index}.log",
            replica.wanted,
            start_timeout_s=config.rollout.router.start_timeout_s,
            on_change=replica.turned,
            on_missing=replica.suspect,
        )
        keepers.append(replica.router)
    return replica, keepers


def _external_keepers(config: Config, replica: Replica, addresses: Sequence[str]) -> list[ExternalKeeper]:
    key = config.rollout.engine.admin_key
    admin_key = key.get_secret_value() if key is not None else ""
    return [
        ExternalKeeper(engine, address, admin_key, config.model.hf_checkpoint)
        for engine, address in zip(replica.engines, addresses, strict=True)
    ]


def _engine_keepers(config: Config, replica: Replica, index: int) -> list[EngineKeeper]:
    alone = len(replica.engines) == 1
    return [
        EngineKeeper(
            engine,
            engine_command(config, index, engine.index),
            config.run.dir / "logs" / (f"engine-{index}.log" if alone else f"engine-{index}-{engine.index}.log"),
            start_timeout_s=config.rollout.engine.start_timeout_s,
        )
        for engine in replica.engines
    ]
