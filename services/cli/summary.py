"""What a finished run leaves behind: summary.json, curve.png, report.html."""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.cli.observe import Observer
from services.common.config import Config

# The first and the last steps that reward_first and reward_last average over.
FIRST_STEPS = 20
LAST_STEPS = 50
_DISCARDED = "tokens_discarded."
# Tokens that a replica dropped before they were part of a sample, or whose sample was somebody else's by then.
_NEVER_IN_THE_BUFFER = ("lease_lost", "past_stop", "quarantined", "refused")


def write_results(config: Config, seen: Observer, started: float) -> None:
    """Writes the summary and, where matplotlib is installed, the report with its curves."""
    summary = summarise(config, seen, wall_s=time.time() - started)
    path = config.run.dir / "summary.json"
    path.write_bytes(orjson.dumps(summary, option=orjson.OPT_INDENT_2) + b"\n")
    lines = [seen.steps[step] for step in sorted(seen.steps)]
    try:
        from services.cli import report
    except ModuleNotFoundError as error:
        print(f"{path} (no report: {error.name} is not installed)")
        return
    engine = engine_phrase(summary["engine"])
    report.write(config.run.dir, summary, engine, lines)
    print(
        f"reward {summary['reward_first']:.3f} → {summary['reward_last']:.3f} in {summary['steps']} steps, "
        f"{summary['wall_s']:.0f} s on {engine}; {path.parent / 'report.html'}"
    )


def engine_phrase(engine: Mapping[str, Any]) -> str:
    """The summary's `engine` in words, for example: sglang/0.5.23, 2 engines behind a router."""
    names = engine["name"] if isinstance(engine["name"], list) else [engine["name"] or "no engine that was seen"]
    count = f", {engine['engines']} engines" if engine["engines"] > 1 else ""
    replicas = f" in each of {engine['replicas']} replicas" if engine["replicas"] > 1 else ""
    return " and ".join(names) + count + (" behind a router" if engine["router"] else "") + replicas


def summarise(config: Config, seen: Observer, *, wall_s: float) -> dict[str, Any]:
    """The run in one JSON object.

    Figures are of the whole history of the run directory, resumed parts included; `wall_s`, `bubble` of rollout and
    reward, `processes`, `engine` and the tokens discarded as `replica_lost` are of this launcher alone. The ledger is
    null when the buffer could not be asked.
    """
    steps = [seen.steps[step] for step in sorted(seen.steps)]
    staleness = Counter[str]()
    for line in steps:
        staleness.update(line["staleness"])
    pauses = [1000 * push["pause_s"] for push in seen.pushes if push["ok"]]
    ledger = seen.ledger if seen.complete else None
    counters = ledger.counters if ledger is not None else {}
    discarded = _discarded(counters, seen, seen.tokens_lost)
    training_s = sum(line["step_s"] for line in steps)
    trained_tokens = sum(line["completion_tokens"] for line in steps)
    return {
        "reward_first": _mean([line["reward_mean"] for line in steps[:FIRST_STEPS]]),
        "reward_last": _mean([line["reward_mean"] for line in steps[-LAST_STEPS:]]),
        "steps": len(steps),
        "wall_s": round(wall_s, 1),
        "install_s": _install_seconds(),
        "weight_pushes": len(pauses),
        "push_pause_ms": {"p50": _median(pauses), "max": max(pauses, default=0.0)},
        "weight_push_failures": sum(not push["ok"] for push in seen.pushes),
        "requests_aborted": int(sum(push["requests_aborted"] for push in seen.pushes)),
        "staleness": {steps: staleness[steps] for steps in sorted(staleness, key=int)},
        "max_staleness": max((int(steps) for steps in staleness), default=0),
        "length_bias": dict(ledger.length_bias) if ledger is not None else None,
        "bubble": _bubble(seen, steps),
        "ledger": _ledger(ledger) if ledger is not None else None,
        "ledger_imbalance": ledger.imbalance if ledger is not None else None,
        "tokens_generated": int(counters.get("tokens_generated", 0)),
        "tokens_discarded": sum(discarded.values()),
        "tokens_discarded_by_reason": discarded,
        "tokens_per_s": round(counters.get("tokens_generated", 0) / max(training_s, 1e-9), 1),
        "training_s": round(training_s, 1),
        "overlap": round(sum(line["overlap_tokens"] for line in steps) / max(1, trained_tokens), 4),
        "multi_span_samples": sum(line["multi_span_samples"] for line in steps),
        "mismatch_kl": _mean([line["mismatch_kl"] for line in steps[-LAST_STEPS:]]),
        "mismatch_kl_fresh": _mean(
            [line["mismatch_kl_fresh"] for line in steps if line.get("mismatch_kl_fresh") is not None][-LAST_STEPS:]
        ),
        "step_s": _median([line["step_s"] for line in steps]),
        "engine": _engine(seen),
        "processes": {"launcher": [os.getpid()], **seen.pids},
        "config": str(config.run.dir / "config.toml"),
    }


