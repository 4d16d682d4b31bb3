"""Publication of weights: a duty of its own, beside training.

A version is *offered* once and then owed to every engine of every rollout replica: those that serve an older one, and
those that join or were quarantined, also while the trainer waits or computes. Lives on the process's asyncio loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial

import structlog
import torch

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import rollout_pb2 as rpb
from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.common.errors import UnavailableError
from services.common.shared_directory import shared_directory
from services.common.versions import Version
from services.trainer.weights.channel import Channel
from services.trainer.weights.directory import VersionDirectories
from services.trainer.weights.disk import DiskChannel
from services.trainer.weights.form import EngineForm
from services.trainer.weights.peer import Peer, Record
from services.trainer.weights.shared import IPC, SharedMemory
from services.trainer.weights.snapshot import MIB, Snapshot, build_manifest, weights_device

log = structlog.get_logger()

LIST_EVERY_S = 0.5
BUFFER_TIMEOUT_S = 5.0
# Once one engine has a version, it is published without those that take longer than this: they are below the floor
# until they have it, so they get no work and hold up nobody.
STRAGGLER_S = 5.0
# Pushes under way when the trainer leaves may still end in order within this time.
FAREWELL_S = 5.0

# A suspect engine's process is lost, and with it the group: it joins anew when it is back.
_OWED = {
    pb.REPLICA_STATE_JOINING,
    pb.REPLICA_STATE_SYNCING,
    pb.REPLICA_STATE_SERVING,
    pb.REPLICA_STATE_QUARANTINED,
    pb.REPLICA_STATE_YIELDED,
}
_LEAVING = {pb.REPLICA_STATE_DRAINING, pb.REPLICA_STATE_DEAD}
_PAUSE_MODES = {
    "in_place": rpb.PAUSE_MODE_IN_PLACE,
    "retract": rpb.PAUSE_MODE_RETRACT,
    "abort": rpb.PAUSE_MODE_ABORT,
}


class Publisher:
    """Owes the newest offered version to every engine, each by a push of its own.

    Memory: at most two copies of the weights. Training waits for the pushes of one version before it offers the next,
    so the second copy comes to be only while a straggler still reads from the first.
    """

    def __init__(self, buffer: BufferClient, config: Config, epoch: int, record: Record) -> None:
        """`record` gets one line per push, for pushes.jsonl. Raises ConfigError when the engines' directory has its
        weights in a form that cannot be pushed.
        """
        self._form = EngineForm.of_directory(config.model.hf_checkpoint)
        self._directories: VersionDirectories | None = None
        if config.trainer.weights.backend == "disk":
            root = config.trainer.weights.directory or config.run.dir / "weights"
            keep_last = config.trainer.weights.keep_last
            self._directories = VersionDirectories(root, config.model.hf_checkpoint, keep_last)
        self._buffer = buffer
        self._config = config.trainer.weights
        self._device = partial(weights_device, config.trainer.weights.backend, config.trainer.device)
        self._shared_directory = shared_directory(config.run.dir)
        self._in_turns = config.run.colocate
        self._pause_mode = _PAUSE_MODES[config.rollout.pause_mode]
        self._epoch = epoch
        self._record = record
        self._peers: dict[tuple[str, int], Peer] = {}
        """By replica id and index of the engine."""
        self._listed_at = -LIST_EVERY_S
        self._snapshots: list[Snapshot] = []
        self._target: tuple[Version, Snapshot] | None = None
        self._started: Version | None = None
        """The last version whose pushes have begun."""
        self._published: Version | None = None
        self._round_done = asyncio.Condition()
        self._wake = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    async def start(self, ended: Callable[[asyncio.Task[None]], None]) -> None:
        """Begins to push, until `close`. `ended` gets the task when it is done: with FencedError if superseded."""
        self._running = asyncio.create_task(self._run())
        self._running.add_done_callback(ended)

    async def take_snapshot(self, layout: Mapping[str, torch.Tensor]) -> Snapshot:
        """A free snapshot to fill, once the pushes of the last offered version have settled. Of `layout`, which has
        the weights by name, only shapes and dtypes matter.

        From here until `offer` nothing is owed: nobody must be served from a snapshot that is being overwritten.
        """
        async with self._round_done:
            await self._round_done.wait_for(self._settled)
            self._target = None
        free = [snapshot for snapshot in self._snapshots if not snapshot.users]
        if not free:
            free = [self._new_snapshot(layout)]
            self._snapshots += free
        return free[0]

    def _new_snapshot(self, layout: Mapping[str, torch.Tensor]) -> Snapshot:
        manifest = build_manifest(layout, self._config.bucket_mb * MIB, self._form)
        device = self._device()
        shared = SharedMemory(self._shared_directory, device) if self._config.backend == IPC else None
        return Snapshot(manifest, device, self._form, shared)

    async def offer(self, version: Version, snapshot: Snapshot) -> None:
        """From now on every engine is owed `version`, whose weights `snapshot` holds."""
        self._target = (version, snapshot)
        if self._in_turns:
            self._listed_at = -LIST_EVERY_S  # replicas have just yielded
        self._wake.set()

    async def wait_published(self, version: Version) -> None:
        """Returns when at least one engine serves `version` or a later one, and the buffer knows."""
        async with self._round_done:
            await self._round_done.wait_for(lambda: self._published is not None and self._published >= version)

    def has_published(self, version: Version) -> bool:
        """As `wait_published`, at this moment."""
        return self._published is not None and self._published >= version

    async def withdraw(self) -> None:
        """Waits for the pushes of the offered version to end, whatever became of them, and for its publication if an
        engine has it; then frees the snapshots. Nothing is owed until the next offer.
        """
        async with self._round_done:
            await self._round_done.wait_for(self._idle)
            self._target = self._started = None
        for snapshot in [each for each in self._snapshots if not each.users]:
            snapshot.close()
            self._snapshots.remove(snapshot)

    def _idle(self) -> bool:
        if self._target is None:
            return True
        version, peers = self._target[0], self._peers.values()
        ended = self._started == version and not any(peer.busy for peer in peers)
        return ended and (self._published == version or not any(peer.has == version for peer in peers))

    async def close(self) -> None:
        """Lets pushes under way end, then parts from every engine."""
        if self._running is not None:
            self._running.cancel()
        await asyncio.gather(*(peer.finish(FAREWELL_S) for peer in self._peers.values()), return_exceptions=True)
        for snapshot in self._snapshots:
            snapshot.close()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._round()
            except (TimeoutError, UnavailableError) as error:
                log.warning("publication_waits", reason=str(error) or "the buffer does not answer")
            async with self._round_done:
                self._round_done.notify_all()
            try:
                async with asyncio.timeout(LIST_EVERY_S):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _settled(self) -> bool:
        """A snapshot is free or may be made, and publication waits for no push of the last offered version."""
        if len(self._snapshots) == 2 and all(snapshot.users for snapshot in self._snapshots):
            return False
        if self._target is None or self._published == self._target[0]:
            return True
        return self._started == self._target[0] and not any(peer.busy for peer in self._peers.values())

    async def _round(self) -> None:
        for peer in self._peers.values():
            peer.raise_failure()
        if time.monotonic() - self._listed_at >= LIST_EVERY_S:
            await self._list()
        if self._target is None:
            return
        version, snapshot = self._target
        for peer in self._peers.values():
            if peer.is_owed(version):
                peer.start(version, snapshot, self._wake.set)
        self._started = version
        if self._published != version and self._is_complete(version):
            async with asyncio.timeout(BUFFER_TIMEOUT_S):
                await self._buffer.publish_version(version)
            self._published = version

    async def _list(self) -> None:
        async with asyncio.timeout(BUFFER_TIMEOUT_S):
            replicas = await self._buffer.list_replicas(pb.ROLE_ROLLOUT)
        self._listed_at = time.monotonic()
        listed = {
            (replica.replica_id, engine.index): (replica, engine)
            for replica in replicas
            for engine in replica.engines
            if replica.state not in _LEAVING and engine.state in _OWED
        }
        for key, (replica, engine) in listed.items():
            if key in self._peers:
                self._peers[key].engine = engine
            else:
                self._peers[key] = Peer(replica, engine, self._config.backend, self._open_channel, self._record)
        for key in self._peers.keys() - listed.keys():
            if not self._peers[key].busy:
                await self._peers.pop(key).drop_channel()

    def _open_channel(self, replica: pb.Replica, engine: int) -> Channel:
        if self._directories is not None:
            return DiskChannel(replica, engine, self._epoch, self._config, self._pause_mode, self._directories)
        return Channel(replica, engine, self._epoch, self._config, self._pause_mode)

    def _is_complete(self, version: Version) -> bool:
        """At least one engine has it, and none that was serving may still get it soon."""
        if not any(peer.has == version for peer in self._peers.values()):
            return False
        overdue = time.monotonic() - STRAGGLER_S
        return not any(
            peer.busy and peer.started > overdue and peer.engine.state != pb.REPLICA_STATE_JOINING
            for peer in self._peers.values()
            if peer.has != version
        )
