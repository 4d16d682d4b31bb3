"""The pull loop: leases what the engines have room for, has it generated, and gives back what it cannot finish."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import nullcontext, suppress

import structlog

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.common.errors import PolyheadError
from services.rollout.engines.engine import Engine
from services.rollout.engines.messages import EngineUnavailableError
from services.rollout.generation import ENGINE_END_S, ENGINE_ENDED, Generator
from services.rollout.intake import Intake
from services.rollout.outbox import GivenBack, Outbox
from services.rollout.prompting import Prompter
from services.rollout.records import SampleRecord
from services.rollout.replica import Replica
from services.rollout.room import Room
from services.rollout.samples import SampleBuilder
from services.rollout.saver import Saver

log = structlog.get_logger()

# A poll is never cancelled, or samples leased in that moment would wait for their lease to expire. It is short, because
# it names the version that was served when it began, and gets nothing once a newer one is published.
LEASE_WAIT_S = 0.25
# Room made by samples that finish within this time of each other is filled by one lease.
LINGER_S = 0.004
# One lease costs as much for few samples as for many; but no slot stands empty for longer than this to save one.
IDLE_ROOM_S = 0.05
# After an empty answer, or an error, nothing is asked for this long, unless the replica turns.
_EMPTY_PAUSE_S = 0.1
_ERROR_PAUSE_S = 1.0
# While draining: for the lease that is on its way, for the engine's last tokens, for the buffer.
_DRAIN_LEASE_S = 1.5
_DRAIN_ENGINE_S = 1.0
_DRAIN_BUFFER_S = 2.0


class Worker:
    """Everything a replica does with samples. `run` it beside `drain`; both belong to one event loop."""

    def __init__(self, config: Config, replica: Replica, prompter: Prompter, buffer: BufferClient) -> None:
        settings, limits = config.rollout, config.buffer.limits
        self._replica = replica
        self._buffer = buffer
        self._group_size = config.batch.n_samples_per_prompt
        self._room = Room(replica, settings)
        self._held: dict[str, SampleRecord] = {}
        self._groups: set[asyncio.Task[None]] = set()
        self._lease: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._cool_down = False
        self._one_at_a_time = asyncio.Lock()
        self._saver = Saver(
            buffer,
            replica.replica_id,
            limits,
            settings.save_interval_s,
            replica.stats,
            self._on_lost,
            self._on_refused,
            keep_partials=not config.run.deterministic,
        )
        self._outbox = Outbox(
            buffer,
            replica.replica_id,
            limits,
            self._saver,
            SampleBuilder(prompter, settings.sampling),
            replica.stats,
            lambda: next((engine.info.name for engine in replica.engines if engine.info), ""),
        )
        self._intake = Intake(prompter, self._complete, self._release)
        self._generator = Generator(replica, prompter, self._complete, self._release, anew=config.run.deterministic)
        replica.listeners.append(self._wake.set)
        replica.on_lost.append(self._on_engine_lost)

    @property
    def holding(self) -> int:
        """Samples leased and not yet decided."""
        return len(self._held)

    async def run(self) -> None:
        """Leases and generates until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._saver.run(lambda: self._held.values()))
            tasks.create_task(self._outbox.run())
            tasks.create_task(self._keep_leasing())
            tasks.create_task(self._room.run())

    def give_back(self, reason: pb.ReleaseReason) -> int:
        """Decides every held sample at once: what has streamed in is saved, the sample is released.

        Tokens that arrive later are ignored. Returns the number of samples.
        """
        records = list(self._held.values())
        for record in records:
            self._release(GivenBack(record, reason))
        for group in self._groups:
            group.cancel()
        return len(records)

    async def drain(self) -> int:
        """Stops leasing for good and gives everything back; returns the number of samples given back."""
        self._replica.drain()
        return await self.let_go()

    async def let_go(self) -> int:
        """Gives everything back, with the tokens it has; the replica accepts nothing any more, or for a while."""
        await asyncio.gather(self._end_requests(), self._end_lease())
        returned = self.give_back(pb.RELEASE_REASON_DRAIN)
        if not await self._outbox.drained(_DRAIN_BUFFER_S):
            log.warning("buffer_away_at_drain", samples=returned)
        return returned

    async def _end_requests(self) -> None:
        """Has the engine send what it has not yet streamed."""
        if not self._groups:
            return
        try:
            await self._replica.abort_all(_DRAIN_ENGINE_S)
        except PolyheadError as error:
            log.warning("abort_failed", reason=str(error))
        if self._groups:
            await asyncio.wait(self._groups, timeout=_DRAIN_ENGINE_S)

    async def _end_lease(self) -> None:
        if self._lease is not None:
            await asyncio.wait([self._lease], timeout=_DRAIN_LEASE_S)

    async def _keep_leasing(self) -> None:
        while not self._replica.leaving:
            if self._cool_down:
                self._cool_down = False
                await asyncio.sleep(_ERROR_PAUSE_S)
            self._wake.clear()
            if not self._may_lease():
                await self._wake.wait()
                continue
            await self._gather_room()
            if self._may_lease():
                self._lease = asyncio.create_task(self._lease_once())
                await asyncio.shield(self._lease)

    def _may_lease(self) -> bool:
        capacity = self._room.capacity
        return self._replica.may_generate and capacity - len(self._held) >= min(capacity, self._group_size)

    async def _gather_room(self) -> None:
        """Returns when there is room for a good part of the capacity, or when what there is has been idle for long."""
        deadline = asyncio.get_running_loop().time() + IDLE_ROOM_S
        await asyncio.sleep(LINGER_S)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                while self._room.capacity - len(self._held) < self._room.capacity // 4:
                    self._wake.clear()
                    await self._wake.wait()

    async def _lease_once(self) -> None:
        until = asyncio.get_running_loop().time() + _EMPTY_PAUSE_S
        version = self._replica.version
        try:
            response = await self._buffer.lease(
                sample_pb2.STAGE_GENERATE,
                self._replica.replica_id,
                max_samples=self._room.capacity - len(self._held),
                wait_s=LEASE_WAIT_S,
                include_payload=False,
                weight_version=version,
            )
        except PolyheadError as error:
            log.warning("lease_failed", reason=str(error))
            await asyncio.sleep(_ERROR_PAUSE_S)
            return
        self._saver.heed_ttl(response.lease_ttl.ToTimedelta().total_seconds())
        if response.groups and version is not None:
            self._replica.leased(version)
        for group in response.groups:
            self._accept(group)
        if not response.groups:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), until - asyncio.get_running_loop().time())

    def _accept(self, leased: pb.LeasedGroup) -> None:
        records = self._intake.accept(leased, self._context_length())
        for record in records:
            self._room.lengths.leased(len(record.group.prompt_ids))
            if (earlier := self._held.get(record.sample_id)) is not None:
                self._saver.give_up(earlier)
            self._held[record.sample_id] = record
        if self._replica.letting_go:
            self._release_open(records, pb.RELEASE_REASON_DRAIN, "")
        elif not any(map(self._replica.serves, self._replica.engines)):
            self._release_open(records, pb.RELEASE_REASON_UNAVAILABLE, "")
        elif records:
            self._spawn(self._generate(records))

    def _context_length(self) -> int | None:
        """What fits every engine that a sample may be resumed on."""
        lengths = [engine.info.context_length for engine in self._replica.engines if engine.info is not None]
        return min((length for length in lengths if length is not None), default=None)

    async def _generate(self, records: Sequence[SampleRecord]) -> None:
        try:
            # What has failed before runs beside nothing else that has.
            async with self._one_at_a_time if any(record.attempt for record in records) else nullcontext():
                await self._generator.run(records)
        except EngineUnavailableError as error:
            log.warning("engine_unavailable", samples=len(records), reason=str(error))
            self._cool_down = True
            for engine in self._replica.engines:
                engine.suspect.set()
            await asyncio.sleep(ENGINE_END_S)  # if the process has ended, `_on_engine_lost` decides
            self._release_open(records, pb.RELEASE_REASON_UNAVAILABLE, "")
        except Exception as error:  # a fault of ours must not hold the samples until their leases expire
            log.exception("generation_failed")
            self._release_open(records, pb.RELEASE_REASON_SAMPLE_ERROR, f"{type(error).__name__}: {error}")

    def _release_open(self, records: Sequence[SampleRecord], reason: pb.ReleaseReason, error: str) -> None:
        for record in records:
            if not record.closed:
                self._release(GivenBack(record, reason, error=" ".join(error.split())[:500]))

    def _complete(self, record: SampleRecord) -> None:
        self._room.lengths.completed(len(record.group.prompt_ids) + len(record.token_ids))
        self._close(record)
        self._outbox.complete(record)

    def _release(self, given_back: GivenBack) -> None:
        self._close(given_back.record)
        self._outbox.release(given_back)

    def _on_engine_lost(self, engine: Engine) -> None:
        """With another engine, what this one had is resumed there; without, everything is given back.

        Samples that an engine took with it before their first token are under suspicion of having ended it. One that
        does so each time is dead after `max_attempts` and ends no more engines. Its neighbours survive: they are blamed
        once, and wait from then on for their turn among those that were. Nobody is blamed while waiting, and a sample
        whose turn comes gets tokens, which resets its count.
        """
        if self._replica.serving_without(engine):
            return
        if engine.died:
            for record in [record for record in self._held.values() if record.fruitless]:
                self._release(GivenBack(record, pb.RELEASE_REASON_SAMPLE_ERROR, error=ENGINE_ENDED))
        self.give_back(pb.RELEASE_REASON_UNAVAILABLE)

    def _on_refused(self, record: SampleRecord, error: PolyheadError) -> None:
        self._release(
            GivenBack(record, pb.RELEASE_REASON_SAMPLE_ERROR, error=f"refused: {error}"[:500], keep_partial=False)
        )
        self._spawn(self._abort(record))

    def _on_lost(self, record: SampleRecord) -> None:
        log.warning("lease_lost", sample_id=record.sample_id)
        if not record.closed:
            self._close(record)
            self._spawn(self._abort(record))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._groups.add(task)
        task.add_done_callback(self._groups.discard)

    async def _abort(self, record: SampleRecord) -> None:
        try:
            await self._replica.abort(record.rid)
        except PolyheadError as error:
            log.warning("abort_failed", sample_id=record.sample_id, reason=str(error))

    def _close(self, record: SampleRecord) -> None:
        record.closed = True
        if self._held.get(record.sample_id) is record:
            del self._held[record.sample_id]
        self._wake.set()
