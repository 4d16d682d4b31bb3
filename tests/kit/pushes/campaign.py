"""Strikes weight pushes at every step: ``python -m tests.kit.pushes.campaign`` (make chaos-push).

Two parts: two replicas with in-house engines, and one with real SGLang beside one with an in-house engine. The summary
is written after each fault.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import stamina.instrumentation
import torch
import transformers

from services.common.telemetry import configure_logging
from tests.kit.pushes.canaries import ASK_EVERY_S, Judge
from tests.kit.pushes.models import Models
from tests.kit.pushes.reference import sglang_checksums
from tests.kit.pushes.scene import Scene
from tests.kit.pushes.steps import SGLANG, TORCH, Draw, Fault
from tests.kit.pushes.strike import Outcome, Striker

MODELS = 8
# Pushes before the first fault, for what they cost by themselves.
QUIET_PUSHES = 5
# A moment that nobody came to, for instance since the fault before it still echoed, is tried again.
TRIES = 3
_TAIL = 2000


@dataclass(frozen=True)
class Part:
    kinds: Sequence[str]
    steps: Sequence[str]
    layers: int
    timeout_s: float
    back_s: float
    ask_every_s: float = ASK_EVERY_S


PARTS = {
    "torch": Part(("torch", "torch"), TORCH, 2, 5.0, 180.0),
    "short": Part(("torch", "torch"), TORCH, 2, 2.5, 240.0, ask_every_s=0.1),
    # Four buckets, of which two have room ahead of the pause.
    "sglang": Part(("sglang", "torch"), SGLANG, 4, 10.0, 480.0),
}


@dataclass
class Result:
    outcomes: list[Outcome] = field(default_factory=list)
    not_reached: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    mixed: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    quiet_gap_s: float = 0.0
    """Longest between two answers of any engine over pushes while nothing was struck, and a process started beside."""
    restarts: int = 0
    """Of everything, after a fault that the system did not come back from."""

    @property
    def clean(self) -> bool:
        return not (self.mixed or self.violations)

    def summary(self) -> dict[str, Any]:
        done = self.outcomes
        guarded = [each for each in done if each.fault.victim != "trainer"]
        others = [each.others_gap_s for each in guarded]
        return {
            "faults": len(done),
            "combinations": dict(sorted(Counter(each.fault.combination for each in done).items())),
            "not_reached": dict(self.not_reached),
            "mixed_weights": len(self.mixed),
            "answers": dict(sorted(self.answers.items())),
            "others_longest_gap_s": _most(others),
            "others_median_longest_gap_s": round(statistics.median(others), 3) if others else 0.0,
            "others_longest_gap_over_1_s": sum(gap > 1.0 for gap in others),
            "witness_longest_lag_s": _most(each.lag_s for each in guarded),
            "longest_gap_without_faults_s": round(self.quiet_gap_s, 3),
            "longest_gap_trainer_struck_s": _most(each.unled_gap_s for each in done),
            "longest_rpc_s": _most(each.rpc_s for each in done),
            "longest_push_s": _most(each.push_s for each in done),
            "longest_recovery_s": _most(each.recovered_s for each in done),
            "next_pushes": len(done),
            "next_pushes_succeeded": sum(each.next_push_s > 0 for each in done),
            "next_pushes_at_once": sum(each.next_push_s > 0 and not each.next_failed for each in done),
            "trainers_superseded": sum(each.fault.superseded for each in done),
            "trainers_fenced": sum(each.fenced for each in done),
            "violations": self.violations + [f"mixed: {each}" for each in self.mixed],
            "what_happened": _by_combination(done),
        }


def _by_combination(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.fault.combination, []).append(outcome)
    return {
        name: {
            "faults": len(each),
            "quarantined": sum("QUARANTINED" in outcome.states for outcome in each),
            "engine_restarted": sum(outcome.engine_restarted for outcome in each),
            "failed_pushes": sum(outcome.failed_pushes for outcome in each),
            "recovery_s": _most(outcome.recovered_s for outcome in each),
        }
        for name, each in sorted(found.items())
    }


def _most(values: Any) -> float:
    return round(max(values, default=0.0), 3)


class Campaign:
    def __init__(
        self, part: Part, directory: Path, say: Callable[[str], None], wrote: Callable[[Result], None] = lambda _: None
    ) -> None:
        self.result = Result()
        self._part, self._directory, self._say, self._wrote = part, directory, say, wrote
        self._models = Models(directory / "models", MODELS, part.layers)
        in_house = self._models.checksums()
        sums = {"torch": in_house}
        if "sglang" in part.kinds:
            sums["sglang"] = sglang_checksums(self._models.paths)
        self._checksums = [sums[kind] for kind in part.kinds]

    async def run(self, faults: Sequence[Fault]) -> Result:
        left = list(faults)
        while left:
            directory = self._directory / f"scene-{self.result.restarts}"
            directory.mkdir()
            async with Scene(
                directory, self._models, self._part.kinds, self._part.timeout_s, self._part.back_s
            ) as scene:
                try:
                    await self._strike_all(scene, left)
                except (AssertionError, TimeoutError) as error:
                    self.result.violations.append(f"{left.pop(0)}: {type(error).__name__} {error}\n{_tails(directory)}")
                    self.result.restarts += 1
                    await self._judge(scene)
                    self._wrote(self.result)
        return self.result

    async def _strike_all(self, scene: Scene, left: list[Fault]) -> None:
        """Takes out of `left` what is done."""
        for canary in scene.canaries:
            canary.every_s = self._part.ask_every_s
        await scene.until_served()
        striker = Striker(scene, self._checksums)
        await self._quiet(scene)
        tries = 0
        while left:
            outcome = await striker.strike(left[0])
            await self._judge(scene)
            if not outcome.reached:
                self.result.not_reached[str(outcome.fault)] += 1
                tries += 1
                assert tries < TRIES, f"nobody came to {outcome.fault.point}"
                continue
            tries = 0
            del left[0]
            self.result.outcomes.append(outcome)
            self.result.violations += [f"{outcome.fault}: {each}" for each in outcome.violations]
            self._say(
                f"{len(self.result.outcomes):3d} {outcome.fault}: back in {outcome.recovered_s:.1f} s, "
                f"others' gap {outcome.others_gap_s:.2f} s{''.join(f'; {each}' for each in outcome.violations)}"
            )
            self._wrote(self.result)

    async def _quiet(self, scene: Scene) -> None:
        """As after a fault a process is started, so it is here: that alone takes a core for seconds."""
        began = time.monotonic()
        beside = await scene.pusher()
        for _ in range(QUIET_PUSHES):
            offered = len(scene.trainer.said("version"))
            scene.trainer.push(scene.next_model())
            await scene.trainer.until_says("version", offered + 1)
            await scene.until_served()
        await beside.until_says("ready", 1)
        now = time.monotonic()
        await beside.end()
        gap = max(canary.longest_gap(began, now) for canary in scene.canaries)
        self.result.quiet_gap_s = max(self.result.quiet_gap_s, gap)

    async def _judge(self, scene: Scene) -> None:
        """What was answered since the last time."""
        judge: Judge = scene.judge
        answers = [list(canary.answers) for canary in scene.canaries]
        samples = list(scene.flow.samples)
        await asyncio.to_thread(_judged, judge, answers, samples)
        for canary, judged in zip(scene.canaries, answers, strict=True):
            # The last ones say what it serves.
            del canary.answers[: max(0, len(judged) - 1)]
        del scene.flow.samples[: len(samples)]
        self.result.answers += judge.verdict.counts
        self.result.mixed += judge.verdict.mixed
        judge.verdict.counts.clear()
        judge.verdict.mixed.clear()


def _judged(judge: Judge, answers: Sequence[Sequence[Any]], samples: Sequence[Any]) -> None:
    for each in answers:
        judge.engine_answers(each)
    judge.samples(samples)


def _tails(directory: Path) -> str:
    logs = sorted([*directory.glob("*.log"), *directory.glob("run/logs/*.log")])
    return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-_TAIL:]}" for log in logs)


def drawn(part: Part, seed: int, count: int) -> list[Fault]:
    """Each combination once before any a second time; with fewer faults than that, each victim and signal."""
    draw = Draw(seed, len(part.kinds), part.kinds, part.steps)
    whole = len(part.steps) * 6
    return list(islice(draw.faults(), count)) if count >= whole else draw.few(count)


def prepare() -> None:
    """For the process that is the witness."""
    torch.set_num_threads(1)
    sys.setswitchinterval(0.0005)  # the judge works beside the buffer and the canaries
    transformers.utils.logging.disable_progress_bar()
    stamina.instrumentation.set_on_retry_hooks([])  # a buffer that is away is no news here
    configure_logging("witness", stream=Path(os.devnull).open("w"))  # noqa: SIM115 (as long as the process lives)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=100, help="with in-house engines")
    parser.add_argument("--sglang-faults", type=int, default=10, help="with real SGLang")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("runs/chaos-push/summary.json"))
    arguments = parser.parse_args()
    prepare()
    path: Path = arguments.json
    path.parent.mkdir(parents=True, exist_ok=True)
    summary = json.loads(path.read_text()) if path.exists() else {}
    clean = True
    for name, count in (("torch", arguments.faults), ("sglang", arguments.sglang_faults)):
        if count:
            clean = _part(name, count, arguments.seed, path, summary) and clean
    return 0 if clean else 1


def _part(name: str, count: int, seed: int, path: Path, summary: dict[str, Any]) -> bool:
    began, part = time.monotonic(), PARTS[name]
    loads = [os.getloadavg()[0]]

    def wrote(result: Result) -> None:
        loads.append(os.getloadavg()[0])
        summary[name] = {
            "seed": seed,
            "asked": count,
            **result.summary(),
            "seconds": round(time.monotonic() - began, 1),
            "conditions": {
                "cores": len(os.sched_getaffinity(0)),
                "load_median": round(statistics.median(loads), 1),
                "load_max": round(max(loads), 1),
                "engines": list(part.kinds),
                "timeout_s": part.timeout_s,
            },
        }
        path.write_text(json.dumps(summary, indent=1) + "\n")

    directory = Path(tempfile.mkdtemp(prefix="push-"))
    campaign = Campaign(part, directory, lambda line: print(line, flush=True), wrote)
    result = asyncio.run(campaign.run(drawn(part, seed, count)))
    wrote(result)
    said = {key: value for key, value in summary[name].items() if key not in ("what_happened", "combinations")}
    print(json.dumps(said))
    if result.clean:
        shutil.rmtree(directory)
    else:
        print(f"logs: {directory}", file=sys.stderr)
    return result.clean


if __name__ == "__main__":
    sys.exit(main())
