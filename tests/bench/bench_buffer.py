"""What the buffer costs and how fast it is, each figure beside its limit. `polyhead bench buffer`.

* `samples_per_s`, `ratio_to_scripts`: 8k-token samples from the prompt to the commit, through gRPC and through the
  same scripts alone, in turn on one store (`buffer_flow.py`, `buffer_load.py`); medians of the rounds. Both sides have
  the same three client processes; what only the first has is the buffer's process.
* `lease_p99_ms`: of the leases that got something, all stages, at half of that rate, and by stage. A lease carries
  records; the samples are fetched, a call's worth at a time. Beside it what an append of one call's payloads and its
  fsync take on this disk while it is idle, before and after.
* `in_memory`: the first again with the store's file on a tmpfs, where an fsync is free: what the processors allow.
* `ray_actor_samples_per_s`, `ray_store_samples_per_s`: the same flow through a Ray actor and through Ray's object
  store, which hold samples in memory only (`buffer_ray.py`).
* `recovery_s`, `takeover_s`, `bytes_per_payload_byte`: with ten thousand live samples (`buffer_recovery.py`).
* `waiting_leases_*`: ten thousand leases that wait, and whom an arrival wakes (`buffer_waiting.py`).

A machine with other work to do gives other figures, and `conditions` says how much it had (`load_before`, per core).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import stamina.instrumentation

from services.common.errors import PolyheadError
from tests.bench import buffer_load
from tests.bench.buffer_flow import BATCH, COMPLETION, PROMPT, ThroughGrpc, ThroughScripts
from tests.bench.buffer_load import Load, fsync_ms, p99
from tests.bench.buffer_ray import measure_ray
from tests.bench.buffer_recovery import measure_recovery
from tests.bench.buffer_scene import Scene, scene
from tests.bench.buffer_waiting import measure_waiting

LEASE_WAIT_S = 0.25
_TMPFS = Path("/dev/shm")


def measure_flow(directory: Path | None, rounds: int, steps: int, *, half_load: bool) -> dict[str, Any]:
    """The two sides in turn; then, with `half_load`, leases at half of the gRPC side's rate."""
    with scene(directory, appendfsync="always") as place:
        fsync = fsync_ms(place.directory)
        pairs = [_pair(place, steps, number) for number in range(rounds)]
        ratios = [through_grpc.samples_per_s / scripts.samples_per_s for through_grpc, scripts in pairs]
        samples_per_s = statistics.median(through_grpc.samples_per_s for through_grpc, _ in pairs)
        figures: dict[str, Any] = {
            "samples_per_s": round(samples_per_s),
            "scripts_samples_per_s": round(statistics.median(scripts.samples_per_s for _, scripts in pairs)),
            "ratio_to_scripts": round(statistics.median(ratios), 3),
            "ratio_of_each_round": [round(ratio, 3) for ratio in ratios],
            "cpu_ms_per_sample": _median_cpu([through_grpc for through_grpc, _ in pairs]),
            "scripts_cpu_ms_per_sample": _median_cpu([scripts for _, scripts in pairs]),
        }
        if half_load:
            half = _through_grpc(place, steps, rate=samples_per_s / 2)
            figures["half_load_samples_per_s"] = round(half.samples_per_s)
            leases = [each for stage in half.leases_ms.values() for each in stage]
            figures["lease_p50_ms"] = round(float(np.median(leases)), 2)
            figures["lease_p99_ms"] = p99(leases)
            figures["lease_p99_ms_by_stage"] = {stage: p99(each) for stage, each in half.leases_ms.items()}
            fsync += fsync_ms(place.directory)
        figures["fsync_p50_ms"] = round(float(np.median(fsync)), 2)
        figures["fsync_p99_ms"] = p99(fsync)
        return figures


def _pair(place: Scene, steps: int, number: int) -> tuple[Load, Load]:
    watched = {"store": place.server.pid}
    scripts = partial(ThroughScripts, place.server.url, f"scripts{number}")
    return _through_grpc(place, steps), buffer_load.run(scripts, steps, watched)


def _through_grpc(place: Scene, steps: int, rate: float = 0.0) -> Load:
    watched = {"buffer": place.pid, "store": place.server.pid}
    # At a given rate it is asked what a lease takes, not how long the next sample is in coming.
    side = partial(ThroughGrpc, place.address, 0.0 if rate else LEASE_WAIT_S)
    return buffer_load.run(side, steps, watched, rate)


def _median_cpu(loads: list[Load]) -> dict[str, float]:
    return {name: round(statistics.median(load.cpu_ms[name] for load in loads), 3) for name in loads[0].cpu_ms}


