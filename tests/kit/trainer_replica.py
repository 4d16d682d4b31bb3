"""A rollout replica whose engines only take weight pushes, over a real collective, and keep the bytes."""

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

import torch
from safetensors.torch import load_file

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import rollout_pb2 as rpb
from polyhead.v1 import rollout_pb2_grpc, weights_pb2
from services.common import rpc
from services.common.buffer_client import BufferClient
from services.common.errors import FencedError, PreconditionError, UnavailableError
from services.common.versions import Version

BEAT_S = 0.1


class Receiver:
    """A process that joins weight groups and receives. Starting one imports torch, so idle ones are used again."""

    _idle: ClassVar[list[Receiver]] = []

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
    def take(cls) -> Receiver:
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


class FakeEngine:
    """`before` maps a verb to what happens at its start: raise, hang, die; `after`, to what becomes of its answer."""

    member: ClassVar[type[Receiver]] = Receiver

    def __init__(self, index: int, directory: Path, ranks: int) -> None:
        self.index = index
        self.receivers: list[Receiver] = []
        """One per rank."""
        self.state: pb.ReplicaState = pb.REPLICA_STATE_JOINING
        self.version = Version(0, 0)
        self.received: dict[Version, bytes] = {}
        """All bytes of each committed version, in manifest order."""
        self.manifests: dict[Version, weights_pb2.WeightManifest] = {}
        self.calls: list[str] = []
        self.before: dict[str, Callable[[], Any]] = {}
        self.after: dict[str, Callable[[], Any]] = {}
        self.stages = False
        """Whether it takes its first bucket ahead of the pause."""
        self._ahead: asyncio.Task[None] | None = None
        self._ranks = ranks
        self._path = directory / f"bucket-{index}"
        self._parts: list[bytes] = []
        self._manifest = weights_pb2.WeightManifest()

    async def start(self) -> None:
        """Anew, after its processes were killed."""
        self.receivers = [await asyncio.to_thread(self.member.take) for _ in range(self._ranks)]
        self.state = pb.REPLICA_STATE_JOINING

    def kill(self) -> None:
        for receiver in self.receivers:
            receiver.kill()

    async def enter(self, verb: str) -> None:
        self.calls.append(verb)
        if verb in self.before:
            outcome = self.before[verb]()
            if asyncio.iscoroutine(outcome):
                await outcome

    def describe(self) -> pb.Engine:
        return pb.Engine(
            index=self.index,
            state=self.state,
            weight_version=self.version.to_proto(),
            name="fake/1",
            ranks=self._ranks,
        )

    async def join(self, request: rpb.JoinWeightGroupRequest) -> None:
        join = {
            "backend": request.backend,
            "address": request.master_address,
            "port": request.master_port,
            "name": request.group_name,
            "world_size": request.world_size,
            "timeout_s": 10.0,
        }
        await self._run([{"join": {**join, "rank": request.rank_offset + each}} for each in range(self._ranks)])

    def begin(self, request: rpb.BeginUpdateRequest) -> None:
        if self.state == pb.REPLICA_STATE_SERVING and Version.from_proto(request.version) <= self.version:
            raise PreconditionError(f"not newer than {self.version}, which is served", field="version")
        if not self.stages:
            self._manifest, self._parts = request.manifest, []

    def stage(self, request: rpb.StageUpdateRequest) -> int:
        self._manifest, self._parts = request.manifest, []
        self._ahead = asyncio.create_task(self.load(0))
        return 1

    async def load_staged(self) -> None:
        assert self._ahead is not None
        await self._ahead
        for bucket in range(1, len(self._manifest.buckets)):
            await self.load(bucket)

    async def load(self, bucket: int) -> None:
        size = self._manifest.buckets[bucket].num_bytes
        paths = [self._path.with_suffix(f".{rank}") for rank in range(self._ranks)]
        try:
            await self._run([{"receive": size, "to": str(path)} for path in paths])
        except UnavailableError:
            self.state = pb.REPLICA_STATE_QUARANTINED
            raise
        first, *others = (path.read_bytes() for path in paths)
        assert all(other == first for other in others)
        self._parts.append(first)

    def load_directory(self, directory: Path) -> None:
        """Keeps the bytes of its files in their order."""
        files = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
        tensors = [tensor for file in files for tensor in file.values()]
        self._manifest = weights_pb2.WeightManifest()
        self._parts = [tensor.flatten().view(torch.uint8).numpy().tobytes() for tensor in tensors]

    def commit(self, version: Version) -> None:
        self.version = version
        self.received[version] = b"".join(self._parts)
        self.manifests[version] = self._manifest
        self.state = pb.REPLICA_STATE_SERVING

    async def _run(self, commands: list[dict[str, Any]]) -> None:
        """A command for each rank, at the same time."""
        pairs = zip(self.receivers, commands, strict=True)
        await asyncio.gather(*(asyncio.to_thread(receiver.run, command) for receiver, command in pairs))


