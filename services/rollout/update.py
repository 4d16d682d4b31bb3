"""One weight update on one engine: pause, load, continue, or get out of it without harm."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2, weights_pb2
from services.common.errors import PolyheadError, UnavailableError
from services.common.versions import Version
from services.rollout.engines.client import PauseModeName
from services.rollout.engines.messages import EngineRefusedError
from services.rollout.replica import Replica

log = structlog.get_logger()


@dataclass(frozen=True)
class Committed:
    """How a completed update went."""

    version: Version
    pause_s: float
    """From the pause being asked for to generation continuing."""
    continued: int
    aborted: int


class Update:
    """`over` becomes true when it has been committed or abandoned, or its engine has gone."""

    def __init__(
        self,
        replica: Replica,
        version: Version,
        pause_mode: PauseModeName,
        *,
        epoch: int,
        group_name: str = "",
        manifest: weights_pb2.WeightManifest | None = None,
    ) -> None:
        """Without a `group_name` the version comes from a directory instead of a collective."""
        self.version = version
        self.epoch = epoch
        self.group_name = group_name
        self.buckets = list(manifest.buckets) if manifest is not None else []
        self.next_bucket = 0
        self.touched = False
        """Whether bytes of it may have reached the model."""
        self.over = False
        self.running = 0
        """Requests that were running when the engine became quiet."""
        self._replica = replica
        self._pause_mode = pause_mode
        # Retracted requests keep their salt: they would find the prompt's KV of the old version in the cache.
        self._flush = pause_mode == "retract"
        self._paused_at = 0.0
        self._aborted_before = 0
        self._running_before = 0

    async def pause(self) -> None:
        """Shuts the gate and returns when the engine is quiet.

        Raises PreconditionError when the replica cannot be updated now, UnavailableError when the engine did not stop.
        """
        replica = self._replica
        replica.life.begin_update(self.version)
        replica.turned()
        replica.stats.busy.paused(True)
        self._aborted_before = replica.stats.requests_aborted
        self._running_before = replica.stats.busy.running
        self._paused_at = time.monotonic()
        await replica.client.pause(self._pause_mode)
        if self.group_name:
            await replica.client.begin_update()
        self.running = replica.stats.busy.running

    async def load_bucket(self, timeout_s: float) -> None:
        """Receives the next bucket. Raises the engine's error; `touched` then says whether harm was done."""
        number = self.next_bucket
        last = number + 1 == len(self.buckets)
        call = self._replica.client.update_from_distributed(
            self.buckets[number],
            group_name=self.group_name,
            version=str(self.version) if last else None,
            flush=last and self._flush,
            timeout_s=timeout_s,
        )
        await self._touch(call)
        self.next_bucket += 1

    async def load_directory(self, directory: str, timeout_s: float) -> None:
        await self._touch(
            self._replica.client.update_from_disk(
                directory, version=str(self.version), flush=self._flush, timeout_s=timeout_s
            )
        )

    async def resume(self) -> Committed:
        """Generation continues; every token from here on belongs to the new version.

        Raises UnavailableError when the engine did not continue: the update has to be abandoned.
        """
        replica = self._replica
        carried = self._pause_mode == "in_place"
        try:
            if self.group_name:
                await replica.client.end_update()
            replica.remember_arrival(
                self.version, sample_pb2.KV_ORIGIN_CARRIED if carried else sample_pb2.KV_ORIGIN_FRESH
            )
            replica.life.commit_update()
            await replica.client.resume()
        except PolyheadError as error:
            self.touched = True
            raise UnavailableError(f"did not continue: {error}", field="engine") from error
        pause_s = time.monotonic() - self._paused_at
        self.over = True
        replica.stats.busy.paused(False)
        replica.stats.pushes += 1
        replica.stats.pause_seconds += pause_s
        replica.turned()
        if self._pause_mode == "abort":
            return Committed(self.version, pause_s, 0, self._running_before)
        aborted = min(replica.stats.requests_aborted - self._aborted_before, self.running)
        return Committed(self.version, pause_s, self.running - aborted, aborted)

    async def abandon(self, reason: str, give_back: Callable[[pb.ReleaseReason], int]) -> None:
        """Untouched: the old version serves on. Touched: the samples go back as of the pause, and the replica is
        quarantined; its engine stays paused until a complete update.
        """
        if self.over:
            return
        self.over = True
        log.warning("update_abandoned", version=str(self.version), torn=self.touched, reason=reason)
        replica = self._replica
        if self.touched:
            give_back(pb.RELEASE_REASON_UNAVAILABLE)
        if replica.life.updating is not None:
            replica.life.abort_update(torn=self.touched)
        else:
            replica.life.quarantine()
        replica.stats.busy.paused(self.touched)
        try:
            if self.touched:
                await replica.client.abort_all()
            if self.group_name:
                await self._end_session()
            if not self.touched:
                await replica.client.resume()
        except PolyheadError as error:
            log.warning("engine_after_update", reason=str(error))
            replica.suspect.set()
        replica.turned()

    async def _touch(self, call: Awaitable[None]) -> None:
        before, self.touched = self.touched, True
        try:
            await call
        except EngineRefusedError as error:
            self.touched = before or error.weights_touched
            raise

    async def _end_session(self) -> None:
        try:
            await self._replica.client.end_update()
        except EngineRefusedError as error:
            log.info("session_not_open", reason=error.reason)
