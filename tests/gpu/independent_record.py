"""Which weights made each token, found without asking the engine: teacher forcing over the KV cache as it really was.

The positions that a version computed keep its keys and values when the next one arrives in place. So the log-probs of
a completion follow from its tokens and the places where the version turned; the claimed places are compared with
those around them, and the engine's own log-probs decide.
"""

from __future__ import annotations

import asyncio
import statistics
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.versions import Version
from services.rollout.engines.client import EngineClient
from services.rollout.engines.messages import GenerateRequest
from services.rollout.records import Arrival, Group, SampleRecord

REQUESTS, GROUP, LENGTH, PROMPT = 32, 8, 480, 8
# Tokens that a version generates before the next one arrives.
TURN_EVERY = 110
# Places tried on either side of each claimed one, and the tokens that decide between them.
SHIFTS = range(-8, 3)
WINDOW = 16
# Records whose turns are looked for: a forward pass for each place that is tried.
JUDGED = 8
UPDATE_LIMIT_S = 60.0


Bring = Callable[[int], Awaitable[Version]]
"""Brings the engine to the weights of this number, while it generates: the version that they are."""


async def measure(url: str, key: str, models: Sequence[Path]) -> dict[str, Any]:
    """Generates across the versions that `models` hold, brought from disk in place, and checks every record."""
    async with EngineClient(url, key) as client:

        async def bring(number: int) -> Version:
            version = Version(1, number)
            if number:
                await client.pause("in_place")
            await client.update_from_disk(
                str(models[number]), version=str(version), flush=not number, timeout_s=UPDATE_LIMIT_S
            )
            if number:
                await client.resume()
            return version

        records, late = await generate(client, len(models), bring)
    loaded = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).cuda().eval() for path in models]
    return verify(records, loaded) | {"overlap_schedule": late}


async def generate(client: EngineClient, versions: int, bring: Bring) -> tuple[list[SampleRecord], bool]:
    """Records of requests that run across `versions` of the weights, and whether the schedule overlaps."""
    late = (await client.server_info()).overlapped
    served = await bring(0)
    first = Arrival(sample_pb2.KV_ORIGIN_FRESH, late=False)
    later = Arrival(sample_pb2.KV_ORIGIN_CARRIED, late=late)
    start = served
    records = [_record(number) for number in range(REQUESTS)]

    async def generate(group: Sequence[SampleRecord]) -> None:
        batch = [_request(record, record.begin(served)) for record in group]
        async for index, chunk in client.generate(batch, str(served)):
            group[index].extend(chunk, served, lambda version: first if version == start else later)

    groups = [records[start : start + GROUP] for start in range(0, REQUESTS, GROUP)]
    running = [asyncio.create_task(generate(group)) for group in groups]
    for turn in range(1, versions):
        while min(len(record.token_ids) for record in records) < turn * TURN_EVERY:
            if ended := [task for task in running if task.done()]:
                await asyncio.gather(*ended)
                raise RuntimeError(f"requests ended before version {turn} came")
            await asyncio.sleep(0.005)
        served = await bring(turn)
    await asyncio.gather(*running)
    return records, late


def _record(number: int) -> SampleRecord:
    prompt = [100 + 7 * number + place for place in range(PROMPT)]
    leased = pb.LeasedSample(sample_id=f"s{number}", lease_id=1)
    sampling = sample_pb2.SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, sampling_seed=number)
    return SampleRecord(Group(f"g{number}", sample_pb2.Prompt(), prompt), leased, sampling, LENGTH)


def _request(record: SampleRecord, rid: str) -> GenerateRequest:
    return GenerateRequest(
        rid=rid,
        input_ids=list(record.group.prompt_ids),
        max_new_tokens=record.token_limit,
        temperature=1.0,
        top_p=1.0,
        top_k=-1,
        stop=[],
        stop_token_ids=[],
        sampling_seed=record.sampling.sampling_seed,
    )


def verify(records: Sequence[SampleRecord], loaded: Sequence[PreTrainedModel]) -> dict[str, Any]:
    """`loaded`: the model of each version, in their order."""
    shifts: Counter[int] = Counter()
    errors: list[float] = []
    for record in records:
        claimed = [span.start for span in record.spans[1:]]
        assert len(record.spans) == len(loaded), record.spans
        errors += _errors(record, loaded, claimed)
    for record in records[:: max(1, len(records) // JUDGED)]:
        claimed = [span.start for span in record.spans[1:]]
        for turn in range(len(claimed)):
            shifts[_true_shift(record, loaded, claimed, turn)] += 1
    return {
        "requests": len(records),
        "tokens": sum(len(record.token_ids) for record in records),
        "turns": sum(shifts.values()),
        "true_minus_claimed_place": {str(shift): count for shift, count in sorted(shifts.items())},
        "logprob_error_mean": statistics.fmean(errors),
        "logprob_error_max": max(errors),
    }


def _true_shift(record: SampleRecord, loaded: Sequence[PreTrainedModel], claimed: Sequence[int], turn: int) -> int:
    """How far from the claimed place the version really turned: where the error around it is least."""
    near = slice(max(0, claimed[turn] - WINDOW), claimed[turn] + WINDOW)
    total = {}
    for shift in SHIFTS:
        places = [place + shift * (number == turn) for number, place in enumerate(claimed)]
        total[shift] = sum(_errors(record, loaded, places)[near])
    return min(total, key=lambda shift: (total[shift], abs(shift)))


@torch.no_grad()
def _errors(record: SampleRecord, loaded: Sequence[PreTrainedModel], places: Sequence[int]) -> list[float]:
    """|engine's log-prob − teacher-forced log-prob| of each token, if the version had turned at `places`."""
    prompt, tokens = list(record.group.prompt_ids), record.token_ids
    ids = torch.tensor([prompt + tokens], device=loaded[0].device)
    cache = DynamicCache()
    logprobs = []
    bounds = [0, *places, len(tokens)]
    for model, start, end in zip(loaded, bounds[:-1], bounds[1:], strict=True):
        # The forward pass that samples token k has token k - 1 as its input.
        first = 0 if start == 0 else len(prompt) + start - 1
        logits = model(ids[:, first : len(prompt) + end - 1], past_key_values=cache, use_cache=True).logits[0]
        targets = ids[0, len(prompt) + start : len(prompt) + end, None]
        logprobs.append(torch.log_softmax(logits[-(end - start) :].float(), -1).gather(1, targets)[:, 0])
    engine = torch.tensor(record.logprobs, device=loaded[0].device)
    return (torch.cat(logprobs) - engine).abs().tolist()
