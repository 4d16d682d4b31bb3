# ruff: noqa: N802 (the contract names the methods)
"""The trainer's gRPC face and its entry in the registry."""

from __future__ import annotations

import asyncio
import os
from typing import Any, TypeAlias

import grpc

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import trainer_pb2 as tpb
from polyhead.v1 import trainer_pb2_grpc
from services.common import rpc
from services.trainer.status import TrainerStatus

SERVICE_NAME = "polyhead.v1.TrainerService"

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class TrainerService(trainer_pb2_grpc.TrainerServiceServicer):
    """Answers from the status; asks for the end through `stop`."""

    def __init__(self, status: TrainerStatus, stop: asyncio.Event) -> None:
        self._status = status
        self._stop = stop

    async def start(self, address: str) -> rpc.Server:
        """Listens. Raises ConfigError when the address cannot be bound."""
        return await rpc.serve(
            address,
            lambda server: trainer_pb2_grpc.add_TrainerServiceServicer_to_server(self, server),
            [SERVICE_NAME],
        )

    async def GetStatus(
        self, request: tpb.TrainerServiceGetStatusRequest, context: Context
    ) -> tpb.TrainerServiceGetStatusResponse:
        status = self._status
        return tpb.TrainerServiceGetStatusResponse(
            version=status.version.to_proto(),
            phase=status.phase,
            waiting_for=status.waiting_for,
            metrics=status.metrics,
        )

    async def Stop(self, request: tpb.StopRequest, context: Context) -> tpb.StopResponse:
        self._stop.set()
        return tpb.StopResponse()


def describe(replica_id: str, address: str, status: TrainerStatus) -> pb.Replica:
    """The trainer as the registry lists it."""
    return pb.Replica(
        replica_id=replica_id,
        role=pb.ROLE_TRAINER,
        address=address,
        state=pb.REPLICA_STATE_SERVING,
        weight_version=status.version.to_proto(),
        pid=os.getpid(),
        stats={
            "busy_seconds": status.busy_seconds,
            "wait_seconds": status.wait_seconds,
            "uptime_seconds": status.uptime_seconds,
            "steps": float(status.steps),
        },
    )
