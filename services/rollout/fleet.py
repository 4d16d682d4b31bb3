"""The life of one replica as a pure state machine: no I/O, no clock.

``SUSPECT → JOINING → SYNCING → SERVING(v)``, with QUARANTINED for torn weights, and DRAINING → DEAD at the end. Only a
complete push or load leads to SERVING (I8). A serving replica that is pushed to stays SERVING: until the first byte
its old version is whole.
"""

from __future__ import annotations

from polyhead.v1 import buffer_pb2 as pb
from services.common.errors import PreconditionError
from services.common.versions import Version

_LEAVING = (pb.REPLICA_STATE_DRAINING, pb.REPLICA_STATE_DEAD)


class ReplicaLife:
    """Begins as SUSPECT: an engine that has not answered yet is no different from one that answers no more."""

    def __init__(self) -> None:
        self.state: pb.ReplicaState = pb.REPLICA_STATE_SUSPECT
        self.version: Version | None = None
        """What it serves; None unless SERVING, or DRAINING from there."""
        self.updating: Version | None = None
        """The version a running update brings."""
        self._before_update: pb.ReplicaState = pb.REPLICA_STATE_SUSPECT

    @property
    def may_generate(self) -> bool:
        return self.state == pb.REPLICA_STATE_SERVING and self.updating is None

    @property
    def leaving(self) -> bool:
        return self.state in _LEAVING

    def engine_ready(self) -> None:
        """A fresh engine holds the checkpoint's weights, which are no version."""
        if not self.leaving:
            self._become(pb.REPLICA_STATE_JOINING)

    def engine_lost(self) -> None:
        if not self.leaving:
            self._become(pb.REPLICA_STATE_SUSPECT)

    def check_update(self, version: Version) -> None:
        """Raises PreconditionError when an update to `version` cannot begin now."""
        name = pb.ReplicaState.Name(self.state).removeprefix("REPLICA_STATE_")
        if self.leaving or self.state == pb.REPLICA_STATE_SUSPECT:
            raise PreconditionError(f"the replica is {name}", field="state")
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
        if torn and not self.leaving:
            self._become(pb.REPLICA_STATE_QUARANTINED)
        elif not self.leaving:
            self.state, self.updating = self._before_update, None

    def quarantine(self) -> None:
        """An update was taken for complete and turned out not to be."""
        if not self.leaving and self.state != pb.REPLICA_STATE_SUSPECT:
            self._become(pb.REPLICA_STATE_QUARANTINED)

    def drain(self) -> None:
        """Running requests may still send tokens of the version that was served."""
        if self.state != pb.REPLICA_STATE_DEAD:
            self.state, self.updating = pb.REPLICA_STATE_DRAINING, None

    def end(self) -> None:
        self._become(pb.REPLICA_STATE_DEAD)

    def _become(self, state: pb.ReplicaState) -> None:
        self.state, self.version, self.updating = state, None, None
