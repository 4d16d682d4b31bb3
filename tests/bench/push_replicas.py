"""The other end of `bench_push`: replicas and the registry that names them, in one process. ``push_replicas.py N DIR``.

Says the registry's address, then answers each line of its input ("staged" or "direct": how engines take weights) with
one, and leaves at the end of its input.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import torch

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import buffer_pb2_grpc
from services.common import rpc
from services.common.buffer_client import BufferClient
from services.common.weight_group import WeightGroup
from tests.kit.trainer_replica import FakeEngine, FakeReplica, Receiver


class Registry(buffer_pb2_grpc.BufferServiceServicer):
    """As much of a buffer as a push asks for. It takes every version as published."""

    def __init__(self) -> None:
        self.replicas: dict[str, pb.Replica] = {}

    async def RegisterReplica(self, request: pb.RegisterReplicaRequest, context: Any) -> pb.RegisterReplicaResponse:
        self.replicas[request.replica.replica_id] = request.replica
        return pb.RegisterReplicaResponse()

    async def ListReplicas(self, request: pb.ListReplicasRequest, context: Any) -> pb.ListReplicasResponse:
        return pb.ListReplicasResponse(replicas=self.replicas.values())

    async def PublishVersion(self, request: pb.PublishVersionRequest, context: Any) -> pb.PublishVersionResponse:
        return pb.PublishVersionResponse()


class Member(Receiver):
    """In this process: the groups of different engines have different names."""

    def __init__(self) -> None:
        self._group: WeightGroup | None = None

    @classmethod
    def take(cls) -> Member:
        return cls()

    def give_back(self) -> None:
        self.kill()

    def kill(self) -> None:
        if self._group is not None:
            self._group.close()

    def run(self, command: dict[str, Any]) -> None:
        if "join" in command:
            self._group = WeightGroup(**command["join"])
        else:
            assert self._group is not None
            flat = torch.empty(command["receive"], dtype=torch.uint8)
            self._group.broadcast(flat)
            Path(command["to"]).write_bytes(flat.numpy().tobytes())


async def main(count: int, directory: Path) -> None:
    torch.set_num_threads(1)
    FakeEngine.member = Member
    server = await rpc.serve(
        "127.0.0.1:0",
        lambda server: buffer_pb2_grpc.add_BufferServiceServicer_to_server(Registry(), server),
        ["polyhead.v1.BufferService"],
    )
    buffer = BufferClient(server.address)
    replicas = [FakeReplica(f"rollout-{index}", directory / str(index)) for index in range(count)]
    for replica in replicas:
        await replica.start(buffer)
        await buffer.register_replica(replica.describe())
    print(server.address, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        for replica in replicas:
            replica.engines[0].stages = line.strip() == "staged"
        print(flush=True)
    for replica in replicas:
        await replica.stop()
    await buffer.close()
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), Path(sys.argv[2])))
