"""The puller: leases generated samples, has them scored, and sends the verdicts back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import structlog
from google.protobuf.message import DecodeError

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.common.errors import LimitError, PolyheadError, UnavailableError
from services.common.payloads import fetch_payloads
from services.reward.items import item_of_group, item_of_sample
from services.reward.jobs import Job
from services.reward.outbox import RETRY_S, Outbox
from services.reward.scorers.base import WholeItem
from services.reward.settling import Settler
from services.reward.station import Station
from services.reward.stats import Stats
from services.reward.whole import fetch_members

log = structlog.get_logger()

# A poll is never cancelled, or samples leased in that moment would wait for their lease to expire. It is short, because
# a replica that leaves waits for its last one.
POLL_S = 0.5
_LAST_POLL_S = 1.5
# After a lease, generation is given this long to finish more: one call for many samples. A synchronous trainer waits
# for each sample, so there it is short.
GATHER_S = 0.03
SYNC_GATHER_S = 0.003
# A poll that comes back empty sooner than this was not a long poll; the next one waits.
_SHORT_POLL_S = 0.2
# Samples that wait for a scorer which hangs come on top of `reward.max_inflight`, up to so many times as many.
_MOST_HELD_BACK = 3
# On stop, what is being scored gets this long to finish, and the buffer as long again to take the rest.
DRAIN_S = 2.0


class Puller:
    """Keeps up to `reward.max_inflight` samples leased. `run` once."""

    def __init__(self, buffer: BufferClient, station: Station, replica_id: str, config: Config, stats: Stats) -> None:
        limits = config.buffer.limits
        self._buffer = buffer
        self._station = station
        self._replica_id = replica_id
        self._max_inflight = config.reward.max_inflight
        self._limits = limits
        self._samples_per_rpc = limits.samples_per_rpc
        self._gather_s = GATHER_S if config.staleness.max_staleness else SYNC_GATHER_S
        self._lease_ttl_s = config.buffer.lease_ttl_s
        self._leased: dict[int, tuple[str, Job | None]] = {}
        """By lease, until the buffer has answered for it: its sample, and the job, which the samples of a group share
        that is judged or scored as a whole. None while it is being fetched."""
        self._poll: asyncio.Task[pb.LeaseResponse] | None = None
        """On its way, or answered with samples that are not in `_leased` yet."""
        self._settled = asyncio.Event()
        self._has_leased = asyncio.Event()
        self._outbox = Outbox(buffer, replica_id, samples_per_rpc=limits.samples_per_rpc, on_settled=self._forget)
        self._settler = Settler(self._outbox, stats, scorer=station.scorer, is_held=self._leased.__contains__)

    async def run(self, stop: asyncio.Event) -> None:
        """Works until `stop` is set, then finishes or gives back what it holds.

        Raises the buffer's refusals (InvalidArgumentError and the like); outages are waited out.
        """
        stopping: asyncio.Task[Any] = asyncio.create_task(stop.wait())
        sender = asyncio.create_task(self._outbox.run())
        others = [asyncio.create_task(self._pull()), asyncio.create_task(self._keep_leases())]
        try:
            await asyncio.wait({stopping, sender, *others}, return_when=asyncio.FIRST_COMPLETED)
            for task in (sender, *others):
                if task.done():
                    task.result()
            for task in others:
                task.cancel()
            await self._hold_last_poll()
            await self._drain()
        finally:
            ending: list[asyncio.Task[Any]] = [stopping, sender, *others]
            if self._poll is not None:
                ending.append(self._poll)
            for task in ending:
                task.cancel()
            await asyncio.gather(*ending, return_exceptions=True)

    async def _pull(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            room = await self._room()
            if not self._station.available.is_set():
                await self._station.available.wait()
                continue  # what may be leased now is another question
            begun = loop.time()
            try:
                response = await self._ask(room)
            except (UnavailableError, LimitError) as error:
                log.warning("lease_failing", reason=str(error))
                await asyncio.sleep(RETRY_S)
                continue
            self._lease_ttl_s = response.lease_ttl.ToNanoseconds() / 1e9 or self._lease_ttl_s
            taken = await self._take(response)
            if 0 < taken < room:
                await asyncio.sleep(self._gather_s)
            elif not taken and loop.time() - begun < _SHORT_POLL_S:
                await asyncio.sleep(_SHORT_POLL_S)

    async def _ask(self, room: int) -> pb.LeaseResponse:
        lease = self._buffer.lease
        self._poll = asyncio.create_task(
            lease(sample_pb2.STAGE_SCORE, self._replica_id, max_samples=room, wait_s=POLL_S, include_payload=False)
        )
        response = await asyncio.shield(self._poll)
        self._hold(response)
        return response

    def _hold(self, response: pb.LeaseResponse) -> None:
        self._leased |= {
            sample.lease_id: (sample.sample_id, None) for group in response.groups for sample in group.samples
        }
        self._poll = None
        if self._leased:
            self._has_leased.set()

    async def _hold_last_poll(self) -> None:
        """What a poll that was on its way on stop leases is given back with the rest."""
        if self._poll is not None:
            with contextlib.suppress(PolyheadError, TimeoutError):
                self._hold(await asyncio.wait_for(self._poll, _LAST_POLL_S))

    async def _room(self) -> int:
        """How many samples may be leased now. Waits for a quarter of the whole, not for each single place."""
        while (room := self._most() - len(self._leased)) < max(1, self._max_inflight // 4):
            self._settled.clear()
            await self._settled.wait()
        return min(room, self._samples_per_rpc, self._station.room or room)

    def _most(self) -> int:
        """A scorer that hangs must not fill all places with its samples."""
        return self._max_inflight + min(self._station.held_back, _MOST_HELD_BACK * self._max_inflight)

    async def _take(self, response: pb.LeaseResponse) -> int:
        """Hands what was leased to the station, as it is fetched. Returns how many samples were leased."""
        whole: list[pb.LeasedGroup] = []
        each: list[pb.LeasedGroup] = []
        for group in response.groups:
            (whole if self._station.scores_whole and not group.judge else each).append(group)
        await self._take_whole(whole)
        await self._take_each(each)
        return sum(len(group.samples) for group in response.groups)

    async def _take_each(self, groups: Sequence[pb.LeasedGroup]) -> None:
        """Groups whose samples are scored one by one, and groups to be judged."""
        group_of = {sample.lease_id: group for group in groups for sample in group.samples}
        samples = [sample for group in groups for sample in group.samples]
        try:
            async for fetched in fetch_payloads(self._buffer, samples, self._limits):
                alone = [sample for sample in fetched if not group_of[sample.lease_id].judge]
                self._station.submit(
                    [job for sample in alone for job in self._take_sample(sample, group_of[sample.lease_id])]
                )
        except PolyheadError as error:
            log.warning("fetch_failing", reason=str(error))
            for sample in samples:
                if not sample.sample and not group_of[sample.lease_id].judge:
                    reason = f"it could not be fetched: {error}"
                    self._settler.give_back(sample.sample_id, sample.lease_id, pb.RELEASE_REASON_UNAVAILABLE, reason)
            await asyncio.sleep(RETRY_S)
        self._station.submit([job for group in groups if group.judge for job in self._take_group(group)])

    async def _take_whole(self, groups: Sequence[pb.LeasedGroup]) -> None:
        """Groups whose samples are scored together."""
        for place, group in enumerate(groups):
            try:
                members = await fetch_members(self._buffer, group, self._limits)
            except PolyheadError as error:
                log.warning("fetch_failing", reason=str(error))
                for each in groups[place:]:
                    self._settler.give_back_group(each, f"it could not be fetched: {error}")
                await asyncio.sleep(RETRY_S)
                return
            self._station.submit(self._job_of_whole(group, members))

    def _take_sample(self, leased: pb.LeasedSample, group: pb.LeasedGroup) -> list[Job]:
        """The job of scoring a sample; none when it cannot be read, or its lease was lost while it was fetched."""
        sample = self._read(leased)
        if sample is None or leased.lease_id not in self._leased:
            return []
        item = item_of_sample(sample, group, tokens=self._station.wants_tokens)
        job = Job(item, partial(self._settler.on_result, leased))
        self._leased[leased.lease_id] = (leased.sample_id, job)
        return [job]

    def _job_of_whole(self, group: pb.LeasedGroup, members: Sequence[pb.LeasedSample]) -> list[Job]:
        """The job of scoring a group, siblings without a lease included; none when no leased sample can be read."""
        read = [(member, sample) for member in members if (sample := self._read(member)) is not None]
        scored = [member for member, _ in read]
        leased = [member for member in scored if member.lease_id in self._leased]
        if not leased:
            return []
        tokens = self._station.wants_tokens
        item = WholeItem(group.group_id, [item_of_sample(sample, group, tokens=tokens) for _, sample in read])
        job = Job(item, partial(self._settler.on_whole, scored))
        for member in leased:
            self._leased[member.lease_id] = (member.sample_id, job)
        return [job]

    def _read(self, leased: pb.LeasedSample) -> sample_pb2.Sample | None:
        """Gives it back when it cannot be read."""
        try:
            if not leased.sample:
                raise DecodeError("the buffer has no payload of it that fits into a message")
            return sample_pb2.Sample.FromString(leased.sample)
        except DecodeError as error:
            if leased.lease_id:
                self._settler.give_back(
                    leased.sample_id, leased.lease_id, pb.RELEASE_REASON_FATAL, f"not a Sample: {error}"
                )
            return None

    def _take_group(self, group: pb.LeasedGroup) -> list[Job]:
        """The job of judging a group; none when that is settled at once."""
        if not self._station.judges:
            self._settler.settle_group(group, pb.GROUP_VERDICT_KEEP)
            return []
        if not all(leased.sample for leased in group.samples):
            self._settler.give_back_group(group, "its samples could not be fetched")
            return []
        job = Job(item_of_group(group), partial(self._settler.on_judged, group))
        for leased in group.samples:
            if leased.lease_id in self._leased:
                self._leased[leased.lease_id] = (leased.sample_id, job)
        return [job]

    def _forget(self, lease_ids: Sequence[int]) -> None:
        for lease_id in lease_ids:
            self._leased.pop(lease_id, None)
        self._settled.set()

    async def _keep_leases(self) -> None:
        """The heartbeat. A lease that is lost is not worked on any longer."""
        await self._has_leased.wait()  # only now is the buffer's own ttl known
        while True:
            await asyncio.sleep(self._lease_ttl_s / 3)
            held = list(self._leased.items())
            for start in range(0, len(held), self._samples_per_rpc):
                await self._extend(held[start : start + self._samples_per_rpc])

    async def _extend(self, held: list[tuple[int, tuple[str, Job | None]]]) -> None:
        request = [pb.ExtendedSample(sample_id=sample_id, lease_id=lease_id) for lease_id, (sample_id, _) in held]
        try:
            response = await self._buffer.extend(self._replica_id, request)
        except PolyheadError as error:
            log.warning("heartbeat_failing", reason=str(error))
            return
        for (lease_id, (_, job)), result in zip(held, response.results, strict=True):
            if result.outcome in (pb.OUTCOME_LEASE_LOST, pb.OUTCOME_GONE) and lease_id in self._leased:
                log.info("lease_lost", sample_id=result.sample_id)
                self._forget([lease_id])
                if job is not None:
                    # Others of its group may still be held.
                    job.cancelled = not any(held_job is job for _, held_job in self._leased.values())

    async def _drain(self) -> None:
        await self._wait_until_settled()
        on_their_way = self._outbox.lease_ids()
        unfinished = [(lease_id, *held) for lease_id, held in self._leased.items() if lease_id not in on_their_way]
        for lease_id, sample_id, job in unfinished:
            if job is not None:
                job.cancelled = True
            self._settler.give_back(sample_id, lease_id, pb.RELEASE_REASON_DRAIN, "the replica is leaving")
        if self._leased:
            await self._wait_until_settled()
        log.info("drained", given_back=len(unfinished), left_behind=len(self._leased))

    async def _wait_until_settled(self) -> None:
        """Until the buffer has answered for every lease, or for DRAIN_S."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while self._leased:
                    self._settled.clear()
                    await self._settled.wait()
