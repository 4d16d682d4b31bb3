"""The store on a Redis-protocol server (Redis >= 7.0, Valkey >= 8): every method is one call of one Lua script."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from polyhead.v1 import sample_pb2
from services.buffer.durability import check_durability
from services.buffer.ids import SampleRef
from services.buffer.policy import KEPT_SUBMITS, check_same_run
from services.buffer.records import (
    Extension,
    Fetched,
    Generated,
    ImportedGroup,
    ImportedSample,
    IssuedPrompt,
    Lease,
    LeasedGroup,
    LeasedSample,
    LedgerRecord,
    Letter,
    ListedSample,
    Page,
    Recovered,
    Released,
    Report,
    Requeued,
    Result,
    RunParams,
    SampleFacts,
    Scored,
    StateCount,
    Waiting,
    WatermarkRecord,
)
from services.buffer.redis_scripts import RunMissing, ScriptRunner, StoreFullError
from services.buffer.store import UNBOUNDED, Store
from services.common.versions import Version

_CLOSED_STATES = {
    "consumed": sample_pb2.SAMPLE_STATE_CONSUMED,
    "retired": sample_pb2.SAMPLE_STATE_RETIRED,
    "dropped": sample_pb2.SAMPLE_STATE_DROPPED,
    "dead": sample_pb2.SAMPLE_STATE_DEAD,
}
_LEASED_STATES: dict[int, int] = {
    sample_pb2.STAGE_GENERATE: int(sample_pb2.SAMPLE_STATE_GENERATING),
    sample_pb2.STAGE_SCORE: int(sample_pb2.SAMPLE_STATE_SCORING),
}


class RedisStore(Store):
    """`run_name` is the hash tag of all keys; it comes from the validated configuration."""

    def __init__(self, url: str, *, password: str | None = None, run_name: str) -> None:
        self._scripts = ScriptRunner(url, password, run_name)
        self._params: RunParams | None = None

    @property
    def acknowledged(self) -> int:
        """The highest position that the store has answered with, or that it is held to: when it answers with less, it
        came back without acknowledged writes. That is logged, and counted as lost_after_restart in the ledger.
        """
        return self._scripts.acknowledged

    @acknowledged.setter
    def acknowledged(self, position: int) -> None:
        self._scripts.acknowledged = position

    async def open(self, params: RunParams) -> None:
        body, _ = await self._scripts.run("open", asdict(params))
        if not body["same"]:
            check_same_run(replace(params, **body["had"]), params)
        if self._params is None:
            check_durability(await self._scripts.durability(), self._scripts.where)
        self._params = params

    async def close(self) -> None:
        await self._scripts.close()

    async def used_memory(self) -> int:
        return await self._scripts.used_memory()

    async def issue(self, cursor: int, prompts: Sequence[IssuedPrompt]) -> int:
        ordinals = [each.ordinal for each in prompts]
        body, _ = await self._run("issue", [cursor, ordinals], [each.prompt for each in prompts])
        return int(body[0])

    async def submit(self, request_id: str, prompts: Sequence[bytes]) -> list[int]:
        body, _ = await self._run("submit", [request_id, KEPT_SUBMITS], prompts)
        return list(body)

    async def lease_generate(
        self,
        replica_id: str,
        max_samples: int,
        version: Version,
        *,
        admit: bool,
        request_id: str = "",
        more: bool = False,
        max_bytes: int = UNBOUNDED,
    ) -> Lease:
        arguments = [replica_id, max_samples, *version, admit, request_id, more, max_bytes]
        return _lease(*await self._run("lease_generate", arguments))

    async def lease_score(
        self,
        replica_id: str,
        max_samples: int,
        *,
        payload: bool,
        request_id: str = "",
        max_bytes: int = UNBOUNDED,
    ) -> Lease:
        return _lease(*await self._run("lease_score", [replica_id, max_samples, payload, request_id, max_bytes]))

    async def lease_train(self, epoch: int, step: int, *, payload: bool, max_bytes: int = UNBOUNDED) -> Lease:
        return _lease(*await self._run("lease_train", [epoch, step, payload, max_bytes]), train=True)

    async def fetch(self, refs: Sequence[SampleRef], *, prompts: bool = False) -> list[Fetched]:
        states, blobs = await self._run("fetch", [prompts, refs])
        parts = iter(blobs)
        return [Fetched(state, next(parts), next(parts), next(parts), next(parts)) for state in states]

    async def extend(self, samples: Sequence[Extension]) -> Report:
        rows = [(*each.ref, each.lease_id, each.from_token, each.num_tokens) for each in samples]
        deltas = [each.delta for each in samples]
        if not any(deltas):
            return _report(await self._run("heartbeat", rows, deltas))
        try:
            return _report(await self._run("extend", rows, deltas))
        except StoreFullError:  # no room for the tokens is no reason to lose the leases
            await self._run("heartbeat", [(*each.ref, each.lease_id, 0, 0) for each in samples], [b""] * len(samples))
            raise

    async def complete_generate(self, samples: Sequence[Generated]) -> Report:
        rows = [
            (
                *each.ref,
                each.lease_id,
                each.num_tokens,
                each.completion_tokens,
                each.finish_reason,
                [figure for versions in each.versions for figure in versions],
                each.blobs,
            )
            for each in samples
        ]
        return _report(await self._run("complete_generate", rows, [each.payload for each in samples]))

    async def complete_score(self, samples: Sequence[Scored]) -> Report:
        rows = [(*each.ref, each.lease_id, each.reward, each.verdict, each.verdict_reason) for each in samples]
        return _report(await self._run("complete_score", rows, [each.score for each in samples]))

    async def partials(self, max_groups: int) -> list[LeasedGroup]:
        rows, blobs = await self._run("partials", [max_groups])
        parts = iter(blobs)
        return [_group(row, parts, train=True) for row in rows]

    async def prefer(self, orders: Sequence[int]) -> None:
        await self._run("prefer", [list(dict.fromkeys(orders))])

    async def release(self, stage: int, samples: Sequence[Released]) -> Report:
        state = _LEASED_STATES[stage]
        rows = [
            (
                *each.ref,
                each.lease_id,
                state,
                each.reason,
                each.drop_reason,
                each.error,
                each.tokens_discarded,
                each.discarded_as,
            )
            for each in samples
        ]
        return _report(await self._run("release", rows))

    async def commit_step(self, epoch: int, step: int, batch_lease_id: int, *, trained: bool) -> bool:
        body, _ = await self._run("commit_step", [epoch, step, batch_lease_id, trained])
        return bool(body[0])

    async def publish_version(self, version: Version) -> None:
        await self._run("publish_version", list(version))

    async def watermark(self, epoch: int, step: int) -> WatermarkRecord:
        body, _ = await self._run("watermark", [epoch, step])
        assert self._params is not None, "open comes first"
        return WatermarkRecord(step, body[0], tuple(body[1]), self._params.dataset_digest, self._params.seed)

    async def confirm_checkpoint(self, epoch: int, oldest_kept_step: int) -> int:
        body, _ = await self._run("confirm_checkpoint", [epoch, oldest_kept_step])
        return int(body[0])

    async def acquire_epoch(self, known_epoch: int = 0) -> tuple[int, int]:
        body, _ = await self._run("acquire_epoch", [known_epoch])
        return body[0], body[1]

    async def recover(self, epoch: int, step: int, watermark: WatermarkRecord | None) -> Recovered:
        mark: list[Any] = []
        if watermark is not None:
            mark = [watermark.low_water, watermark.closed, watermark.dataset_digest, watermark.seed]
        body, _ = await self._run("recover", [epoch, step, mark])
        return Recovered(body[0], tuple(body[1]))

    async def register_replica(self, replica_id: str, replica: bytes, ttl_ms: int) -> Version | None:
        body, _ = await self._run("replicas", [replica_id, ttl_ms], [replica])
        return Version(*body) if body[0] else None

    async def list_replicas(self) -> list[bytes]:
        _, blobs = await self._run("replicas", [])
        return blobs

    async def ledger(self, *, admit: bool) -> LedgerRecord:
        body, _ = await self._run("ledger", [admit])
        accepted, counts, epoch, step, pub_epoch, pub_step, cursor, live, limit, waiting, counters = body
        return LedgerRecord(
            accepted,
            sorted(_counts(counts), key=lambda each: (each.state, each.drop_reason)),
            epoch,
            step,
            Version(pub_epoch, pub_step) if pub_epoch else None,
            cursor,
            live,
            limit,
            {int(stage): Waiting(code, tuple(figures)) for stage, (code, *figures) in _items(waiting)},
            dict(_items(counters)),
        )

    async def list_samples(self, state: int, start: int, limit: int) -> Page:
        (rows, following), _ = await self._run("list_samples", [state, start, limit])
        return Page([_listed(row) for row in rows], following)

    async def requeue(self, refs: Sequence[SampleRef]) -> list[Requeued]:
        body, _ = await self._run("requeue", refs)
        return [Requeued(*row) for row in body]

    async def referenced_blobs(self, digests: Sequence[str]) -> set[str]:
        body, _ = await self._run("referenced_blobs", digests)
        return set(body)

    async def import_groups(self, request_id: str, groups: Sequence[ImportedGroup]) -> tuple[list[int], int]:
        rows = [[_imported(sample) for sample in group.samples] for group in groups]
        blobs: list[bytes] = []
        for group in groups:
            blobs.append(group.prompt)
            for sample in group.samples:
                blobs += (sample.payload, sample.score)
        body, _ = await self._run("import_groups", [request_id, KEPT_SUBMITS, rows], blobs)
        return list(body[0]), body[1]

    async def _run(self, name: str, arguments: object, blobs: Sequence[bytes] = ()) -> tuple[Any, list[bytes]]:
        try:
            return await self._scripts.run(name, arguments, blobs)
        except RunMissing:
            assert self._params is not None, "open comes first"
            await self.open(self._params)
            return await self._scripts.run(name, arguments, blobs)


def _items(table: Any) -> list[tuple[Any, Any]]:
    """Items of a Lua table with string keys: an empty one arrives as a list."""
    return list(table.items()) if isinstance(table, dict) else []


def _lease(body: Any, blobs: list[bytes], *, train: bool = False) -> Lease:
    rows, waiting, closed_groups, cursor, wanted, *last = body
    parts = iter(blobs)
    return Lease(
        [_group(row, parts, train=train) for row in rows],
        Waiting(waiting[0], tuple(waiting[1:])) if waiting else None,
        last[0] if train and last else 0,
        closed_groups,
        cursor,
        tuple(wanted),
        not train and any(last),
    )


def _group(row: Any, parts: Iterator[bytes], *, train: bool) -> LeasedGroup:
    order, ordinal, staleness, samples, *judge = row
    prompt, scored = next(parts), train or any(judge)
    leased = [_sample(each, parts, scored=scored) for each in samples]
    return LeasedGroup(order, ordinal, staleness, prompt, leased, any(judge))


def _sample(row: Any, parts: Iterator[bytes], *, scored: bool) -> LeasedSample:
    index, lease_id, attempt, known = row
    facts = _facts(known)
    if scored:
        return LeasedSample(index, lease_id, attempt, facts, payload=next(parts), score=next(parts))
    return LeasedSample(index, lease_id, attempt, facts, partial=next(parts), payload=next(parts))


def _facts(row: Any) -> SampleFacts:
    num_tokens, completion_tokens, finish_reason, epoch, step, reward = row
    return SampleFacts(num_tokens, completion_tokens, finish_reason, Version(epoch, step), float(reward))


def _listed(row: Any) -> ListedSample:
    order, index, attempt, known, letter = row
    return ListedSample(SampleRef(order, index), attempt, _facts(known), Letter(*letter) if letter else None)


def _imported(sample: ImportedSample) -> tuple[Any, ...]:
    versions = [figure for versions in sample.versions for figure in versions]
    scored = sample.reward is not None
    facts = (sample.num_tokens, sample.completion_tokens, sample.finish_reason, versions)
    return *facts, scored, sample.reward or 0.0, sample.blobs


def _report(answer: tuple[Any, list[bytes]]) -> Report:
    results, ready_groups, closed_groups = answer[0]
    return Report([Result(outcome, saved) for outcome, saved in results], ready_groups, closed_groups)


def _counts(counts: Any) -> Iterator[StateCount]:
    """Open states come by number, closed ones by the name of their bitmap: ``dropped:2``."""
    for name, (samples, tokens, lengths) in _items(counts):
        if not samples:
            continue
        state, _, reason = name.partition(":")
        yield StateCount(int(_CLOSED_STATES.get(state) or state), int(reason or 0), samples, tokens, lengths)
