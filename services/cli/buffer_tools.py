"""`polyhead buffer ...`: an operator's view of a run's mailboxes, and a hand in them."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.cli import buffer_archive as archive
from services.cli.status import find_run
from services.common.buffer_client import BufferClient
from services.common.config import load
from services.common.errors import ConfigError, LimitError, PolyheadError
from services.common.versions import Version

RETRY_FOR_S = 5.0
PAGE = 256

_console = Console(highlight=False, soft_wrap=True)


def run(arguments: argparse.Namespace) -> int:
    """Runs one tool. Raises the buffer's refusals, and UnavailableError when it does not answer."""
    address, message_mb = _where(arguments)
    return asyncio.run(_run(arguments, address, message_mb))


async def _run(arguments: argparse.Namespace, address: str, message_mb: int) -> int:
    async with BufferClient(address, retry_for_s=RETRY_FOR_S, message_mb=message_mb) as buffer:
        if arguments.tool == "ledger":
            return _print_ledger(await buffer.get_ledger())
        if arguments.tool == "peek":
            await _peek(buffer, arguments.state, _positive(arguments.limit), arguments.chars)
        elif arguments.tool == "dead":
            await _print_dead(buffer, _positive(arguments.limit))
        elif arguments.tool == "requeue":
            return await _requeue(buffer, await _requeueable(buffer) if arguments.all else arguments.ids)
        elif arguments.tool == "export":
            await _export(buffer, arguments.state, arguments.file)
        else:
            await _import(buffer, arguments.file)
    return 0


def _where(arguments: argparse.Namespace) -> tuple[str, int]:
    if arguments.address is not None:
        return arguments.address, 64
    config = load(find_run(arguments.run) / "config.toml")
    return config.buffer.address, config.buffer.limits.message_mb


def _positive(limit: int) -> int:
    if limit < 1:
        raise ConfigError(f"is {limit}, must be at least 1", field="--limit")
    return limit


# Reading


def _print_ledger(ledger: pb.GetLedgerResponse) -> int:
    table = Table("state", "reason", "samples", "completion tokens", "length bias", box=None)
    for row in ledger.counts:
        reason = sample_pb2.DropReason.Name(row.drop_reason).removeprefix("DROP_REASON_") if row.drop_reason else ""
        bias = f"{ledger.length_bias[reason]:.2f}" if reason in ledger.length_bias else ""
        table.add_row(_state(row.state), reason.lower(), str(row.samples), str(row.completion_tokens), bias)
    _console.print(table)
    _console.print(f"accepted {ledger.accepted}, imbalance {ledger.imbalance}")
    for name, count in sorted(ledger.counters.items()):
        _console.print(f"{name} {count}")
    return 1 if ledger.imbalance else 0


async def _samples(buffer: BufferClient, state: str, limit: int | None = None) -> AsyncIterator[list[pb.ListedSample]]:
    """Pages of the samples in a state, `limit` in all."""
    wanted: sample_pb2.SampleState = getattr(sample_pb2, f"SAMPLE_STATE_{state.upper()}")
    token = ""
    while limit is None or limit > 0:
        page = await buffer.list_samples(wanted, min(PAGE, limit or PAGE), token)
        yield list(page.samples)
        token = page.next_page_token
        if not token:
            return
        if limit is not None:
            limit -= len(page.samples)


async def _fetch(buffer: BufferClient, ids: Sequence[str]) -> list[pb.FetchedSample]:
    """Payloads, in as many calls as their sizes need."""
    if not ids:
        return []
    try:
        return list((await buffer.fetch(ids, include_prompt=True)).samples)
    except LimitError:
        if len(ids) == 1:
            raise
    half = len(ids) // 2
    return await _fetch(buffer, ids[:half]) + await _fetch(buffer, ids[half:])


async def _peek(buffer: BufferClient, state: str, limit: int, chars: int) -> None:
    async for page in _samples(buffer, state, limit):
        for listed, fetched in zip(page, await _fetch(buffer, [each.sample_id for each in page]), strict=True):
            _print_sample(listed, fetched, chars)


def _print_sample(listed: pb.ListedSample, fetched: pb.FetchedSample, chars: int) -> None:
    record = listed.record
    facts = [f"attempt {listed.attempt}", f"{record.completion_tokens} completion tokens"]
    spans = [span for delta in fetched.partial for span in delta.spans]
    prompt, text = fetched.prompt, ""
    if fetched.sample:
        sample = sample_pb2.Sample.FromString(fetched.sample)
        facts.append(f"{record.num_tokens} in all")
        facts.append(sample_pb2.FinishReason.Name(sample.finish_reason).removeprefix("FINISH_REASON_").lower())
        spans = [span for segment in sample.segments for span in segment.spans]
        prompt, text = sample.prompt, sample.completion
    if fetched.HasField("score"):
        facts.append(f"reward {fetched.score.reward:g} by {fetched.score.scorer or 'unnamed'}")
    _console.print(f"{listed.sample_id} of {listed.group_id}: {', '.join(facts)}", markup=False)
    if spans:
        _console.print("  spans " + " ".join(_span(span) for span in spans), markup=False)
    for name, words in (("prompt", prompt.text or prompt.messages_json), ("completion", text)):
        if words:
            _console.print(f"  {name} {_short(words, chars)}", markup=False)


