"""The verdict on a finished run. It compares what clients were acknowledged with what the store and the trainer kept,
and believes none of the services' own counters.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
from redis.asyncio import Redis

from polyhead.v1 import sample_pb2
from services.buffer import partials
from services.buffer.ids import sample_id
from tests.kit import valkey
from tests.kit.faults import witness
from tests.kit.runs import Run, surviving

PENDING, GENERATING, GENERATED, SCORING, SCORED = range(1, 6)
OPEN_STATES = range(1, 8)
CLOSED = {"consumed", "retired", "dropped", "dead"}
# Where a sample may be of which this was acknowledged.
STATES_AFTER = {"generated": CLOSED.union(range(GENERATED, 8)), "scored": CLOSED.union(range(SCORED, 8))}
# Places in a sample's record in the store: `common.lua` has them, counted from 1.
_STATE, _SAVED, _SCORE_LEASE = 0, 4, 12


@dataclass
class Kept:
    """What the store holds, read from its keys: the state of each sample, and how many it says it has accepted."""

    states: dict[str, list[int | str]]
    """More than one state is a violation."""
    accepted: int
    partials: dict[str, bytes] = field(default_factory=dict)
    """Saved completion tokens of samples that are not complete, int32 little-endian."""


@dataclass
class Verdict:
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """What did not go as it should, and lost nothing."""
    imbalance: int = 0
    """Accepted minus those in exactly one state."""
    steps: int = 0
    acknowledged: Counter[str] = field(default_factory=Counter)
    """Lines of the outside ledger by kind."""
    closed: Counter[str] = field(default_factory=Counter)
    """Samples by closed state: a fault may make some dead, and the reader is to see how many."""

    @property
    def clean(self) -> bool:
        return not (self.lost or self.doubled or self.failed or self.imbalance)

    def __str__(self) -> str:
        lines = [f"lost {len(self.lost)}, doubled {len(self.doubled)}, imbalance {self.imbalance}, steps {self.steps}"]
        return "\n".join([*lines, *self.lost[:20], *self.doubled[:20], *self.failed[:20]])


def judge_run(run: Run, directory: Path) -> Verdict:
    """`run` has ended. `directory` is that of its fault points."""
    kept = asyncio.run(_read_store(run.dir / "store"))
    return judge(witness.read(directory / "witness"), run.steps(), kept)


def judge(lines: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]], kept: Kept) -> Verdict:
    """`lines` are the outside ledger's, `metrics` the trainer's, one for each time a step was trained."""
    verdict = Verdict(acknowledged=Counter(line["kind"] for line in lines))
    # A trainer that was frozen while another took over may record its last step late.
    history = surviving(sorted(_kept(metrics, lines), key=lambda line: line["epoch"]))
    verdict.steps = max(history, default=0)
    verdict.closed = Counter(state for states in kept.states.values() for state in states if isinstance(state, str))
    verdict.imbalance = kept.accepted - sum(len(states) == 1 for states in kept.states.values())
    _check_history(history, verdict)
    _check_states(lines, history, kept, verdict)
    _check_completions(lines, kept, verdict)
    _check_scores(lines, verdict)
    _check_batches(lines, history, verdict)
    _check_pushes(lines, verdict)
    return verdict


def _kept(metrics: Iterable[Mapping[str, Any]], lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Without the steps that a later trainer undid: when a run broke off, it may not have trained them again."""
    forks = [(line["epoch"], line["step"]) for line in lines if line["kind"] == "recovered"]
    return [line for line in metrics if not any(epoch > line["epoch"] and step < line["step"] for epoch, step in forks)]


def _check_history(history: Mapping[int, Mapping[str, Any]], verdict: Verdict) -> None:
    """The surviving steps are 1..N, and no group is in two of them."""
    verdict.lost += [
        f"step {step} is in no surviving history" for step in range(1, verdict.steps) if step not in history
    ]
    seen: dict[str, int] = {}
    for step in sorted(history):
        for group in history[step]["group_ids"]:
            if group in seen:
                verdict.doubled.append(f"{group} trained in steps {seen[group]} and {step}")
            seen[group] = step


def _check_states(
    lines: Iterable[Mapping[str, Any]], history: Mapping[int, Mapping[str, Any]], kept: Kept, verdict: Verdict
) -> None:
    """What was acknowledged is still there, in one state."""
    for name, states in kept.states.items():
        if len(states) > 1:
            verdict.doubled.append(f"{name} is {states}")
    for line in lines:
        if (wanted := STATES_AFTER.get(line["kind"])) is None:
            continue
        states = kept.states.get(line["id"], [])
        if not wanted.intersection(states):
            verdict.lost.append(f"{line['id']} was acknowledged as {line['kind']} and is {states}")
    trained = {group for step in history.values() for group in step["group_ids"]}
    for name, states in kept.states.items():
        closed = bool({"consumed", "retired"}.intersection(states))
        # A dead sample of a group that went on is no part of it.
        if (name.partition("-")[0] in trained) != closed and "dead" not in states:
            verdict.lost.append(f"{name} is {states}, the trainer's history says otherwise")