class FakeReplica(rollout_pb2_grpc.RolloutServiceServicer):
    """The service in front of fake engines. It registers itself with a real buffer."""

    def __init__(self, replica_id: str, directory: Path, *, engines: int = 1, ranks: int = 1) -> None:
        self.replica_id = replica_id
        self.engines = [FakeEngine(index, directory, ranks) for index in range(engines)]
        self.fence = 0
        self.beats = True
        self.leaving = False
        self.asked = 0
        """Calls of GetStatus."""
        self._directory = directory
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, buffer: BufferClient) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        for engine in self.engines:
            await engine.start()
        self._server = await rpc.serve(
            "127.0.0.1:0",
            lambda server: rollout_pb2_grpc.add_RolloutServiceServicer_to_server(self, server),
            ["polyhead.v1.RolloutService"],
        )
        self._tasks.append(asyncio.create_task(self._beat(buffer)))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self._server.stop(0)
        for receiver in (each for engine in self.engines for each in engine.receivers):
            receiver.give_back()

    async def add_engine(self) -> FakeEngine:
        """One that joins inside the running replica."""
        engine = FakeEngine(len(self.engines), self._directory, ranks=1)
        await engine.start()
        self.engines.append(engine)
        return engine

    @property
    def serving(self) -> Version | None:
        """The oldest version that an engine serves."""
        return min((each.version for each in self.engines if each.state == pb.REPLICA_STATE_SERVING), default=None)

    def describe(self) -> pb.Replica:
        version, state = self.serving, pb.REPLICA_STATE_DRAINING
        if not self.leaving:
            state = pb.REPLICA_STATE_JOINING if version is None else pb.REPLICA_STATE_SERVING
        return pb.Replica(
            replica_id=self.replica_id,
            role=pb.ROLE_ROLLOUT,
            address=self._server.address,
            state=state,
            weight_version=version.to_proto() if version is not None else None,
            engines=[engine.describe() for engine in self.engines],
        )

    async def _beat(self, buffer: BufferClient) -> None:
        while True:
            if self.beats:
                await buffer.register_replica(self.describe())
            await asyncio.sleep(BEAT_S)

    async def _enter(self, verb: str, request: Any) -> FakeEngine:
        engine = self.engines[request.engine]
        if request.epoch < self.fence:
            raise FencedError(f"epoch {request.epoch} is older than {self.fence}", field="epoch")
        self.fence = request.epoch
        await engine.enter(verb)
        return engine

    async def JoinWeightGroup(self, request: rpb.JoinWeightGroupRequest, context: Any) -> rpb.JoinWeightGroupResponse:
        engine = await self._enter("JoinWeightGroup", request)
        await engine.join(request)
        return rpb.JoinWeightGroupResponse(stages=engine.stages)

    async def LeaveWeightGroup(
        self, request: rpb.LeaveWeightGroupRequest, context: Any
    ) -> rpb.LeaveWeightGroupResponse:
        await self._enter("LeaveWeightGroup", request)
        return rpb.LeaveWeightGroupResponse()

    async def StageUpdate(self, request: rpb.StageUpdateRequest, context: Any) -> rpb.StageUpdateResponse:
        engine = await self._enter("StageUpdate", request)
        return rpb.StageUpdateResponse(buckets=engine.stage(request))

    async def LoadStaged(self, request: rpb.LoadStagedRequest, context: Any) -> rpb.LoadStagedResponse:
        engine = await self._enter("LoadStaged", request)
        await engine.load_staged()
        return rpb.LoadStagedResponse()

    async def BeginUpdate(self, request: rpb.BeginUpdateRequest, context: Any) -> rpb.BeginUpdateResponse:
        engine = await self._enter("BeginUpdate", request)
        engine.begin(request)
        return rpb.BeginUpdateResponse(running_requests=3)

    async def LoadBucket(self, request: rpb.LoadBucketRequest, context: Any) -> rpb.LoadBucketResponse:
        engine = await self._enter("LoadBucket", request)
        await engine.load(request.bucket)
        return rpb.LoadBucketResponse()

    async def CommitUpdate(self, request: rpb.CommitUpdateRequest, context: Any) -> rpb.CommitUpdateResponse:
        engine = await self._enter("CommitUpdate", request)
        engine.commit(Version.from_proto(request.version))
        response = rpb.CommitUpdateResponse(requests_continued=3)
        response.pause.FromMilliseconds(5)
        if "CommitUpdate" in engine.after:
            engine.after["CommitUpdate"]()
        return response

    async def AbortUpdate(self, request: rpb.AbortUpdateRequest, context: Any) -> rpb.AbortUpdateResponse:
        engine = await self._enter("AbortUpdate", request)
        return rpb.AbortUpdateResponse(state=engine.state)

    async def LoadVersion(self, request: rpb.LoadVersionRequest, context: Any) -> rpb.LoadVersionResponse:
        engine = await self._enter("LoadVersion", request)
        engine.load_directory(Path(request.directory))
        engine.commit(Version.from_proto(request.version))
        response = rpb.LoadVersionResponse(requests_continued=3)
        response.pause.FromMilliseconds(5)
        return response

    async def GetStatus(
        self, request: rpb.RolloutServiceGetStatusRequest, context: Any
    ) -> rpb.RolloutServiceGetStatusResponse:
        self.asked += 1
        return rpb.RolloutServiceGetStatusResponse(replica=self.describe())