def _span(span: sample_pb2.WeightVersionSpan) -> str:
    return f"{Version.from_proto(span.version)}[{span.start}:{span.end}]"


def _short(text: str, chars: int) -> str:
    """On one line, by its beginning."""
    shown = repr(text[:chars])
    return f"{shown} ... {len(text)} characters" if len(text) > chars else shown


async def _print_dead(buffer: BufferClient, limit: int) -> None:
    async for page in _samples(buffer, "dead", limit):
        for each in page:
            died = datetime.fromtimestamp(each.dead.died_unix_ms / 1000, UTC).isoformat(timespec="seconds")
            _console.print(
                f"{each.sample_id}  {died}  attempt {each.attempt}  {each.record.completion_tokens} completion tokens  "
                f"requeue: {_outcome(each.dead.requeue)}  {each.dead.error}",
                markup=False,
            )


def _state(state: sample_pb2.SampleState) -> str:
    return sample_pb2.SampleState.Name(state).removeprefix("SAMPLE_STATE_").lower()


def _outcome(outcome: pb.RequeueOutcome) -> str:
    return pb.RequeueOutcome.Name(outcome).removeprefix("REQUEUE_OUTCOME_").lower()


# Changing


async def _requeueable(buffer: BufferClient) -> list[str]:
    wanted = (pb.REQUEUE_OUTCOME_REQUEUED, pb.REQUEUE_OUTCOME_REISSUED)
    return [each.sample_id async for page in _samples(buffer, "dead") for each in page if each.dead.requeue in wanted]


async def _requeue(buffer: BufferClient, ids: Sequence[str]) -> int:
    """1 when something that was named could not be requeued."""
    outcomes: Counter[str] = Counter()
    for at in range(0, len(ids), PAGE):
        for each in (await buffer.requeue(ids[at : at + PAGE])).results:
            outcomes[_outcome(each.outcome)] += 1
            goes_on = f" in {each.group_id}" if each.group_id else ""
            _console.print(f"{each.sample_id}  {_outcome(each.outcome)}{goes_on}", markup=False)
    _console.print(", ".join(f"{name} {count}" for name, count in sorted(outcomes.items())) or "nothing to requeue")
    return 1 if outcomes.keys() & {"gone", "group_went_on"} else 0


async def _export(buffer: BufferClient, state: str, path: Path) -> None:
    groups = samples = 0
    with archive.writing(path) as write:
        async for group in _groups(buffer, state):
            write(group)
            groups, samples = groups + 1, samples + len(group.samples)
    _console.print(f"{path}: {samples} samples, {groups} groups")


async def _groups(buffer: BufferClient, state: str) -> AsyncIterator[pb.SampleGroup]:
    """Groups with their samples in a state. What has no payload leaves its prompt only."""
    group = pb.SampleGroup()
    async for page in _samples(buffer, state):
        for listed, fetched in zip(page, await _fetch(buffer, [each.sample_id for each in page]), strict=True):
            if listed.group_id != group.group_id:
                if group.HasField("prompt"):
                    yield group
                group = pb.SampleGroup(group_id=listed.group_id)
            _add(group, fetched)
    if group.HasField("prompt"):
        yield group


def _add(group: pb.SampleGroup, fetched: pb.FetchedSample) -> None:
    if fetched.sample:
        sample = sample_pb2.Sample.FromString(fetched.sample)
        group.samples.add(sample=sample, score=fetched.score if fetched.HasField("score") else None)
        group.prompt.CopyFrom(sample.prompt)
    elif fetched.HasField("prompt"):
        group.prompt.CopyFrom(fetched.prompt)


async def _import(buffer: BufferClient, path: Path) -> None:
    """One call a record, named by the file's content and the record's place: to import it again adds nothing."""
    name, imported, submitted = _digest(path), 0, 0
    for number, (where, group) in enumerate(archive.read(path)):
        request_id = f"import-{name}-{number}"
        try:
            if group.samples:
                await buffer.import_groups(request_id, [group])
                imported += 1
            else:
                await buffer.submit(request_id, [group.prompt])
                submitted += 1
        except PolyheadError as error:
            done = f"after {imported} groups and {submitted} prompts"
            raise type(error)(f"{error} ({done})", field=where) from error
    _console.print(f"{path}: {imported} groups, {submitted} prompts")


def _digest(path: Path) -> str:
    archive.check_name(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", field=str(path)) from error
