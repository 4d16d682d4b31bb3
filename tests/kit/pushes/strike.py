"""One fault: armed, struck, recovered from, and what it cost everybody else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.kit.faults.points import Points
from tests.kit.pushes.canaries import checksum
from tests.kit.pushes.pusher import FENCED
from tests.kit.pushes.scene import PusherProcess, Scene, freeze
from tests.kit.pushes.steps import Fault

REACH_S = 30.0
SHORT_S = 0.7
# On top of a deadline: this machine's cores are shared.
NOISE_S = 2.0
# A push that failed says so to its replica with two more calls of at most this.
FAREWELL_S = 2.0
# Beyond this, an engine that nobody struck has stopped serving.
SERVING_S = 5.0


@dataclass
class Outcome:
    fault: Fault
    reached: bool = False
    recovered_s: float = 0.0
    """From the strike until every engine serves the newest version."""
    others_gap_s: float = 0.0
    """Longest between two answers of the engine that was not struck, meanwhile."""
    lag_s: float = 0.0
    """How late the witness itself was meanwhile, at most."""
    unled_gap_s: float = 0.0
    """The same of any engine whose trainer was struck."""
    rpc_s: float = 0.0
    """The longest call of a trainer that ran all the while."""
    push_s: float = 0.0
    """The longest push to one engine, whether it succeeded or failed."""
    failed_pushes: int = 0
    next_push_s: float = 0.0
    """Until every engine serves the version that is offered after all that."""
    next_failed: int = 0
    """Attempts at that one which failed."""
    states: set[str] = field(default_factory=set)
    """Of the engine that was pushed to."""
    engine_restarted: bool = False
    fenced: bool = False
    violations: list[str] = field(default_factory=list)


class Striker:
    """`checksums`: of each model, by replica, as an engine says that has loaded it."""

    def __init__(self, scene: Scene, checksums: Sequence[Sequence[str]]) -> None:
        self._scene, self._checksums = scene, checksums

    async def strike(self, fault: Fault) -> Outcome:
        """Raises AssertionError when the system does not come back."""
        scene, outcome = self._scene, Outcome(fault)
        engine = scene.engine(fault.replica)
        assert engine is not None, "it served a moment ago"
        trainer = scene.trainer
        victims = {"trainer": [trainer.pid], "replica": [scene.replicas[fault.replica].pid], "engine": engine.pids}
        pids = victims[fault.victim]
        since, lines = time.time(), {id(trainer): len(trainer.lines)}
        points = self._arm(fault, pids)
        async with self._watching(outcome):
            trainer.push(scene.next_model())
            if not await self._reached(points, fault):
                scene.check()
                await scene.until_served()
                return outcome
            struck, outcome.reached = time.monotonic(), True
            await self._aftermath(fault, trainer, pids, outcome)
            await scene.until_served()
        served = time.monotonic()
        outcome.recovered_s = served - struck
        outcome.lag_s = scene.lag.longest(struck)
        gaps = [canary.longest_gap(struck, served) for canary in scene.canaries]
        if fault.victim == "trainer":
            outcome.unled_gap_s = max(gaps)
        else:
            outcome.others_gap_s = max(gap for number, gap in enumerate(gaps) if number != fault.replica)
            if outcome.others_gap_s > SERVING_S:
                outcome.violations.append(f"an engine that was not struck did not answer for {outcome.others_gap_s} s")
        present = scene.engine(fault.replica)
        outcome.engine_restarted = present is None or present.pid != engine.pid
        for pusher in {id(each): each for each in (trainer, scene.trainer)}.values():
            self._deadlines(pusher, lines.get(id(pusher), 0), since, outcome)
        await self._next_push(outcome)
        return outcome

    def _arm(self, fault: Fault, pids: Sequence[int]) -> Points:
        scene = self._scene
        points = scene.trainer.points if fault.at == "trainer" else scene.replicas[fault.replica].points
        if fault.broken:
            scene.trainer.points.arm(fault.broken, "fail")
        whom = "" if fault.at == fault.victim else " ".join(["", *map(str, pids)])
        points.arm(fault.point, fault.signal + whom)
        return points

    async def _reached(self, points: Points, fault: Fault) -> bool:
        deadline = time.monotonic() + REACH_S
        while points.is_armed(fault.point) and time.monotonic() < deadline:
            assert fault.victim == "trainer" or not self._scene.trainer.over, self._scene.trainer.lines[-3:]
            await asyncio.sleep(0.005)
        if fault.broken:
            self._scene.trainer.points.disarm(fault.broken)
        return not points.disarm(fault.point)

    async def _aftermath(self, fault: Fault, trainer: PusherProcess, pids: Sequence[int], outcome: Outcome) -> None:
        scene = self._scene
        if fault.signal == "kill":
            if fault.victim == "trainer":
                await asyncio.wait_for(trainer.process.wait(), REACH_S)
                if fault.long:
                    await asyncio.sleep(scene.timeout_s + 1.0)
                    await self._settled(outcome)
                await scene.take_over()
            return
        began = time.time()
        try:
            if fault.superseded:
                await scene.take_over()
                await scene.until_served()
            else:
                await asyncio.sleep(scene.timeout_s + 2.0 if fault.long else SHORT_S)
        finally:
            freeze(pids, on=False)
            if fault.victim == "trainer":
                trainer.frozen.append((began, time.time()))
        if fault.superseded:
            await self._fenced(trainer, outcome)

    async def _settled(self, outcome: Outcome) -> None:
        """No trainer has been there for longer than the deadline: whole versions are served, or nothing."""
        left = [each.state for each in await self._scene.states() if each is not None]
        if not set(left) <= {"SERVING", "QUARANTINED"}:
            outcome.violations.append(f"without a trainer, engines were left {left}")

    async def _fenced(self, trainer: PusherProcess, outcome: Outcome) -> None:
        """A trainer that was superseded goes on, and is told to push once more."""
        commits = len(trainer.said("committed"))
        trainer.push(0)
        status = await asyncio.wait_for(trainer.process.wait(), self._scene.back_s)
        assert trainer.reading is not None
        await trainer.reading
        outcome.fenced = status == FENCED
        if not outcome.fenced:
            outcome.violations.append(f"superseded, it ended with {status}: {trainer.lines[-3:]}")
        if len(trainer.said("committed")) > commits:
            outcome.violations.append("superseded, it committed a step")

    async def _next_push(self, outcome: Outcome) -> None:
        scene, trainer = self._scene, self._scene.trainer
        model, offered, before = scene.next_model(), len(trainer.said("version")), len(trainer.lines)
        trainer.push(model)
        version = await trainer.until_says("version", offered + 1, REACH_S)
        outcome.next_push_s = await scene.until_served()
        pushes = [line["pushed"] for line in trainer.lines[before:] if "pushed" in line]
        outcome.next_failed = sum(not each["ok"] and each["version"] == version for each in pushes)
        for replica, sums in enumerate(self._checksums):
            engine = scene.engine(replica)
            assert engine is not None, "it served a moment ago"
            if await checksum(engine) != sums[model]:
                outcome.violations.append(f"the weights of rollout-{replica}'s engine are not those of {version}")

    def _deadlines(self, pusher: PusherProcess, first: int, since: float, outcome: Outcome) -> None:
        timeout_s = self._scene.timeout_s
        for line in pusher.lines[first:]:
            if "rpc" in line and not _asleep(pusher, line["began"], line["ended"]):
                outcome.rpc_s = max(outcome.rpc_s, line["ended"] - line["began"])
            if "pushed" in line:
                said: dict[str, Any] = line["pushed"]
                outcome.failed_pushes += not said["ok"]
                if not _asleep(pusher, said["time"] - said["seconds"], said["time"]):
                    outcome.push_s = max(outcome.push_s, said["seconds"])
        if outcome.rpc_s > timeout_s + NOISE_S:
            outcome.violations.append(f"an RPC of the push took {outcome.rpc_s} s")
        # What went before the call that failed took less than one deadline, since it was held up only once.
        if outcome.push_s > 2 * timeout_s + 2 * FAREWELL_S + NOISE_S:
            outcome.violations.append(f"a push took {outcome.push_s} s")

    @asynccontextmanager
    async def _watching(self, outcome: Outcome) -> Any:
        async def watch() -> None:
            while True:
                state = (await self._scene.states())[outcome.fault.replica]
                outcome.states.add("no answer" if state is None else state.state)
                await asyncio.sleep(0.05)

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


def _asleep(pusher: PusherProcess, began: float, ended: float) -> bool:
    """Whether the trainer was stopped for some of this time."""
    return any(start < ended and began < end for start, end in pusher.frozen)
