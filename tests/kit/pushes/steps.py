"""The steps of a push, where each victim is struck in them, and the faults of a campaign, by seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

VICTIMS = ("trainer", "replica", "engine")
SIGNALS = ("kill", "freeze")
# The in-house engine takes nothing ahead of its pause; what real SGLang does instead of taking bucket by bucket.
TORCH = ("join", "begin", "first bucket", "last bucket", "commit", "continue", "after commit", "abort", "leave")
SGLANG = ("join", "stage", "begin", "load staged", "commit", "continue", "after commit", "abort", "leave")

# (whose process comes to it, the point without its "before" or "after"); {0} is the replica.
_TRAINER = {
    "join": ["JoinWeightGroup"],
    "stage": ["StageUpdate"],
    "begin": ["BeginUpdate"],
    "first bucket": ["LoadBucket0"],
    "last bucket": ["LoadBucket1"],
    "load staged": ["LoadStaged"],
    "commit": ["CommitUpdate.before"],
    "after commit": ["CommitUpdate.after"],
    "abort": ["AbortUpdate"],
    "leave": ["LeaveWeightGroup"],
}
_REPLICA = {
    "join": ["join"],
    "stage": ["stage"],
    "begin": ["begin", "pause"],
    "first bucket": ["load0"],
    "last bucket": ["load1"],
    "load staged": ["load_staged"],
    "commit": ["commit.before"],
    "continue": ["resume"],
    "after commit": ["commit.after"],
    "abort": ["abort"],
    "leave": ["leave"],
}
# Of the in-house engine; the others are struck by their replica, at its own points.
_ENGINE = {
    "join": ["join"],
    "begin": ["pause"],
    "first bucket": ["receive0", "load0"],
    "last bucket": ["receive1", "load1"],
    "commit": ["end"],
    "continue": ["resume"],
}
# Nothing is aborted or left, and no group is joined again, unless a push has failed before.
_BROKEN = {"join": ["BeginUpdate"], "abort": ["LoadBucket0", "LoadBucket1"], "leave": ["LoadBucket0", "LoadBucket1"]}
_BROKEN_STAGED = {
    "join": ["StageUpdate"],
    "abort": ["BeginUpdate", "LoadStaged"],
    "leave": ["BeginUpdate", "LoadStaged"],
}


@dataclass(frozen=True)
class Fault:
    step: str
    victim: str
    signal: str
    replica: int
    """Whose push is struck: the index."""
    at: str
    """Whose process comes to the point: trainer, replica or engine."""
    point: str
    broken: str = ""
    """A call of the trainer that fails first, so that this step is come to."""
    long: bool = False
    """Of a freeze: longer than every deadline. Of a killed trainer: the next one comes only after the deadline."""
    superseded: bool = False
    """Of a frozen trainer: another one takes over before it goes on."""

    @property
    def combination(self) -> str:
        return f"{self.step} / {self.victim} / {self.signal}"

    def __str__(self) -> str:
        how = " long" * self.long + " superseded" * self.superseded
        return f"{self.signal}{how} {self.victim} of rollout-{self.replica}'s push at {self.point}"


@dataclass
class Draw:
    """Faults by seed: each combination once, in random order, and then again."""

    seed: int
    replicas: int
    kinds: Sequence[str]
    """Of each replica's engine. Where one is not the in-house one, it is the one that is struck."""
    steps: Sequence[str] = TORCH
    _rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    def faults(self) -> Iterator[Fault]:
        while True:
            combinations = [(step, victim, how) for step in self.steps for victim in VICTIMS for how in SIGNALS]
            self._rng.shuffle(combinations)
            for step, victim, how in combinations:
                yield self._fault(step, victim, how)

    def few(self, count: int) -> list[Fault]:
        """Each victim and signal, then those again that need no process to be started; and every step."""
        steps = list(self.steps)
        self._rng.shuffle(steps)
        pairs = [(victim, how) for victim in VICTIMS for how in SIGNALS]
        self._rng.shuffle(pairs)
        pairs += [("trainer", "kill"), *((victim, "freeze") for victim in VICTIMS)]
        return [self._fault(steps[n % len(steps)], *pairs[n % len(pairs)]) for n in range(count)]

    def _fault(self, step: str, victim: str, how: str) -> Fault:
        rng = self._rng
        staged = "stage" in self.steps
        replica = self.kinds.index("sglang") if staged else rng.randrange(self.replicas)
        at, point = self._place(step, victim, replica, in_house=not staged)
        broken = rng.choice((_BROKEN_STAGED if staged else _BROKEN).get(step, [""]))
        return Fault(
            step,
            victim,
            how,
            replica,
            at,
            point,
            broken=broken and f"trainer.{broken}@rollout-{replica}.before",
            long=rng.random() < 0.4,
            superseded=victim == "trainer" and how == "freeze" and rng.random() < 0.5,
        )

    def _place(self, step: str, victim: str, replica: int, *, in_house: bool) -> tuple[str, str]:
        if victim == "trainer" and step in _TRAINER:
            verb, _, when = self._rng.choice(_TRAINER[step]).partition(".")
            return "trainer", f"trainer.{verb}@rollout-{replica}.{when or self._when()}"
        at, table = "replica", _REPLICA
        if victim == "engine" and in_house and step in _ENGINE:
            at, table = "engine", _ENGINE
        name, _, when = self._rng.choice(table[step]).partition(".")
        return at, f"{'engine' if at == 'engine' else 'rollout'}.{name}.{when or self._when()}"

    def _when(self) -> str:
        return self._rng.choice(("before", "after"))
