"""Sample records fed by a real engine across weight updates, and the judge of what they claim."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.versions import Version
from services.rollout.engines.client import EngineClient, PauseModeName, sampling_params
from services.rollout.engines.messages import Finish, GenerateRequest
from services.rollout.records import Arrival, Group, SampleRecord
from tests.kit.engine_process import ADMIN_KEY, EngineApi
from tests.kit.engine_push import Channel
from tests.kit.hf_reference import Segment, teacher_forced_by_segments

WAIT_S = 30.0
# SGLang aborts the ids of a stream once more two seconds after it has ended: none is used twice on one engine.
_leases = itertools.count(1)


class Writing:
    """One record and the requests that fill it, at temperature 1, resumed when the engine aborts them."""

    def __init__(self, rig: RecordRig, number: int, prompt: Sequence[int], limit: int) -> None:
        sample_id = f"g{number:08}-000"
        group = Group(f"g{number:08}", sample_pb2.Prompt(), list(prompt))
        leased = pb.LeasedSample(sample_id=sample_id, lease_id=next(_leases))
        self.record = SampleRecord(group, leased, sample_pb2.SamplingParams(), limit)
        self.requests = 0
        self.early: dict[int, Version] = {}
        """Token -> the version that it was stamped with when it had just come."""
        self._rig, self._number = rig, number
        self._news = asyncio.Event()
        self._start = 0
        self.task = asyncio.create_task(self._write())

    async def has(self, tokens: int) -> None:
        """Waits until the request that runs has brought so many tokens."""
        await self._until(lambda: len(self.record.token_ids) - self._start >= tokens)

    async def gets(self, more: int) -> None:
        """Waits until the record has so many tokens more than at the time of the call."""
        wanted = len(self.record.token_ids) + more
        await self._until(lambda: len(self.record.token_ids) >= wanted)

    async def resumed(self) -> None:
        """Waits until a second request has brought a token."""
        await self._until(lambda: self.requests == 2 and len(self.record.token_ids) > self._start)

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                assert not self.task.done(), "the request has ended"
                self._news.clear()
                await self._news.wait()

    async def _write(self) -> None:
        record, finish = self.record, Finish.ABORT
        while finish is Finish.ABORT and not self._rig.ending:
            self._start = len(record.token_ids)
            request = self._request()
            async with aclosing(self._rig.client.generate([request], str(self._rig.served))) as stream:
                async for _, chunk in stream:
                    known = len(record.token_ids)
                    record.extend(chunk, self._rig.served, self._rig.arrivals.__getitem__)
                    self.early |= {at: version for at, version in enumerate(versions(record)) if at >= known}
                    finish = chunk.finish or finish
                    self._news.set()

    def _request(self) -> GenerateRequest:
        record, self.requests = self.record, self.requests + 1
        return GenerateRequest(
            rid=record.begin(self._rig.served),
            input_ids=[*record.group.prompt_ids, *record.token_ids],
            max_new_tokens=record.token_limit - len(record.token_ids),
            temperature=1.0,
            top_p=1.0,
            top_k=-1,
            stop=[],
            stop_token_ids=[],
            sampling_seed=self._number,
        )


class RecordRig:
    """A replica's bookkeeping around one engine: what is served, and how each version arrived."""

    def __init__(self, client: EngineClient, overlapped: bool, references: dict[str, Any]) -> None:
        self.client, self._overlapped, self._references = client, overlapped, references
        self.served = Version(1, 0)
        self.arrivals: dict[Version, Arrival] = {}
        self.ending = False
        self.writings: list[Writing] = []
        self._weights: dict[Version, str] = {}

    def write(self, prompt: Sequence[int], limit: int) -> Writing:
        self.writings.append(Writing(self, len(self.writings), prompt, limit))
        return self.writings[-1]

    async def load(self, name: str, directory: Path) -> None:
        """A first version, before anything runs."""
        await self._update(name, "in_place", directory, None)

    async def update(
        self, name: str, mode: PauseModeName, directory: Path | None = None, channel: Channel | None = None
    ) -> None:
        """Brings the weights `name` as the next version, over the channel or from the directory, mid-flight."""
        for writing in self.writings:
            if not writing.task.done():
                await writing.has(1)  # as a replica does before it pauses
        await self._update(name, mode, directory, channel)

    async def _update(self, name: str, mode: PauseModeName, directory: Path | None, channel: Channel | None) -> None:
        version = Version(1, self.served.step + 1)
        carried, flush = mode == "in_place", mode == "retract"
        await self.client.pause(mode)
        if channel is not None:
            await channel.push(self._references[name], str(version), flush=flush)
        else:
            await self.client.update_from_disk(str(directory), version=str(version), flush=flush, timeout_s=WAIT_S)
        kv = sample_pb2.KV_ORIGIN_CARRIED if carried else sample_pb2.KV_ORIGIN_FRESH
        self.arrivals[version] = Arrival(kv, late=carried and self._overlapped)
        self._weights[version] = name
        self.served = version
        await self.client.resume()

    async def end(self) -> None:
        """Ends what still runs."""
        self.ending = True
        await self.client.abort_all()
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(*(writing.task for writing in self.writings))

    def worst_error(self, writing: Writing) -> float:
        """The largest difference of a log-prob from that of the very version the record names, in nats."""
        record = writing.record
        segments = [
            Segment(
                self._references[self._weights[span.version]],
                span.start,
                span.end,
                span.kv == sample_pb2.KV_ORIGIN_CARRIED,
            )
            for span in record.spans
        ]
        expected = teacher_forced_by_segments(segments, list(record.group.prompt_ids), record.token_ids)
        return max(abs(a - b) for a, b in zip(record.logprobs, expected, strict=True))


def versions(record: SampleRecord) -> list[Version]:
    """The version of each token."""
    return [span.version for span in record.spans for _ in range(span.start, span.end)]


@asynccontextmanager
async def recording(api: EngineApi, references: dict[str, Any], stream_interval: int) -> AsyncIterator[RecordRig]:
    """Requests stream that many tokens an event, and never end by themselves."""

    def endless(request: GenerateRequest) -> dict[str, Any]:
        return {**sampling_params(request), "ignore_eos": True, "stream_interval": stream_interval}

    with patch("services.rollout.engines.client.sampling_params", endless):
        async with EngineClient(api.url, ADMIN_KEY) as client:
            info = await client.server_info()
            rig = RecordRig(client, info.overlapped, references)
            try:
                yield rig
            finally:
                for writing in rig.writings:
                    writing.task.cancel()
                await asyncio.gather(*(writing.task for writing in rig.writings), return_exceptions=True)
