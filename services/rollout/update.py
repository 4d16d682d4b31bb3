"""One weight update on one engine: receive, pause, load, continue, or get out of it without harm."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import structlog

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import rollout_pb2, sample_pb2, weights_pb2
from services.common.errors import PolyheadError, UnavailableError
from services.common.versions import Version
from services.rollout.engines.client import WEIGHTS, PauseModeName
from services.rollout.engines.engine import Engine
from services.rollout.engines.messages import EngineRefusedError
from services.rollout.engines.receiver import Inlet, LoadWatch
from services.rollout.engines.sleep import wake
from services.rollout.records import Arrival
from services.rollout.replica import Replica

log = structlog.get_logger()

# For the prefills that are in flight, before a pause that would leave their first token in doubt.
_FIRST_TOKENS_S = 0.25
# For requests to end when they are told to.
_ENDING_S = 5.0
_POLL_S = 0.005
_LOAD_POLL_S = 0.02


@dataclass(frozen=True)
class Committed:
    """How a completed update went."""

    version: Version
    pause_s: float
    """From the pause being asked for to generation continuing."""
    continued: int
    aborted: int
    trace: rollout_pb2.UpdateTrace
    effect: rollout_pb2.UpdateEffect


class Update:
    """`over` becomes true when it has been committed or abandoned, or its engine has gone."""

    def __init__(
        self,
        replica: Replica,
        engine: Engine,
        version: Version,
        pause_mode: PauseModeName,
        *,
        epoch: int,
        group_name: str = "",
        manifest: weights_pb2.WeightManifest | None = None,
        staged: Staged | None = None,
        timeout_s: float,
    ) -> None:
        """Without a `group_name` the version comes from a directory instead of a collective. `staged`: what arrives
        ahead of the pause.
        """
        self.version = version
        self.epoch = epoch
        self.group_name = group_name
        self.staged = staged
        self._timeout_s = timeout_s
        self.buckets = list(manifest.buckets) if manifest is not None else []
        self.next_bucket = 0
        self.touched = False
        """Whether bytes of it may have reached the model."""
        self.over = False
        self.running = 0
        """Requests that were running when the engine became quiet."""
        self._replica = replica
        self._engine = engine
        self._pause_mode = pause_mode
        # Retracted requests keep their salt: they would find the prompt's KV of the old version in the cache.
        self._flush = pause_mode == "retract" and engine.info is not None and engine.info.flushes
        self._paused_at = 0.0
        """0 until the engine is told to pause."""
        self._trace = rollout_pb2.UpdateTrace()
        self._effect = rollout_pb2.UpdateEffect()
        self._aborted_before = 0
        self._running_before = 0

    async def pause(self) -> None:
        """Shuts the gate and returns when the engine is quiet.

        Raises PreconditionError when the replica cannot be updated now, UnavailableError when the engine did not stop.
        """
        replica, engine = self._replica, self._engine
        if self.staged is not None:
            await self.staged.arrived()
        self._trace.wake_s = await wake(engine, WEIGHTS, self._timeout_s)
        engine.life.begin_update(self.version)
        replica.turned()
        shut_at = time.monotonic()
        if self._has_to_settle:
            await _until(lambda: not replica.unstarted, _FIRST_TOKENS_S)
        replica.pause(engine, paused=True)
        self._aborted_before = replica.stats.requests_aborted
        self._running_before = await self._requests() if self._pause_mode == "abort" else 0
        self._paused_at = time.monotonic()
        self._trace.settle_s = self._paused_at - shut_at
        self._note_effect()
        if self._pause_mode == "abort":
            await self._end_requests()
        mode: PauseModeName = "retract" if self._pause_mode == "retract" else "in_place"
        await engine.client.pause(mode, confirm=self.staged is None)
        if self.group_name:
            await engine.client.begin_update()
        self._trace.quiet_s = time.monotonic() - self._paused_at
        self.running = await self._requests()

    def _note_effect(self) -> None:
        """On what is running at the moment of the pause."""
        stats = self._replica.stats
        self._effect.salt_race = self._replica.unstarted
        if len(self._replica.engines) == 1:  # the record does not know which of several engines has a request
            tokens = stats.in_flight()
            self._effect.tokens_kept = tokens if self._pause_mode == "in_place" else 0
            self._effect.tokens_recomputed = 0 if self._pause_mode == "in_place" else tokens

    async def _requests(self) -> int:
        """That this engine has at this moment; those of the whole replica when it does not say."""
        everywhere = self._replica.stats.busy.running
        if len(self._replica.engines) == 1:
            return everywhere
        try:
            load = await self._engine.client.load()
        except PolyheadError:
            return everywhere  # a figure is worth no push
        return load.running + load.waiting if load is not None else everywhere

    async def _end_requests(self) -> None:
        """They are resumed elsewhere, or here after the update; those that do not end in time are carried over."""
        await self._engine.client.abort_all()
        if len(self._replica.engines) == 1:
            await _until(lambda: not self._replica.stats.busy.running, _ENDING_S)
            return
        deadline = time.monotonic() + _ENDING_S
        while time.monotonic() < deadline:
            load = await self._engine.client.load()
            if load is None or load.running + load.waiting == 0:
                return
            await asyncio.sleep(_LOAD_POLL_S)

    @property
    def _has_to_settle(self) -> bool:
        """Whether a request on its way, or in its prefill, would get out of what the pause is to bring about."""
        doubtful = self._pause_mode == "abort" or (self._pause_mode == "in_place" and self._overlapped)
        return doubtful and self._replica.in_rotation(self._engine)

    @property
    def _overlapped(self) -> bool:
        return self._engine.info is not None and self._engine.info.overlapped

    async def load_bucket(self, timeout_s: float) -> None:
        """Receives the next bucket. Raises the engine's error; `touched` then says whether harm was done."""
        number = self.next_bucket
        last = number + 1 == len(self.buckets)
        call = self._engine.client.update_from_distributed(
            self.buckets[number],
            group_name=self.group_name,
            version=str(self.version) if last else None,
            flush=last and self._flush,
            timeout_s=timeout_s,
        )
        await self._touch(call)
        self.next_bucket += 1

    async def load_staged(self, timeout_s: float) -> None:
        """Loads what was staged, and the rest as it comes. Raises the engine's error."""
        assert self.staged is not None
        load = self.staged.inlet.load(
            self._engine.client, version=str(self.version), flush=self._flush, timeout_s=timeout_s
        )
        await self._touch(load)
        await self.staged.loaded()
        self.next_bucket = len(self.buckets)

    async def load_directory(self, directory: str, timeout_s: float) -> None:
        await self._touch(
            self._engine.client.update_from_disk(
                directory, version=str(self.version), flush=self._flush, timeout_s=timeout_s
            )
        )

    async def resume(self) -> Committed:
        """Generation continues; every token from here on belongs to the new version.

        Raises UnavailableError when the engine did not continue: the update has to be abandoned.
        """
        replica, engine = self._replica, self._engine
        try:
            if self.group_name:
                await engine.client.end_update()
            replica.remember_arrival(self.version, self._arrival())
            engine.life.commit_update()
            engine.lagging = False
            told_at = time.monotonic()
            await engine.client.resume()
            self._trace.continue_s = time.monotonic() - told_at
        except PolyheadError as error:
            self.touched = True
            raise UnavailableError(f"did not continue: {error}", field="engine") from error
        pause_s = time.monotonic() - self._paused_at
        self.over = True
        if self.staged is not None:
            self.staged.close()
        replica.pause(engine, paused=False)
        replica.stats.pushes += 1
        replica.stats.pause_seconds += pause_s
        replica.turned()
        if self._pause_mode == "abort":
            aborted = max(0, self._running_before - self.running)
            return Committed(self.version, pause_s, self.running, aborted, self._trace, self._effect)
        aborted = min(replica.stats.requests_aborted - self._aborted_before, self.running)
        return Committed(self.version, pause_s, self.running - aborted, aborted, self._trace, self._effect)

    def _arrival(self) -> Arrival:
        if self._pause_mode == "retract":
            clean = self._flush or (self._engine.info is not None and not self._engine.info.prefix_cache)
            return Arrival(sample_pb2.KV_ORIGIN_FRESH if clean else sample_pb2.KV_ORIGIN_CARRIED, late=False)
        return Arrival(sample_pb2.KV_ORIGIN_CARRIED, late=self._overlapped)

    async def abandon(self, reason: str, give_back: Callable[[pb.ReleaseReason], int]) -> None:
        """Untouched: the old version serves on. Touched: the engine is quarantined until a complete update, and what
        it had is resumed by the others; without others, the samples go back as of the pause.
        """
        if self.over:
            return
        self.over = True
        if self.staged is not None:
            await self.staged.drop()
        log.warning(
            "update_abandoned",
            engine=self._engine.index,
            version=str(self.version),
            torn=self.touched,
            reason=reason,
        )
        if self.touched:
            await self._quarantine(give_back)
        else:
            await self._serve_on()
        self._replica.turned()

    async def _serve_on(self) -> None:
        life = self._engine.life
        if life.updating is not None:
            life.abort_update(torn=False)
        self._replica.pause(self._engine, paused=False)
        if self._paused_at:
            await self._settle(self._end_session, self._continue)

    async def _quarantine(self, give_back: Callable[[pb.ReleaseReason], int]) -> None:
        replica, engine = self._replica, self._engine
        alone = not replica.serving_without(engine)
        if alone:
            give_back(pb.RELEASE_REASON_UNAVAILABLE)
        if engine.life.updating is not None:
            engine.life.abort_update(torn=True)
        else:
            engine.life.quarantine()
        replica.turned()
        await replica.expel(engine)
        if len(replica.engines) == 1:
            # It stays paused: nobody waits for anything that it holds.
            await self._settle(self._abort_all, self._end_session)
        elif engine.attached and not engine.kill():
            replica.pause(engine, paused=False)
            await self._settle(self._abort_all, self._end_session, self._continue)

    async def _settle(self, *calls: Callable[[], Awaitable[None]]) -> None:
        """An engine that does not do as told on the way out of an update is looked into."""
        try:
            for call in calls:
                await call()
        except PolyheadError as error:
            log.warning("engine_after_update", engine=self._engine.index, reason=str(error))
            self._engine.suspect.set()

    async def _touch(self, call: Awaitable[None]) -> None:
        before, self.touched = self.touched, True
        began = time.monotonic()
        try:
            await call
        except EngineRefusedError as error:
            self.touched = before or error.weights_touched
            raise
        self._trace.load_s += time.monotonic() - began

    async def _abort_all(self) -> None:
        await self._engine.client.abort_all()

    async def _continue(self) -> None:
        await self._engine.client.resume()

    async def _end_session(self) -> None:
        if not self.group_name:
            return
        try:
            await self._engine.client.end_update()
        except EngineRefusedError as error:
            log.info("session_not_open", reason=error.reason)


