"""Pushes by way of a directory: the trainer writes each version once, and every engine loads it from there."""

from __future__ import annotations

import asyncio
from typing import Any

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import rollout_pb2 as rpb
from services.common.config.models import WeightsConfig
from services.common.errors import UnavailableError
from services.common.versions import Version
from services.trainer.weights.channel import Channel, Laps, Pushed, pushed
from services.trainer.weights.directory import VersionDirectories
from services.trainer.weights.snapshot import Snapshot


class DiskChannel(Channel):
    """To one engine, without a group: nothing joins, and nothing breaks with it."""

    def __init__(
        self,
        replica: pb.Replica,
        engine: int,
        epoch: int,
        config: WeightsConfig,
        pause_mode: rpb.PauseMode,
        directories: VersionDirectories,
    ) -> None:
        super().__init__(replica, engine, epoch, config, pause_mode)
        self._directories = directories
        self._writing: asyncio.Future[None] | None = None

    @property
    def joined(self) -> bool:
        return True

    @property
    def broadcast(self) -> asyncio.Future[Any] | None:
        """The writing of a version, which reads from its snapshot until it is done."""
        return self._writing

    async def push(self, version: Version, snapshot: Snapshot) -> Pushed:
        """Returns when the engine serves the version. Raises PolyheadError."""
        laps = Laps()
        self._writing = self._directories.start(version, snapshot)
        try:
            await self._written(self._writing)
            laps.end("write_s")
            load = rpb.LoadVersionRequest(
                epoch=self._epoch,
                version=version.to_proto(),
                directory=str(self._directories.path(version)),
                engine=self._engine,
            )
            done = await self._call("LoadVersion", load)
            laps.end("load_version_s")
        finally:
            await self._directories.release(version)
        return pushed(done, laps)

    async def _written(self, writing: asyncio.Future[None]) -> None:
        try:
            await asyncio.shield(writing)
        except OSError as error:
            raise UnavailableError(f"cannot be written: {error}", field="trainer.weights.directory") from error

    async def leave(self) -> None:
        await self.close()
