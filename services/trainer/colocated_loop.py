"""The training loop of colocated mode: the trainer leads, and the engines have the GPUs while it waits for a batch.

Yield → train → copy the weights into buckets → off-load → push → Resume. The trainer's own memory goes before the
engines take theirs, so that a GPU never holds more than the engine and one set of buckets.
"""

from __future__ import annotations

import time
from typing import Any

from polyhead.v1 import buffer_pb2 as pb
from services.common.versions import Version
from services.trainer.loop import Loop
from services.trainer.metrics import Times
from services.trainer.turns import Turns


class ColocatedLoop(Loop):
    """Everything that concerns the GPUs happens on the training thread, in order."""

    def __init__(self, *arguments: Any, turns: Turns, offload: bool, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._turns = turns
        self._offload = offload

    def run(self, step: int) -> int:
        """As `Loop.run`. Engines that an earlier trainer has left asleep get the weights of committed `step`."""
        self._take(None)
        return super().run(step)

    def _lease(self, step: int, times: Times) -> pb.LeaseResponse | None:
        lease = super()._lease(step, times)
        if lease is None:
            return None
        began = time.monotonic()
        with self._s.status.waiting("yielding"):
            self._s.status.waiting_for = pb.WaitingFor(reason="the rollout replicas to yield their GPUs")
            taken = self._take(None)
        if taken:
            self._s.backend.wake()
        times.yield_s = time.monotonic() - began
        return lease if taken else None

    def _publish(self, version: Version) -> None:
        """Pushes to every replica that has yielded, and has them go on."""
        backend = self._s.backend
        snapshot = self._s.io.call_or_stop(self._s.publisher.take_snapshot(backend.layout))
        if snapshot is None:
            return
        snapshot.fill(backend.tensors())
        if self._offload:
            backend.sleep()
        self._s.io.call(self._s.publisher.offer(version, snapshot))
        del snapshot  # its memory is the engines' from here on
        self._s.io.call_or_stop(self._s.publisher.withdraw())
        self._s.io.call_or_stop(self._turns.give_back())

    def _await_published(self, version: Version) -> None:
        while not self._s.io.should_stop() and not self._s.publisher.has_published(version):
            asked = time.monotonic()
            self._attend(version)
            self._pause(asked)

    def _attend(self, version: Version) -> None:
        """Engines that came, or came back, while the trainer has nothing to do get their weights in a turn of their
        own: the others go on.
        """
        behind = self._s.io.call_or_stop(self._turns.behind(version))
        if behind and self._take(behind):
            self._publish(version)

    def _take(self, replicas: list[pb.Replica] | None) -> bool:
        """False when a stop is requested first."""
        return bool(self._s.io.call_or_stop(self._turns.take(replicas)))