def limits(figures: dict[str, Any]) -> dict[str, float]:
    """What each figure should not pass, or not fall below (`samples_per_s`, `ratio_to_scripts`)."""
    return {
        "ratio_to_scripts": 0.6,
        "samples_per_s": 1000,  # asked where an fsync takes no more than 1 ms
        "lease_p99_ms": round(3 * figures["fsync_p99_ms"] + 5, 2),
        "recovery_s": 5,
        "takeover_s": 2,
        "bytes_per_payload_byte": 1.3,
        "waiting_leases_core_pct": 2,
        "waiting_leases_mb": 500,
        "woken_per_arrival": 1,
    }


def table(figures: dict[str, Any]) -> str:
    """The figures beside their limits, for the documentation."""
    in_memory, cpu, scripts = figures["in_memory"], figures["cpu_ms_per_sample"], figures["scripts_cpu_ms_per_sample"]
    limit = figures["limits"]
    rows = [
        ("samples a second, prompt to commit", figures["samples_per_s"], "1,000 where an fsync takes ≤ 1 ms"),
        ("the same, the store's file on a tmpfs", in_memory["samples_per_s"], "1,000"),
        ("ratio to the scripts alone", figures["ratio_to_scripts"], "≥ 0.60"),
        ("the same, the store's file on a tmpfs", in_memory["ratio_to_scripts"], "≥ 0.60"),
        (
            "p99 of Lease at half load",
            f"{figures['lease_p99_ms']} ms",
            f"≤ 3 × fsync p99 + 5 = {limit['lease_p99_ms']} ms",
        ),
        (
            "the same to generate / score / train",
            " / ".join(f"{figures['lease_p99_ms_by_stage'][stage]}" for stage in ("generate", "score", "train"))
            + " ms",
            "",
        ),
        ("fsync, p50 / p99", f"{figures['fsync_p50_ms']} / {figures['fsync_p99_ms']} ms", ""),
        ("CPU a sample: clients / buffer / store", " / ".join(f"{cpu[name]:.2f}" for name in cpu) + " ms", ""),
        (
            "the same of the scripts: clients / store",
            " / ".join(f"{scripts[name]:.2f}" for name in scripts) + " ms",
            "",
        ),
        ("samples a second, Ray actor with a list", figures.get("ray_actor_samples_per_s", "–"), ""),
        ("samples a second, Ray's object store", figures.get("ray_store_samples_per_s", "–"), ""),
        ("buffer killed: start to first lease", f"{figures['recovery_s']} s", "≤ 5 s"),
        ("new trainer: AcquireEpoch to first lease", f"{figures['takeover_s']} s", "≤ 2 s"),
        ("store's memory over payload", figures["bytes_per_payload_byte"], "≤ 1.3"),
        ("the same when all is retired", figures["bytes_per_payload_byte_retired"], ""),
        (
            f"{figures['waiting_leases']:,} waiting leases",
            f"{figures['waiting_leases_core_pct']}% of a core, {figures['waiting_leases_mb']} MB",
            "≤ 2%, ≤ 500 MB",
        ),
        ("leases that an arrival makes look", figures["woken_per_arrival"], "1"),
    ]
    lines = ["| figure | measured | asked |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} | {asked} |" for name, value, asked in rows)]) + "\n"


async def _waiting() -> dict[str, float]:
    with scene(appendfsync="always") as place:
        return await measure_waiting(place)


def measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    figures = measure_flow(None, arguments.rounds, arguments.steps, half_load=True)
    if _TMPFS.is_dir():
        figures["in_memory"] = measure_flow(_TMPFS, arguments.rounds, arguments.steps, half_load=False)
    if not arguments.without_ray:
        figures |= measure_ray(arguments.steps)

    async def in_one_loop() -> dict[str, float]:  # gRPC does not outlive the loop it was first used in
        return await measure_recovery() | await _waiting()

    return figures | asyncio.run(in_one_loop())


def main() -> int:
    parser = argparse.ArgumentParser(prog="polyhead bench buffer", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--rounds", type=int, default=5, help="of each side")
    parser.add_argument("--steps", type=int, default=60, help="of 64 samples, in a round")
    parser.add_argument("--without-ray", action="store_true")
    parser.add_argument("--table", type=Path, help="only print what an earlier --json FILE says, as a table")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())), end="")
        return 0
    stamina.instrumentation.set_on_retry_hooks([])
    load_before = os.getloadavg()[0] / (os.cpu_count() or 1)
    try:
        figures = measure_all(arguments)
    except PolyheadError as error:
        print(f"polyhead bench buffer: {error}", file=sys.stderr)
        return error.exit_code
    figures["limits"] = limits(figures)
    figures["conditions"] = {
        "load_before": round(load_before, 2),
        "store": "Valkey, unix socket, AOF always",
        "samples": f"{PROMPT} + {COMPLETION} tokens, {BATCH} to a call",
        "processes": "three clients, one buffer, one store",
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "grpc": grpc.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }
    content = json.dumps(figures, indent=1) + "\n"
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(content)
    print(content, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
