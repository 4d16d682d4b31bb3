"""Takes the records of one group through the engine: one streamed request for all of them, resumed until finished."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing

import structlog

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.errors import InvalidArgumentError
from services.rollout.engines.messages import (
    Chunk,
    EngineRefusedError,
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

# The engine ended the request this often in a row without a token: the sample is at fault.
MAX_FRUITLESS_ABORTS = 5
_ABORT_BACKOFF_S = 0.05

_FINISH = {Finish.STOP: sample_pb2.FINISH_REASON_STOP, Finish.LENGTH: sample_pb2.FINISH_REASON_LENGTH}


class Generator:
    """Generates for groups of records, several at a time.

    `complete` and `release` decide a record's fate; each record meets exactly one of them, unless it was closed by
    somebody else meanwhile. A record that is still open when `run` ends was let go of because the replica is leaving.
    """

    def __init__(
        self,
        replica: Replica,
        prompter: Prompter,
        complete: Callable[[SampleRecord], None],
        release: Callable[[GivenBack], None],
    ) -> None:
        self._replica = replica
        self._prompter = prompter
        self._complete = complete
        self._release = release

    async def run(self, records: Sequence[SampleRecord]) -> None:
        """Returns when every record is closed. Raises EngineUnavailableError: open records keep what had streamed."""
        pending = list(records)
        fruitless = 0
        while pending:
            await self._replica.gate.wait()
            if self._replica.life.leaving:
                return
            if not self._replica.gate.is_set():
                continue
            had = sum(len(record.token_ids) for record in pending)
            version = self._replica.life.version
            try:
                await self._stream(pending)
            except RequestRefusedError as error:
                await self._refused(pending, error)
                return
            pending = [record for record in pending if not record.closed]
            progressed = sum(len(record.token_ids) for record in pending) > had
            fruitless = 0 if progressed or version != self._replica.life.version else fruitless + 1
            if fruitless == MAX_FRUITLESS_ABORTS:
                for record in pending:
                    self._fail(record, f"the engine ended the request {fruitless} times without a token")
                return
            if fruitless:
                await asyncio.sleep(_ABORT_BACKOFF_S * 2**fruitless)

    async def _refused(self, records: Sequence[SampleRecord], error: RequestRefusedError) -> None:
        """A refused batch does not say which of its requests is at fault: each is tried by itself."""
        open_records = [record for record in records if not record.closed]
        if len(records) > 1:
            for record in open_records:
                await self.run([record])
        else:
            for record in open_records:
                self._fail(record, str(error))

    async def _stream(self, records: Sequence[SampleRecord]) -> None:
        client, life = self._replica.client, self._replica.life
        served = life.version
        if served is None:
            raise EngineUnavailableError("it serves no version", field="engine")
        batch = [_request(record, record.begin(served)) for record in records]
        busy = self._replica.stats.busy
        running = len(records)
        busy.started(running)
        try:
            async with aclosing(client.generate(batch, str(served))) as stream:
                async for index, chunk in stream:
                    if chunk.finish is not None:
                        running -= 1
                        busy.ended(1)
                    record = records[index]
                    if not record.closed:
                        await self._take(record, chunk)
        finally:
            busy.ended(running)

    async def _take(self, record: SampleRecord, chunk: Chunk) -> None:
        served = self._replica.life.version
        assert served is not None, "whoever ends serving closes the records first"
        known = len(record.token_ids)
        self._replica.stats.tokens_generated += len(chunk.token_ids)
        try:
            record.extend(chunk, served, self._replica.kv_under)
        except InvalidArgumentError as error:
            self._fail(record, str(error))
            return
        if record.resumed and chunk.token_ids:
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
        elif not self._replica.life.leaving:
            self._replica.stats.requests_aborted += 1

    async def _end_at(self, record: SampleRecord, end: int, finish: Finish | None) -> None:
        """A stop string that began before this request is complete: what came after it goes."""
        record.truncate(end)
        record.finish = sample_pb2.FINISH_REASON_STOP
        self._complete(record)
        if finish is None:
            try:
                await self._replica.client.abort(record.rid)
            except (EngineUnavailableError, EngineRefusedError) as error:
                log.warning("abort_failed", sample_id=record.sample_id, reason=str(error))

    def _fail(self, record: SampleRecord, reason: str) -> None:
        log.warning("sample_failed", sample_id=record.sample_id, reason=reason)
        self._release(
            GivenBack(record, pb.RELEASE_REASON_SAMPLE_ERROR, error=" ".join(reason.split())[:500], keep_partial=False)
        )


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
