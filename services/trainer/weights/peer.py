"""One engine of a rollout replica as the publisher sees it: what it has, and the push that is under way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from polyhead.v1 import buffer_pb2 as pb
from services.common.errors import UnavailableError
from services.common.versions import Version
from services.trainer.weights.channel import Channel, Pushed
from services.trainer.weights.snapshot import Snapshot

log = structlog.get_logger()

# An engine that cannot be reached is tried again after this long, doubling up to the last.
RETRY_S = 0.5
RETRY_MAX_S = 5.0

# Such an engine is perhaps another one than was joined: then it is in no group yet.
_FRESH = (pb.REPLICA_STATE_JOINING, pb.REPLICA_STATE_YIELDED)

Record = Callable[[Mapping[str, object]], None]


class Peer:
    """Brings one engine to a version, over a channel that is made when needed and dropped on any failure."""

    def __init__(
        self,
        replica: pb.Replica,
        engine: pb.Engine,
        backend: str,
        open_channel: Callable[[pb.Replica, int], Channel],
        record: Record,
    ) -> None:
        """`open_channel` gives one to an engine of a replica, by its index; `backend` is the kind that it is of."""
        self.engine = engine
        """As the registry, the replica itself, or the last push said: whichever came last."""
        self.has: Version | None = None
        """The last version that it committed to us."""
        self.started = 0.0
        self._replica = replica
        self._backend = backend
        self._new_channel = open_channel
        self._record = record
        self._channel: Channel | None = None
        self._task: asyncio.Task[None] | None = None
        self._left_behind: asyncio.Future[Any] | None = None
        self._retry_at = 0.0
        self._retry_s = RETRY_S

    @property
    def _identity(self) -> dict[str, str | int]:
        """Which engine it is, in logs and in pushes.jsonl."""
        return {"replica_id": self._replica.replica_id, "engine": self.engine.index}

    @property
    def busy(self) -> bool:
        return self._task is not None and not self._task.done()

    def is_owed(self, version: Version) -> bool:
        """Whether a push of `version` should start now."""
        if self.busy or time.monotonic() < self._retry_at:
            return False
        return self.has != version or not _serves(self.engine, version)

    def start(self, version: Version, snapshot: Snapshot, ended: Callable[[], None]) -> None:
        """Begins a push in the background. `ended` is called when it is over and when `snapshot` is free again."""
        self.started = time.monotonic()
        self._left_behind = None
        snapshot.users += 1
        self._task = asyncio.create_task(self._serve(version, snapshot, ended))
        self._task.add_done_callback(_heard)

    def raise_failure(self) -> None:
        """Raises what ended the last push, if it was more than the engine's failure: FencedError."""
        if self._task is not None and self._task.done() and not self._task.cancelled():
            self._task.result()

    async def finish(self, timeout_s: float) -> None:
        """Lets a push end in order, or breaks it off; then parts from the engine."""
        if self._task is not None and self.busy:
            await asyncio.wait({self._task}, timeout=timeout_s)
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._channel is not None:
            await self._channel.leave()

    async def drop_channel(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            self._left_behind = channel.broadcast
            await channel.close()

    async def _serve(self, version: Version, snapshot: Snapshot, ended: Callable[[], None]) -> None:
        try:
            if self.has in (version, None) and await self._has_already(version):
                return
            if self.engine.state in _FRESH and self._open_channel().joined:
                await self.drop_channel()
            channel = await self._joined_channel()
            if channel is not None:
                await self._push(channel, version, snapshot)
        finally:
            self._release(snapshot, ended)
            ended()

    async def _has_already(self, version: Version) -> bool:
        """Asks the engine's replica itself: the registry hears of a push a heartbeat later, and the answer to a commit
        may have been lost, after which no second push of that version would be accepted.

        A version names its epoch, which is this trainer's alone: who serves it has these very weights.
        """
        try:
            replica = await self._open_channel().status()
        except UnavailableError:
            return False
        self.engine = next((each for each in replica.engines if each.index == self.engine.index), self.engine)
        if not _serves(self.engine, version):
            return False
        self.has, self._retry_s = version, RETRY_S
        return True

    def _open_channel(self) -> Channel:
        if self._channel is None:
            self._channel = self._new_channel(self._replica, self.engine.index)
        return self._channel

    async def _joined_channel(self) -> Channel | None:
        channel = self._open_channel()
        if channel.joined:
            return channel
        try:
            await channel.join(self.engine.ranks)
        except UnavailableError as error:
            log.info("engine_not_joined", **self._identity, reason=str(error))
            await self._failed()
            return None
        return channel

    async def _push(self, channel: Channel, version: Version, snapshot: Snapshot) -> None:
        started, error, pushed = time.monotonic(), "", Pushed(0.0, 0, 0, {}, {})
        try:
            pushed = await channel.push(version, snapshot)
        except UnavailableError as failure:
            error = str(failure)
            log.warning("push_failed", **self._identity, version=str(version), reason=error)
            await self._failed()
        else:
            self.has, self._retry_s = version, RETRY_S
            self.engine.state = pb.REPLICA_STATE_SERVING
            self.engine.weight_version.CopyFrom(version.to_proto())
        self._record(
            {
                "version": str(version),
                **self._identity,
                "seconds": time.monotonic() - started,
                "pause_s": pushed.pause_s,
                "transport": self._backend,
                "bytes": snapshot.manifest.num_bytes,
                "gb_per_s": pushed.gb_per_s(snapshot.manifest.num_bytes),
                "requests_continued": pushed.requests_continued,
                "requests_aborted": pushed.requests_aborted,
                **pushed.effect,
                "phases": {"prepare_s": snapshot.fill_s(), **pushed.trace},
                "time": time.time(),
                "ok": not error,
                "error": error,
            }
        )

    async def _failed(self) -> None:
        self.has = None
        self._retry_at = time.monotonic() + self._retry_s
        self._retry_s = min(2 * self._retry_s, RETRY_MAX_S)
        await self.drop_channel()

    def _release(self, snapshot: Snapshot, ended: Callable[[], None]) -> None:
        """The snapshot is free as soon as no collective reads from it any more."""

        def release(_: object = None) -> None:
            snapshot.users -= 1
            ended()

        if self._left_behind is not None and not self._left_behind.done():
            self._left_behind.add_done_callback(release)
        else:
            release()


def _heard(task: asyncio.Task[None]) -> None:
    """Of several engines whose pushes were refused, one ends the trainer: the others' refusals need no reader."""
    if not task.cancelled():
        task.exception()


def _serves(engine: pb.Engine, version: Version) -> bool:
    serving = engine.state == pb.REPLICA_STATE_SERVING
    return serving and Version.from_proto(engine.weight_version) == version
