"""Takes the records of one group through the engines: one streamed request for all of them, resumed until finished.

Through a router each sample is a request of its own: what one engine loses is resumed at once, wherever there is room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Self

import structlog

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.errors import InvalidArgumentError, PolyheadError
from services.common.versions import Version
from services.rollout.engines.messages import (
    Chunk,
    EngineUnavailableError,
    Finish,
    GenerateRequest,
    RequestRefusedError,
)
from services.rollout.outbox import GivenBack
from services.rollout.prompting import Prompter
from services.rollout.records import SampleRecord
from services.rollout.replica import Replica

log = structlog.get_logger()

# The engine ended the request, or lost it, this often in a row without a token.
MAX_FRUITLESS = 5
_BACKOFF_S = 0.05
# A broken stream is the first sign of an engine process that has ended; the kernel reports the end a moment later.
ENGINE_END_S = 0.5
ENGINE_ENDED = "the engine ended while generating this sample"

_FINISH = {Finish.STOP: sample_pb2.FINISH_REASON_STOP, Finish.LENGTH: sample_pb2.FINISH_REASON_LENGTH}


class Generator:
    """Generates for groups of records, several at a time.

    `complete` and `release` decide a record's fate; each record meets exactly one of them, unless it was closed by
    somebody else meanwhile. A record that is still open when `run` ends was let go of because the replica is leaving or
    yields.
    """

    def __init__(
        self,
        replica: Replica,
        prompter: Prompter,
        complete: Callable[[SampleRecord], None],
        release: Callable[[GivenBack], None],
        *,
        anew: bool = False,
    ) -> None:
        """With `anew`, a completion that an engine did not finish begins again at its first token: the KV cache of
        resumed tokens is computed in other shapes, so that the last bits of what follows would differ.
        """
        self._anew = anew
        self._replica = replica
        self._prompter = prompter
        self._complete = complete
        self._release = release

    async def run(self, records: Sequence[SampleRecord]) -> None:
        """Returns when every record is closed. Raises EngineUnavailableError: open records keep what had streamed."""
        if self._replica.router is None:
            await self._run(records)
            return
        async with asyncio.TaskGroup() as tasks:
            for record in records:
                tasks.create_task(self._by_itself(record))

    async def _by_itself(self, record: SampleRecord) -> None:
        """Whatever goes wrong with one sample ends none of its siblings."""
        try:
            await self._run([record])
        except Exception as error:
            log.exception("generation_failed", sample_id=record.sample_id)
            if not record.closed:
                self._fail(record, f"{type(error).__name__}: {error}")

    async def _run(self, records: Sequence[SampleRecord]) -> None:
        pending = list(records)
        fruitless = 0
        while pending:
            await self._replica.gate.wait()
            if self._replica.letting_go:
                return
            # Decided by somebody else meanwhile: nobody would want its tokens.
            pending = [record for record in pending if not record.closed]
            if not self._replica.gate.is_set() or not pending:
                continue
            if self._anew:
                self._begin_again(pending)
            had, deaths, newest = _tokens(pending), self._replica.deaths, self._replica.newest
            try:
                lost = await self._stream(pending)
            except RequestRefusedError as error:
                await self._refused(pending, error)
                return
            except EngineUnavailableError as error:
                if self._replica.router is None:
                    raise
                log.warning("request_lost", sample_id=pending[0].sample_id, reason=str(error))
                lost = pending
            if lost:
                await self._blame([record for record in lost if record.fruitless], deaths)
            pending = [record for record in pending if not record.closed]
            moved = _tokens(pending) > had or newest != self._replica.newest
            fruitless = 0 if moved else fruitless + 1
            if fruitless == MAX_FRUITLESS:
                self._give_up(pending, lost=bool(lost))
                return
            if fruitless:
                await asyncio.sleep(_BACKOFF_S * 2**fruitless)

    def _begin_again(self, records: Sequence[SampleRecord]) -> None:
        for record in records:
            self._replica.stats.discarded["begun_again"] += record.unsaved
            record.truncate(record.saved)

    def _give_up(self, records: Sequence[SampleRecord], *, lost: bool) -> None:
        """A sample that the engine ends time after time is at fault itself; one that is lost time after time is not."""
        for record in records:
            if lost:
                self._release(GivenBack(record, pb.RELEASE_REASON_UNAVAILABLE))
            else:
                self._fail(record, f"the engine ended the request {MAX_FRUITLESS} times without a token")

    async def _blame(self, records: Sequence[SampleRecord], deaths: int) -> None:
        """Samples that an engine took with it before their first token are under suspicion of having ended it."""
        for engine in self._replica.engines:
            if self._replica.in_rotation(engine) and not engine.paused:
                engine.suspect.set()
        deadline = asyncio.get_running_loop().time() + ENGINE_END_S
        while records and self._replica.deaths == deaths and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_BACKOFF_S)
        if self._replica.deaths > deaths:
            for record in records:
                if not record.closed:
                    self._release(GivenBack(record, pb.RELEASE_REASON_SAMPLE_ERROR, error=ENGINE_ENDED))

    async def _refused(self, records: Sequence[SampleRecord], error: RequestRefusedError) -> None:
        """A refused batch does not say which of its requests is at fault: each is tried by itself."""
        open_records = [record for record in records if not record.closed]
        if len(records) > 1:
            for record in open_records:
                await self._run([record])
        else:
            for record in open_records:
                self._fail(record, str(error))

    async def _stream(self, records: Sequence[SampleRecord]) -> list[SampleRecord]:
        """The records whose stream broke."""
        replica, sent = self._replica, self._replica.version
        if sent is None:
            raise EngineUnavailableError("it serves no version", field="engine")
        batch = [_request(record, record.begin(sent)) for record in records]
        replica.stats.tokens_recomputed += _tokens(records)
        lost: list[SampleRecord] = []
        with _Sent(replica, len(records)) as requests:
            async with aclosing(replica.generate(batch, replica.salt)) as stream:
                async for index, chunk in stream:
                    requests.heard(index, chunk)
                    if chunk.finish is Finish.LOST:
                        log.warning("request_lost", sample_id=records[index].sample_id, reason=chunk.message)
                        lost.append(records[index])
                    elif not records[index].closed:
                        await self._take(records[index], self._whole(chunk), sent)
        return [record for record in lost if not record.closed]

    def _whole(self, chunk: Chunk) -> Chunk:
        """Without the tokens that come with the end of a request on an engine whose weights are torn."""
        torn = any(engine.life.state == pb.REPLICA_STATE_QUARANTINED for engine in self._replica.engines)
        if not torn or chunk.finish is not Finish.ABORT or not chunk.token_ids:
            return chunk
        self._replica.stats.discarded["quarantined"] += len(chunk.token_ids)
        return replace(chunk, token_ids=[], logprobs=[], total=chunk.total - len(chunk.token_ids), spans=None)

    async def _take(self, record: SampleRecord, chunk: Chunk, sent: Version) -> None:
        known = len(record.token_ids)
        self._replica.stats.tokens_generated += len(chunk.token_ids)
        try:
            record.extend(chunk, self._replica.oldest or sent, self._replica.arrival_of)
        except InvalidArgumentError as error:
            self._replica.stats.discarded["refused"] += len(chunk.token_ids)
            self._fail(record, str(error))
            return
        except EngineUnavailableError:
            record.truncate(known)
            raise
        if chunk.token_ids:
            # An engine sees only its own request, and one without a tokenizer no text at all.
            end = self._prompter.stop_end(record.token_ids, known)
            if end is not None:
                await self._end_at(record, end, chunk.finish)
                return
        match chunk.finish:
            case Finish.STOP | Finish.LENGTH as finish:
                record.finish = _FINISH[finish]
                self._complete(record)
            case Finish.ABORT:
                self._ended_early(record)
            case Finish.ERROR:
                self._fail(record, f"engine: {chunk.message}")

    def _ended_early(self, record: SampleRecord) -> None:
        """The engine ended the request; perhaps with its last token."""
        record.finish = self._prompter.ended(record.token_ids, record.token_limit)
        if record.finish != sample_pb2.FINISH_REASON_UNSPECIFIED:
            self._complete(record)
        elif not self._replica.letting_go:
            self._replica.stats.requests_aborted += 1

    async def _end_at(self, record: SampleRecord, end: int, finish: Finish | None) -> None:
        """A stop string is complete that the engine may not have seen: what came after it goes."""
        self._replica.stats.discarded["past_stop"] += len(record.token_ids) - end
        record.truncate(end)
        record.finish = sample_pb2.FINISH_REASON_STOP
        self._complete(record)
        if finish is None:
            try:
                await self._replica.abort(record.rid)
            except PolyheadError as error:
                log.warning("abort_failed", sample_id=record.sample_id, reason=str(error))

    def _fail(self, record: SampleRecord, reason: str) -> None:
        log.warning("sample_failed", sample_id=record.sample_id, reason=reason)
        self._release(
            GivenBack(record, pb.RELEASE_REASON_SAMPLE_ERROR, error=" ".join(reason.split())[:500], keep_partial=False)
        )


class _Sent:
    """Counts the requests of one batch, from being sent to their first token, and to their end."""

    def __init__(self, replica: Replica, requests: int) -> None:
        self._replica = replica
        self._running = set(range(requests))
        self._unstarted = set(range(requests))

    def __enter__(self) -> Self:
        self._replica.stats.busy.started(len(self._running))
        self._replica.unstarted += len(self._unstarted)
        return self

    def __exit__(self, *exc: object) -> None:
        self._replica.stats.busy.ended(len(self._running))
        self._replica.unstarted -= len(self._unstarted)

    def heard(self, index: int, chunk: Chunk) -> None:
        if index in self._unstarted and (chunk.token_ids or chunk.finish):
            self._unstarted.remove(index)
            self._replica.unstarted -= 1
        if index in self._running and chunk.finish:
            self._running.remove(index)
            self._replica.stats.busy.ended(1)


def _tokens(records: Sequence[SampleRecord]) -> int:
    return sum(len(record.token_ids) for record in records)


def _request(record: SampleRecord, rid: str) -> GenerateRequest:
    sampling = record.sampling
    return GenerateRequest(
        rid=rid,
        input_ids=[*record.group.prompt_ids, *record.token_ids],
        max_new_tokens=record.token_limit - len(record.token_ids),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        sampling_seed=sampling.sampling_seed,
    )
