"""A rollout replica without an engine: it takes weight pushes over a real collective, and keeps the bytes."""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import rollout_pb2 as rpb
from polyhead.v1 import rollout_pb2_grpc, weights_pb2
from services.common import rpc
from services.common.buffer_client import BufferClient
from services.common.errors import FencedError, PreconditionError, UnavailableError
from services.common.versions import Version

BEAT_S = 0.1


class Engine:
    """A process that joins weight groups and receives. Starting one imports torch, so idle ones are used again."""

    _idle: ClassVar[list[Engine]] = []

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kit.weight_receiver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": ".:protos", "OMP_NUM_THREADS": "1"},
        )
        atexit.register(self._process.kill)
        self._one_command = threading.Lock()
        assert self._process.stdout is not None
        self._process.stdout.readline()

    @classmethod
    def take(cls) -> Engine:
        return cls._idle.pop() if cls._idle else cls()

    def give_back(self) -> None:
        if self._process.poll() is None and not self._one_command.locked():
            self._idle.append(self)
        else:
            self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def run(self, command: dict[str, Any]) -> None:
        """Raises UnavailableError when it fails or dies."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._one_command:
            try:
                self._process.stdin.write(json.dumps(command).encode() + b"\n")
                self._process.stdin.flush()
                answer = self._process.stdout.readline()
            except BrokenPipeError:
                answer = b""
        if not answer or "error" in (said := json.loads(answer)):
            raise UnavailableError(said["error"] if answer else "the engine died", field="engine")


class FakeReplica(rollout_pb2_grpc.RolloutServiceServicer):
    """`before` maps a verb to what happens at its start: raise, hang, die; `after`, to what becomes of its answer."""

    def __init__(self, replica_id: str, directory: Path) -> None:
        self.replica_id = replica_id
        self.state: pb.ReplicaState = pb.REPLICA_STATE_JOINING
        self.version = Version(0, 0)
        self.received: dict[Version, bytes] = {}
        """All bytes of each committed version, in manifest order."""
        self.manifests: dict[Version, weights_pb2.WeightManifest] = {}
        self.calls: list[str] = []
        self.before: dict[str, Callable[[], Any]] = {}
        self.after: dict[str, Callable[[], Any]] = {}
        self.fence = 0
        self.beats = True
        self._directory = directory
        self._parts: list[bytes] = []
        self._manifest = weights_pb2.WeightManifest()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, buffer: BufferClient) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        await self.start_engine()
        self._server = await rpc.serve(
            "127.0.0.1:0",
            lambda server: rollout_pb2_grpc.add_RolloutServiceServicer_to_server(self, server),
            ["polyhead.v1.RolloutService"],
        )
        self._tasks.append(asyncio.create_task(self._beat(buffer)))

    async def start_engine(self) -> None:
        self.engine = await asyncio.to_thread(Engine.take)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self._server.stop(0)
        self.engine.give_back()

    def describe(self) -> pb.Replica:
        return pb.Replica(
            replica_id=self.replica_id,
            role=pb.ROLE_ROLLOUT,
            address=self._server.address,
            state=self.state,
            weight_version=self.version.to_proto(),
        )

    async def _beat(self, buffer: BufferClient) -> None:
        while True:
            if self.beats:
                await buffer.register_replica(self.describe())
            await asyncio.sleep(BEAT_S)

    async def _engine(self, command: dict[str, Any]) -> None:
        await asyncio.to_thread(self.engine.run, command)

    async def _enter(self, verb: str, epoch: int) -> None:
        self.calls.append(verb)
        if epoch < self.fence:
            raise FencedError(f"epoch {epoch} is older than {self.fence}", field="epoch")
        self.fence = epoch
        if verb in self.before:
            outcome = self.before[verb]()
            if asyncio.iscoroutine(outcome):
                await outcome

    async def JoinWeightGroup(self, request: rpb.JoinWeightGroupRequest, context: Any) -> rpb.JoinWeightGroupResponse:
        await self._enter("JoinWeightGroup", request.epoch)
        join = {
            "backend": request.backend,
            "address": request.master_address,
            "port": request.master_port,
            "name": request.group_name,
            "timeout_s": 10.0,
        }
        await self._engine({"join": join})
        return rpb.JoinWeightGroupResponse()

    async def LeaveWeightGroup(
        self, request: rpb.LeaveWeightGroupRequest, context: Any
    ) -> rpb.LeaveWeightGroupResponse:
        await self._enter("LeaveWeightGroup", request.epoch)
        return rpb.LeaveWeightGroupResponse()

    async def BeginUpdate(self, request: rpb.BeginUpdateRequest, context: Any) -> rpb.BeginUpdateResponse:
        await self._enter("BeginUpdate", request.epoch)
        if self.state == pb.REPLICA_STATE_SERVING and Version.from_proto(request.version) <= self.version:
            raise PreconditionError(f"not newer than {self.version}, which is served", field="version")
        self._manifest, self._parts = request.manifest, []
        return rpb.BeginUpdateResponse(running_requests=3)

    async def LoadBucket(self, request: rpb.LoadBucketRequest, context: Any) -> rpb.LoadBucketResponse:
        await self._enter("LoadBucket", request.epoch)
        path = self._directory / "bucket"
        try:
            await self._engine({"receive": self._manifest.buckets[request.bucket].num_bytes, "to": str(path)})
        except UnavailableError:
            self.state = pb.REPLICA_STATE_QUARANTINED
            raise
        self._parts.append(path.read_bytes())
        return rpb.LoadBucketResponse()

    async def CommitUpdate(self, request: rpb.CommitUpdateRequest, context: Any) -> rpb.CommitUpdateResponse:
        await self._enter("CommitUpdate", request.epoch)
        self.version = Version.from_proto(request.version)
        self.received[self.version] = b"".join(self._parts)
        self.manifests[self.version] = self._manifest
        self.state = pb.REPLICA_STATE_SERVING
        response = rpb.CommitUpdateResponse(requests_continued=3)
        response.pause.FromMilliseconds(5)
        if "CommitUpdate" in self.after:
            self.after["CommitUpdate"]()
        return response

    async def AbortUpdate(self, request: rpb.AbortUpdateRequest, context: Any) -> rpb.AbortUpdateResponse:
        await self._enter("AbortUpdate", request.epoch)
        return rpb.AbortUpdateResponse(state=self.state)

    async def GetStatus(
        self, request: rpb.RolloutServiceGetStatusRequest, context: Any
    ) -> rpb.RolloutServiceGetStatusResponse:
        self.calls.append("GetStatus")
        return rpb.RolloutServiceGetStatusResponse(replica=self.describe())