def _ledger(ledger: pb.GetLedgerResponse) -> dict[str, Any]:
    """Samples accepted, then samples by state; the dropped ones by reason."""
    names = {value: name.removeprefix("SAMPLE_STATE_").lower() for name, value in sample_pb2.SampleState.items()[1:]}
    states: dict[str, Any] = {"accepted": ledger.accepted, **dict.fromkeys(names.values(), 0), "dropped": {}}
    for row in ledger.counts:
        if row.state == sample_pb2.SAMPLE_STATE_DROPPED:
            reason = sample_pb2.DropReason.Name(row.drop_reason).removeprefix("DROP_REASON_").lower()
            states["dropped"][reason] = row.samples
        else:
            states[names[row.state]] = row.samples
    return states


def _discarded(counters: Mapping[str, float], seen: Observer, lost: int) -> dict[str, int]:
    """Tokens by reason. Of a replica that vanished it is what its last heartbeat said, about a second before."""
    by_reason = {
        name.removeprefix(_DISCARDED): int(tokens) for name, tokens in counters.items() if name.startswith(_DISCARDED)
    }
    of_replicas = {reason: int(seen.total(pb.ROLE_ROLLOUT, _DISCARDED + reason)) for reason in _NEVER_IN_THE_BUFFER}
    known = {**of_replicas, "replica_lost": lost}
    return {**by_reason, **{reason: tokens for reason, tokens in known.items() if tokens}}


def _engine(seen: Observer) -> dict[str, Any]:
    """What generated: `name` is a list if there were several, `engines` the most that one replica had, and `replicas`
    the most that there were at a time."""
    names = sorted(seen.engine_names)
    return {
        "name": names if len(names) > 1 else next(iter(names), None),
        "engines": seen.most_engines,
        "replicas": seen.most_rollouts,
        "router": "router" in seen.pids,
    }


def _bubble(seen: Observer, steps: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Share of its time that each role was not busy: the trainer between its first and last step, the others since
    they started."""
    bubble = {}
    if step_s := sum(line["step_s"] for line in steps):
        bubble["trainer"] = round(1 - sum(line["train_s"] for line in steps) / step_s, 4)
    for name, role in (("rollout", pb.ROLE_ROLLOUT), ("reward", pb.ROLE_REWARD)):
        if uptime := seen.total(role, "uptime_seconds"):
            bubble[name] = round(1 - seen.total(role, "busy_seconds") / uptime, 4)
    return bubble


def _install_seconds() -> float | None:
    """Measured by the Makefile, which made the environment."""
    text = os.environ.get("POLYHEAD_INSTALL_S", "")
    return float(text) if text else None


def _mean(values: Sequence[float]) -> float:
    return round(statistics.fmean(values), 6) if values else 0.0


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 4) if values else 0.0