def _check_completions(lines: Iterable[Mapping[str, Any]], kept: Kept, verdict: Verdict) -> None:
    """One completion for a sample, and every token that had been acknowledged is in its place in it."""
    completions: dict[str, bytes] = {}
    digests: dict[str, str] = {}
    fresh: Counter[str] = Counter()
    for line in lines:
        if line["kind"] != "generated":
            continue
        completions[line["id"]] = bytes.fromhex(line["tokens"])
        fresh[line["id"]] += line["outcome"] == "OUTCOME_OK"
        if digests.setdefault(line["id"], line["digest"]) != line["digest"]:
            verdict.doubled.append(f"{line['id']} was completed with two contents")
    verdict.doubled += [f"{name} was completed {count} times" for name, count in fresh.items() if count > 1]
    for line in lines:
        if line["kind"] != "saved":
            continue
        name, tokens, start = line["id"], bytes.fromhex(line["tokens"]), 4 * line["from"]
        whole = completions.get(name)
        if whole is None and {PENDING, GENERATING}.intersection(kept.states.get(name, [])):
            whole = kept.partials.get(name, b"")
        if whole is not None and whole[start : start + len(tokens)] != tokens:
            verdict.lost.append(f"{name}: tokens {line['from']}.. were acknowledged and are not there")


def _check_scores(lines: Iterable[Mapping[str, Any]], verdict: Verdict) -> None:
    """One score for a sample, and it is the one that was trained."""
    rewards: dict[str, float] = {}
    fresh: Counter[str] = Counter()
    for line in lines:
        if line["kind"] == "scored":
            rewards[line["id"]] = line["reward"]
            fresh[line["id"]] += line["outcome"] == "OUTCOME_OK"
    verdict.doubled += [f"{name} was scored {count} times" for name, count in fresh.items() if count > 1]
    for line in lines:
        for name, (_, reward) in line["samples"].items() if line["kind"] == "leased" else ():
            if rewards.get(name, reward) != reward:
                verdict.doubled.append(f"{name} was scored {rewards[name]} and leased with {reward}")


def _check_batches(
    lines: Iterable[Mapping[str, Any]], history: Mapping[int, Mapping[str, Any]], verdict: Verdict
) -> None:
    """What was trained is what was generated; a step that was committed has the batch that was leased."""
    generated = {line["id"]: line["digest"] for line in lines if line["kind"] == "generated"}
    for line in lines:
        if line["kind"] != "leased":
            continue
        for name, (digest, _) in line["samples"].items():
            if generated.get(name, digest) != digest:
                verdict.doubled.append(f"{name} was leased for step {line['step']} with another content")
    newest: dict[int, Mapping[str, Any]] = {}
    for line in lines:
        if line["kind"] == "committed" and line["epoch"] >= newest.get(line["step"], line)["epoch"]:
            newest[line["step"]] = line
    for step, line in newest.items():
        groups = {name.partition("-")[0] for name in line["ids"]}
        if step in history and groups != set(history[step]["group_ids"]):
            verdict.doubled.append(f"step {step}: committed {sorted(groups)}, recorded {history[step]['group_ids']}")


def _check_pushes(lines: Iterable[Mapping[str, Any]], verdict: Verdict) -> None:
    """No replica takes over a version of an epoch that was superseded when it had one of a later epoch."""
    newest: dict[str, int] = {}
    for line in lines:
        if line["kind"] != "pushed":
            continue
        if line["epoch"] < newest.get(line["by"], 0):
            verdict.doubled.append(
                f"{line['by']} took over e{line['epoch']}.s{line['step']} after a later epoch's version"
            )
        newest[line["by"]] = line["epoch"]


async def _read_store(directory: Path) -> Kept:
    with valkey.running(directory=directory, appendfsync="always") as server:
        redis = Redis(unix_socket_path=str(server.socket_path), protocol=2)
        try:
            return await _read_keys(redis)
        finally:
            await redis.aclose()


async def _read_keys(redis: Redis) -> Kept:
    (meta_key,) = await redis.keys("*:meta")
    prefix = meta_key[: -len(b"meta")]
    run = msgpack.unpackb(await redis.get(meta_key), strict_map_key=False)
    states: dict[str, list[int | str]] = defaultdict(list)
    saved: dict[str, bytes] = {}
    for index in ("fresh", "live", "bound", "rejected"):
        for member in await redis.zrange(prefix + index.encode(), 0, -1):
            group = msgpack.unpackb(await redis.get(prefix + b"g:%d" % int(member)), strict_map_key=False, raw=True)
            for place, sample in enumerate(group[b"samples"]):
                if sample[_STATE] not in OPEN_STATES:
                    continue
                name = sample_id(int(member), place)
                judged = sample[_STATE] == SCORING and sample[_SCORE_LEASE] > 0
                states[name].append(SCORED if judged else sample[_STATE])
                if sample[_SAVED] > 0:
                    saved[name] = _tokens(await redis.get(prefix + b"d:%d:%d" % (int(member), place)) or b"")
    async for key in redis.scan_iter(match=prefix.replace(b"[", b"\\[") + b"b:*"):
        name = key.rpartition(b":b:")[2].decode().partition(":")[0]
        for serial in _bits(await redis.get(key)):
            states[sample_id(*divmod(serial, run["group_size"]))].append(name)
    return Kept(dict(states), run["accepted"], saved)


def _tokens(partial: bytes) -> bytes:
    """The completion tokens of a partial sample."""
    return b"".join(sample_pb2.TokenDelta.FromString(delta).token_ids for delta in partials.split(partial))


def _bits(bitmap: bytes) -> list[int]:
    """Places of the ones; place 0 is the highest bit of the first byte."""
    return [8 * at + bit for at, byte in enumerate(bitmap) for bit in range(8) if byte & (0x80 >> bit)]
