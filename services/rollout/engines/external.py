"""Looks after an engine that was started elsewhere: attached while it answers, never started or ended from here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import structlog

from services.common.config import Config
from services.common.errors import ConfigError, PolyheadError
from services.rollout.engines.client import EngineClient, KeyRefusedError
from services.rollout.engines.engine import Engine
from services.rollout.engines.messages import (
    EngineUnavailableError,
    ServerInfo,
    check_version,
    warn_of_inexact_versions,
)

log = structlog.get_logger()

_POLL_S = 1.0
# Failures in a row after which it is lost; one that is suspect already is lost at the first.
_MAX_FAILURES = 3
_HEALTH_TIMEOUT_S = 30.0
_FIELD = "rollout.engine.external"
_KEY_VARIABLE = "POLYHEAD_ROLLOUT__ENGINE__ADMIN_KEY"


def external_addresses(config: Config, replica: int) -> Sequence[str]:
    """This replica's share of the engines started elsewhere. Raises ConfigError when there is none left for it."""
    every, replicas = config.rollout.engine.external, config.rollout.replicas
    share = every[replica::replicas]
    if every and not share:
        raise ConfigError(f"{len(every)} engines cannot be shared out over {replicas} replicas", field=_FIELD)
    return share


class ExternalKeeper:
    """Fills an engine's place as long as the server at `url` answers, and holds what it was given."""

    def __init__(self, engine: Engine, url: str, admin_key: str, checkpoint: Path) -> None:
        self._engine = engine
        self._url = url
        self._admin_key = admin_key
        self._checkpoint = checkpoint

    async def run(self) -> None:
        """Until cancelled. Raises ConfigError when what answers cannot be used."""
        waiting = False
        while True:
            try:
                async with EngineClient(self._url, self._admin_key) as client:
                    info = await self._ready(client)
                    waiting = False
                    await self._one_life(client, info)
            except PolyheadError as error:
                if isinstance(error, ConfigError):
                    raise
                if not waiting:
                    log.warning("engine_awaited", engine=self._engine.index, url=self._url, reason=_reason(error))
                waiting = True
            await asyncio.sleep(_POLL_S)

    async def _ready(self, client: EngineClient) -> ServerInfo:
        """Raises the error of an engine that cannot generate now."""
        info = await client.server_info()
        check_version(info)
        self._check_model(await client.model_info())
        # An earlier replica may have left it paused, with requests that nobody waits for.
        await client.abort_all()
        await client.resume()
        if not await client.health(_HEALTH_TIMEOUT_S):
            raise EngineUnavailableError("does not generate", field="engine /health_generate")
        return info

    async def _one_life(self, client: EngineClient, info: ServerInfo) -> None:
        warn_of_inexact_versions(info)
        log.info("engine_attached", engine=self._engine.index, name=info.name, url=self._url)
        self._engine.attach(client, info)
        died = False
        try:
            died = await self._watch(client)
        finally:
            self._engine.detach(died=died)

    async def _watch(self, client: EngineClient) -> bool:
        """Returns when it is lost: whether it has ended, as far as can be told from here."""
        failures = 0
        while True:
            suspected = await self._suspected()
            if self._engine.life.updating is not None:
                continue  # it may be loading weights; the update has deadlines of its own
            try:
                if await self._started_anew(client):
                    log.error("engine_started_anew", engine=self._engine.index, url=self._url)
                    return True
                failures = 0
            except PolyheadError as error:
                failures += 1
                if suspected or failures == _MAX_FAILURES:
                    log.error("engine_lost", engine=self._engine.index, url=self._url, reason=str(error))
                    return _refused(error)

    async def _suspected(self) -> bool:
        """Waits until somebody suspects it, or until it is time to look."""
        suspect = self._engine.suspect
        try:
            await asyncio.wait_for(suspect.wait(), _POLL_S)
        except TimeoutError:
            return False
        suspect.clear()
        return True

    async def _started_anew(self, client: EngineClient) -> bool:
        """Whether it holds other weights than it was given. Raises its error when it does not answer."""
        life = self._engine.life
        served = life.version
        await client.server_info()
        held = (await client.model_info()).get("weight_version")
        return served is not None and served == life.version and life.updating is None and held != str(served)

    def _check_model(self, said: Mapping[str, Any]) -> None:
        """Raises ConfigError when it says that its model is another one."""
        config = self._checkpoint / "config.json"
        ours = json.loads(config.read_text()) if config.is_file() else {}
        for name in ("model_type", "architectures", "vocab_size"):
            if said.get(name) and ours.get(name) and said[name] != ours[name]:
                raise ConfigError(
                    f"{self._url} has {name} = {said[name]}, but {self._checkpoint} has {ours[name]}", field=_FIELD
                )


def _reason(error: PolyheadError) -> str:
    return f"{error} (it is taken from {_KEY_VARIABLE})" if isinstance(error, KeyRefusedError) else str(error)


def _refused(error: PolyheadError) -> bool:
    """Nobody listens there any more. When nothing is heard at all, the network may be at fault."""
    cause = error.__cause__
    return isinstance(cause, aiohttp.ClientConnectorError) and isinstance(cause.os_error, ConnectionRefusedError)