class Staged:
    """Buckets that arrive in an engine's receiver while it generates. Nothing of them is in the model yet."""

    def __init__(self, inlet: Inlet, version: Version, digest: str, timeout_s: float) -> None:
        self.version = version
        self.digest = digest
        self.inlet = inlet
        self._receiving = asyncio.create_task(self._receive(timeout_s))

    async def _receive(self, timeout_s: float) -> LoadWatch:
        await self.inlet.receive(timeout_s)
        return await self.inlet.watch()

    async def arrived(self) -> None:
        """Waits for them. Raises UnavailableError when they do not come."""
        await asyncio.shield(self._receiving)

    async def loaded(self) -> None:
        """Once the engine was told to load them: waits until it has. Raises UnavailableError when it failed."""
        await self._receiving.result().outcome()

    async def drop(self) -> None:
        """Breaks off what is still on its way; the group is of no use afterwards."""
        if not self._receiving.done():
            with suppress(PolyheadError):
                await self.inlet.abort()
            await asyncio.wait({self._receiving})
        self.close()

    def close(self) -> None:
        """Waits for nothing: nobody is to hear of it any more."""
        self._receiving.add_done_callback(_close_watch)


def _close_watch(receiving: asyncio.Task[LoadWatch]) -> None:
    if receiving.cancelled() or receiving.exception() is not None:
        return
    receiving.result().close()


async def _until(condition: Callable[[], bool], at_most_s: float) -> None:
    deadline = time.monotonic() + at_most_s
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_S)
