"""The receiving end of the weight push: one update at a time, fenced by epoch, ended by a watchdog if nobody else does.

Join → Begin (gate shut, engine paused and quiet) → LoadBucket in order → Commit; where the engine takes weights ahead
of the pause, Join → Stage → Begin → LoadStaged → Commit. An update that fails before a byte of it is in the model
leaves the old version serving; one that fails later quarantines the engine until a complete one (I8).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path

import structlog

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import rollout_pb2, sample_pb2, weights_pb2
from services.common.errors import InvalidArgumentError, PolyheadError, PreconditionError, UnavailableError
from services.common.versions import Version
from services.rollout.engines.client import PauseModeName
from services.rollout.engines.engine import Engine
from services.rollout.engines.messages import EngineRefusedError
from services.rollout.engines.receiver import Inlet
from services.rollout.engines.shared_inlet import SharedInlet
from services.rollout.layout import ModelLayout
from services.rollout.replica import Replica
from services.rollout.update import Committed, Staged, Update

log = structlog.get_logger()

# A transport without a collective: the engine reads the trainer's memory.
IPC = "ipc"
_PAUSE_NAMES: dict[rollout_pb2.PauseMode, PauseModeName] = {
    rollout_pb2.PAUSE_MODE_IN_PLACE: "in_place",
    rollout_pb2.PAUSE_MODE_RETRACT: "retract",
    rollout_pb2.PAUSE_MODE_ABORT: "abort",
}


class WeightReceiver:
    """Of one engine. Called by the trainer, through the service. Calls queue behind each other, except that an abort
    interrupts a bucket that is on its way. No call may be cancelled: its caller may leave, but it has to reach its end.
    """

    def __init__(
        self,
        replica: Replica,
        engine: Engine,
        layout: ModelLayout,
        give_back: Callable[[pb.ReleaseReason], int],
        *,
        timeout_s: float,
        load_pause_mode: PauseModeName,
    ) -> None:
        """`timeout_s`: of each call of a push, and the longest silence between two calls. `give_back` decides every
        held sample as of now. `load_pause_mode` is for versions loaded from a directory.
        """
        self._replica = replica
        self._engine = engine
        self._layout = layout
        self._give_back = give_back
        self._timeout_s = timeout_s
        self._load_pause_mode = load_pause_mode
        self._groups: set[str] = set()
        self._inlet: Inlet | None = None
        """Of the group: None where the engine receives within its pause."""
        self._staged: Staged | None = None
        self._update: Update | None = None
        self._loading: asyncio.Task[None] | None = None
        self._committed: Committed | None = None
        self._lock = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._expiring: asyncio.Task[None] | None = None
        replica.on_lost.append(self._engine_lost)

    def _engine_lost(self, engine: Engine) -> None:
        """The groups and the update went with the engine."""
        if engine is not self._engine:
            return
        self._groups.clear()
        self._inlet = None
        self._committed = None
        self._stop_timer()
        for staged in (self._staged, self._update.staged if self._update is not None else None):
            if staged is not None:
                staged.close()
        self._staged = None
        if self._update is not None:
            self._update.over = True
            self._update = None
        self._replica.pause(engine, paused=False)
        if self._loading is not None:
            self._loading.cancel()

    async def join(self, request: rollout_pb2.JoinWeightGroupRequest) -> bool:
        """Returns when the engine has joined: whether it takes weights ahead of a pause. Raises UnavailableError when
        it could not join, InvalidArgumentError when it must not.

        An engine has one channel: groups that earlier trainers left behind are dissolved.
        """
        self._replica.fence.check(request.epoch)
        async with self._lock:
            await self._supersede()
            for group_name in list(self._groups):
                await self._destroy(group_name)
            self._inlet = await self._join_engine(request)
            self._groups.add(request.group_name)
        log.info("joined_weight_group", group=request.group_name, epoch=request.epoch, backend=request.backend)
        return self._inlet is not None

    async def _join_engine(self, request: rollout_pb2.JoinWeightGroupRequest) -> Inlet | None:
        receiver = self._engine.receiver
        if request.backend == IPC:
            if receiver is None and not (self._engine.info is not None and self._engine.info.shares_memory):
                raise InvalidArgumentError("the engine cannot read the trainer's memory", field="backend")
            return receiver or SharedInlet()
        if receiver is not None:
            if request.backend == "nccl":
                await receiver.check_nccl(request.nccl_version, request.nccl_cumem)
            await receiver.join(
                name=request.group_name,
                backend=request.backend,
                address=request.master_address,
                port=request.master_port,
                world_size=request.world_size,
                rank_offset=request.rank_offset,
                timeout_s=self._timeout_s,
            )
            return receiver
        try:
            await self._engine.client.init_group(
                name=request.group_name,
                backend=request.backend,
                master_address=request.master_address,
                master_port=request.master_port,
                world_size=request.world_size,
                rank_offset=request.rank_offset,
                timeout_s=self._timeout_s,
            )
        except EngineRefusedError as error:
            raise UnavailableError(error.reason, field="group_name") from error
        return None

    async def leave(self, request: rollout_pb2.LeaveWeightGroupRequest) -> None:
        """Leaving a group that was never joined changes nothing."""
        self._replica.fence.check(request.epoch)
        async with self._lock:
            await self._supersede()
            if request.group_name in self._groups:
                await self._destroy(request.group_name)

    async def stage(self, request: rollout_pb2.StageUpdateRequest) -> int:
        """How many buckets arrive ahead of the pause, once the engine waits for them. Generation goes on."""
        self._replica.fence.check(request.epoch)
        async with self._lock:
            await self._supersede()
            version = self._check(request.version, request.epoch, request.group_name, request.manifest)
            if self._inlet is None:
                raise PreconditionError("the engine takes no weights ahead of a pause", field="engine")
            buckets = await self._inlet.prepare(request.manifest, request.shared)
            self._staged = Staged(self._inlet, version, request.manifest.layout_digest, self._timeout_s)
            self._start_timer()
            return buckets

    async def begin(self, request: rollout_pb2.BeginUpdateRequest) -> int:
        """The number of running requests, once the engine is quiet. From here on new ones are held back."""
        self._replica.fence.check(request.epoch)
        async with self._lock:
            staged = self._staged
            asked = Version.from_proto(request.version), request.manifest.layout_digest
            if staged is not None and self._update is None and (staged.version, staged.digest) == asked:
                self._staged = None
            else:
                staged = None
                await self._supersede()
            version = self._check(request.version, request.epoch, request.group_name, request.manifest)
            if request.pause_mode not in _PAUSE_NAMES:
                raise InvalidArgumentError("must be IN_PLACE, RETRACT or ABORT", field="pause_mode")
            update = await self._start(
                Update(
                    self._replica,
                    self._engine,
                    version,
                    _PAUSE_NAMES[request.pause_mode],
                    epoch=request.epoch,
                    group_name=request.group_name,
                    manifest=request.manifest,
                    staged=staged,
                    timeout_s=self._timeout_s,
                )
            )
            self._start_timer()
            return update.running

    def _check(
        self,
        message: sample_pb2.WeightVersion,
        epoch: int,
        group_name: str,
        manifest: weights_pb2.WeightManifest,
    ) -> Version:
        """Refuses what the engine cannot take, before anything has happened to it."""
        version = _version(message, epoch)
        if group_name not in self._groups:
            raise PreconditionError("the engine has not joined this group", field="group_name")
        if self._replica.leaving:
            raise PreconditionError("the replica is DRAINING", field="state")
        self._engine.life.check_update(version)
        self._layout.check(manifest)
        return version

    async def load(self, request: rollout_pb2.LoadBucketRequest) -> None:
        """Receives one bucket, while the trainer broadcasts it. A failure after the first byte quarantines."""
        self._replica.fence.check(request.epoch)
        async with self._lock:
            update = self._current(request.epoch, request.version)
            if request.bucket != update.next_bucket or request.bucket >= len(update.buckets):
                raise PreconditionError(f"bucket {update.next_bucket} is next, not {request.bucket}", field="bucket")
            await self._load(update, update.load_bucket(self._timeout_s), f"bucket {request.bucket}")

    async def load_staged(self, request: rollout_pb2.LoadStagedRequest) -> None:
        """Loads everything: what was staged, and the rest while the trainer broadcasts it."""
        self._replica.fence.check(request.epoch)
        async with self._lock:
            update = self._current(request.epoch, request.version)
            if update.staged is None or update.next_bucket:
                raise PreconditionError("nothing is staged", field="version")
            await self._load(update, update.load_staged(self._timeout_s), "buckets")

    async def _load(self, update: Update, load: Coroutine[None, None, None], what: str) -> None:
        self._stop_timer()
        self._loading = asyncio.create_task(load)
        try:
            await self._loading
        except (PolyheadError, asyncio.CancelledError) as error:
            reason = str(error) or "interrupted"
            if update.touched:
                await self._abandon(update, reason)
            raise UnavailableError(f"was not loaded: {reason}", field=what) from error
        finally:
            self._loading = None
            if not update.over:
                self._start_timer()

    async def commit(self, request: rollout_pb2.CommitUpdateRequest) -> Committed:
        """Generation continues under the new version. A repeated call gets the same answer."""
        self._replica.fence.check(request.epoch)
        async with self._lock:
            done = self._committed
            if self._update is None and done is not None and done.version == Version.from_proto(request.version):
                return done
            update = self._current(request.epoch, request.version)
            missing = len(update.buckets) - update.next_bucket
            if missing:
                raise PreconditionError(f"{missing} buckets were not loaded", field="version")
            return await self._finish(update)

    async def abort(self, request: rollout_pb2.AbortUpdateRequest) -> pb.ReplicaState:
        """The state that results. Aborting what is not running changes nothing."""
        self._replica.fence.check(request.epoch)
        if self._loading is not None:
            self._loading.cancel()
        await self._break_off()  # whoever waits for it holds the lock
        async with self._lock:
            await self._drop_staged()
            update = self._update
            if update is not None and update.version == Version.from_proto(request.version):
                await self._abandon(update, request.reason)
            return self._engine.life.state

    async def stand_down(self) -> None:
        """Ends whatever an earlier trainer has left behind."""
        if self._loading is not None:
            self._loading.cancel()
        await self._break_off()
        async with self._lock:
            await self._supersede()

    async def load_version(self, request: rollout_pb2.LoadVersionRequest) -> Committed:
        """Loads a whole version from a directory of safetensors."""
        self._replica.fence.check(request.epoch)
        async with self._lock:
            await self._supersede()
            version = _version(request.version, request.epoch)
            await asyncio.to_thread(self._layout.check_directory, Path(request.directory))
            update = await self._start(
                Update(
                    self._replica,
                    self._engine,
                    version,
                    self._load_pause_mode,
                    epoch=request.epoch,
                    timeout_s=self._timeout_s,
                )
            )
            try:
                await update.load_directory(request.directory, self._timeout_s)
            except PolyheadError as error:
                await self._abandon(update, str(error))
                raise UnavailableError(f"was not loaded: {error}", field="directory") from error
            return await self._finish(update)

    def _current(self, epoch: int, version: sample_pb2.WeightVersion) -> Update:
        update = self._update
        if update is None or update.epoch != epoch or update.version != Version.from_proto(version):
            running = f"an update to {update.version} is" if update else "no update is"
            raise PreconditionError(f"{running} running", field="version")
        return update

    async def _start(self, update: Update) -> Update:
        if self._replica.leaving:
            raise PreconditionError("the replica is DRAINING", field="state")
        self._engine.life.check_update(update.version)
        self._update = update
        try:
            await update.pause()
        except PolyheadError as error:
            await self._abandon(update, str(error))
            raise UnavailableError(f"did not become quiet: {error}", field="engine") from error
        return update

    async def _finish(self, update: Update) -> Committed:
        self._stop_timer()
        try:
            self._committed = await update.resume()
        except UnavailableError as error:
            await self._abandon(update, str(error))
            raise
        self._update = None
        return self._committed

    async def _supersede(self) -> None:
        """An update that an older epoch, or an earlier attempt of this one, has left behind is ended first."""
        await self._drop_staged()
        if self._update is not None:
            await self._abandon(self._update, "a newer call replaced it")

    async def _drop_staged(self) -> None:
        staged, self._staged = self._staged, None
        if staged is not None:
            self._stop_timer()
            await staged.drop()

    async def _break_off(self) -> None:
        """Ends the wait for buckets that are to arrive ahead of the pause."""
        for staged in (self._staged, self._update.staged if self._update is not None else None):
            if staged is not None:
                await staged.drop()

    async def _abandon(self, update: Update, reason: str) -> None:
        self._stop_timer()
        if update is self._update:
            self._update = None
        await update.abandon(reason, self._give_back)
        if update.touched and update.group_name in self._groups:
            await self._destroy(update.group_name)
            self._engine.suspect.set()

    async def _destroy(self, group_name: str) -> None:
        """Leaves a group, however broken it is; an engine stuck in it is found out by its keeper."""
        self._groups.discard(group_name)
        inlet, self._inlet = self._inlet, None
        try:
            if inlet is not None:
                await inlet.leave()
            else:
                await self._engine.client.destroy_group(group_name)
        except PolyheadError as error:
            log.info("group_not_destroyed", group=group_name, reason=str(error))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start_timer(self) -> None:
        """Ends the update when its trainer falls silent."""
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._on_silence)

    def _on_silence(self) -> None:
        self._expiring = asyncio.create_task(self._expire(self._timer, self._update))

    async def _expire(self, timer: asyncio.TimerHandle | None, update: Update | None) -> None:
        async with self._lock:
            if timer is self._timer:
                await self._drop_staged()
            if update is not None and update is self._update and timer is self._timer:
                await self._abandon(update, f"no call for {self._timeout_s} s")


def _version(message: sample_pb2.WeightVersion, epoch: int) -> Version:
    version = Version.from_proto(message)
    if version.epoch > epoch:
        raise InvalidArgumentError(f"{version} is of a later epoch than {epoch}", field="version")
    return version
