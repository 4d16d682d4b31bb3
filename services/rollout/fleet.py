"""The life of one engine as a pure state machine, and the fence around its replica: no I/O, no clock.

``SUSPECT → JOINING → SYNCING → SERVING(v)``, with QUARANTINED for torn weights, and YIELDED for those that were given
up so that the trainer has the GPU. Only a complete push or load leads to SERVING (I8). A serving engine that is pushed
to stays SERVING: until the first byte its old version is whole. The end, DRAINING → DEAD, is a matter of the replica.
"""

from __future__ import annotations

from polyhead.v1 import buffer_pb2 as pb
from services.common.errors import FencedError, PreconditionError
from services.common.versions import Version


class Fence:
    """One for all engines of a replica: a trainer that has been replaced reaches none of them (I4)."""

    def __init__(self) -> None:
        self._epoch = 0

    def check(self, epoch: int) -> None:
        """Raises FencedError for an epoch older than the newest seen."""
        if epoch < self._epoch:
            raise FencedError(f"epoch {epoch} is older than {self._epoch}", field="epoch")
        self._epoch = epoch


class EngineLife:
    """Begins as SUSPECT: an engine that has not answered yet is no different from one that answers no more."""

    def __init__(self) -> None:
        self.state: pb.ReplicaState = pb.REPLICA_STATE_SUSPECT
        self.version: Version | None = None
        """What it serves; None unless SERVING."""
        self.updating: Version | None = None
        """The version a running update brings."""
        self._before_update: pb.ReplicaState = pb.REPLICA_STATE_SUSPECT

    @property
    def may_generate(self) -> bool:
        return self.state == pb.REPLICA_STATE_SERVING and self.updating is None

    def engine_ready(self) -> None:
        """A fresh engine holds the checkpoint's weights, which are no version."""
        self._become(pb.REPLICA_STATE_JOINING)

    def engine_lost(self) -> None:
        self._become(pb.REPLICA_STATE_SUSPECT)

    def check_update(self, version: Version) -> None:
        """Raises PreconditionError when an update to `version` cannot begin now."""
        if self.state == pb.REPLICA_STATE_SUSPECT:
            raise PreconditionError("the engine is SUSPECT", field="state")
        if self.updating is not None:
            raise PreconditionError(f"an update to {self.updating} is running", field="version")
        if self.version is not None and version <= self.version:
            raise PreconditionError(f"{version} is not newer than {self.version}, which is served", field="version")

    def begin_update(self, version: Version) -> None:
        self.check_update(version)
        self._before_update = self.state
        self.updating = version
        if self.state != pb.REPLICA_STATE_SERVING:
            self.state = pb.REPLICA_STATE_SYNCING

    def commit_update(self) -> Version:
        """Every byte of the new version is in place: it is served from here on."""
        version = self.updating
        if version is None:
            raise PreconditionError("no update is running", field="version")
        self._become(pb.REPLICA_STATE_SERVING)
        self.version = version
        return version

    def abort_update(self, *, torn: bool) -> None:
        """`torn`: some bytes may have reached the model, so nothing may be served until a complete update."""
        if self.updating is None:
            raise PreconditionError("no update is running", field="version")
        if torn:
            self._become(pb.REPLICA_STATE_QUARANTINED)
        else:
            self.state, self.updating = self._before_update, None

    def quarantine(self) -> None:
        """An update was taken for complete and turned out not to be."""
        if self.state != pb.REPLICA_STATE_SUSPECT:
            self._become(pb.REPLICA_STATE_QUARANTINED)

    def put_to_sleep(self) -> None:
        """Its memory has been given up: it holds no weights. Raises PreconditionError during an update."""
        if self.updating is not None:
            raise PreconditionError(f"an update to {self.updating} is running", field="state")
        if self.state != pb.REPLICA_STATE_SUSPECT:
            self._become(pb.REPLICA_STATE_YIELDED)

    def wake(self) -> None:
        """It has its memory back; what is in it is no version, unless one was pushed since."""
        if self.state == pb.REPLICA_STATE_YIELDED:
            self._become(pb.REPLICA_STATE_JOINING)

    def _become(self, state: pb.ReplicaState) -> None:
        self.state, self.version, self.updating = state, None, None
