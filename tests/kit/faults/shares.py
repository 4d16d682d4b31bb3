"""Who is to be struck how, and where: rounds that run side by side share one, also from processes of their own."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Mapping
from multiprocessing.managers import BaseManager
from typing import NamedTuple

from tests.kit.faults.matrix import points_of

VICTIMS = ("store", "buffer", "rollout", "reward", "trainer", "engine")
# Beside the processes: the network between them, and their clocks.
OTHERS = ("link", "clock")
# Of each point, and of each stage of the crash matrix.
HITS = 3
# Of a whole campaign: shorter ones do not go on until each point was hit.
WHOLE = 100

_KINDS = ("point",) * 14 + ("kill",) * 2 + ("freeze",) * 2
KINDS: Mapping[str, tuple[str, ...]] = {
    "store": (*_KINDS, "stop", "full"),
    # A trainer that is told to stop ends the run.
    "trainer": _KINDS,
    "link": ("point",),
    "clock": ("point",),
}
"""What may happen to a victim: a kill at an armed point or at any time, SIGSTOP, SIGTERM, a full disk."""
# Beside the kills and freezes that a campaign is to make.
_EXTRA = ("stop", "full")


class Strike(NamedTuple):
    kind: str
    point: str = ""


class Shares:
    """Gives out strikes, each victim's points hit least first."""

    def __init__(self, strikes: int, seed: int) -> None:
        """`strikes` are the kills and freezes of each victim that is a process."""
        self._wanted = HITS if strikes >= WHOLE else 0
        self._left = Counter(dict.fromkeys(VICTIMS, strikes))
        self._left.update({other: HITS * len(points_of(other)) if self._wanted else strikes for other in OTHERS})
        self._taken: Counter[str] = Counter()
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._rounds = 0

    def next_round(self) -> int | None:
        """Its number; None when nothing is left to be struck."""
        with self._lock:
            if not any(self._open(victim) for victim in (*VICTIMS, *OTHERS)):
                return None
            self._rounds += 1
            return self._rounds - 1

    def take(self, victim: str, avoid: Counter[str]) -> Strike | None:
        """The next strike; None when none is left. `avoid` counts against a point what its round knows of it."""
        with self._lock:
            if not self._open(victim):
                return None
            must = self._missing(victim) >= self._left[victim]
            kind = "point" if must else self._rng.choice(KINDS.get(victim, (*_KINDS, "stop")))
            self._left[victim] -= kind not in _EXTRA
            if kind != "point":
                return Strike(kind)
            cost = {name: self._taken[name] + avoid[name] for name in points_of(victim)}
            name = self._rng.choice([name for name, count in cost.items() if count == min(cost.values())])
            self._taken[name] += 1
            return Strike(kind, name)

    def undo(self, victim: str, strike: Strike) -> None:
        """It was not carried out."""
        with self._lock:
            self._left[victim] += strike.kind not in _EXTRA
            if strike.point:
                self._taken[strike.point] -= 1

    def spend(self, victim: str) -> None:
        """It was killed for the sake of another's point."""
        with self._lock:
            self._left[victim] -= 1

    def _open(self, victim: str) -> bool:
        return self._left[victim] > 0 or self._missing(victim) > 0

    def _missing(self, victim: str) -> int:
        """Hits until each point has been given out as often as wanted."""
        return sum(max(0, self._wanted - self._taken[name]) for name in points_of(victim))


class Manager(BaseManager):
    """Holds the shares of a campaign, for its processes."""


Manager.register("Shares", Shares)
