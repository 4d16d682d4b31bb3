"""Random histories of a run: what may be asked of a store, in any order, by peers that are late, lost or killed."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.kit import valkey
from tests.kit.buffer_driver import PARAMS
from tests.property import audit
from tests.property.pair import FAULTS, Pair
from tests.property.verbs import VERBS, Peers

FAULT_RATE = 0.05
"""Of the commands during which something is killed or cut off."""
_RUNS_PER_SERVER = 20
_SEEDS = st.integers(0, (1 << 32) - 1)
_runs = itertools.count()


class History(RuleBasedStateMachine):
    """A command is a verb and a seed for all that it needs: what is drawn must not depend on what the stores answer,
    since a kill in the middle of a call may turn out this way or that.
    """

    server: ClassVar[valkey.Valkey]
    seen: ClassVar[Counter[str]]
    ended: ClassVar[Callable[[], None]]

    def __init__(self) -> None:
        super().__init__()
        number = next(_runs)
        if number % _RUNS_PER_SERVER == 0:  # what a start has to load must not grow for ever
            self.server.empty()
        self.loop = asyncio.new_event_loop()
        self.pair = Pair(self.server, f"r{number}", self.seen)

    def teardown(self) -> None:
        self.loop.run_until_complete(self.pair.close())
        self.loop.close()
        self.seen["histories"] += 1
        type(self).ended()

    @initialize(number=_SEEDS)
    def open(self, number: int) -> None:
        rng = random.Random(number)
        size = rng.choice((2, 2, 2, 3))
        judged = rng.random() < 0.5
        params = replace(
            PARAMS,
            group_size=size,
            min_group_size=rng.randint(1, size),
            batch_groups=rng.choice((1, 2, 2, 3)),
            max_staleness=rng.randint(0, 3),
            on_stale=rng.choice(("wait", "wait", "mask", "drop")),
            drop_zero_variance=rng.random() < 0.5,
            surplus_groups=rng.choice((0, 0, 1, 2)),
            judged=judged,
            zero_variance_fallback=judged,
            refill_groups=rng.choice((0, 1, 2, 99)),
            scored_whole=rng.random() < 0.3,
        )
        self.peers = Peers(self.pair, params)
        self.loop.run_until_complete(self._begin())

    async def _begin(self) -> None:
        await self.pair.open(self.peers.params)
        await self.peers.new_trainer(0)
        await self.peers.publish_step(0)

    @rule(verb=st.sampled_from(VERBS), number=_SEEDS)
    def act(self, verb: str, number: int) -> None:
        """One rule for all verbs: separate ones are left out of whole histories, which then never get anywhere."""
        rng = random.Random(number)
        fault = rng.choice(FAULTS) if rng.random() < FAULT_RATE else ""
        self.seen["commands"] += 1
        try:
            self.loop.run_until_complete(self._act(verb, rng, fault))
        except Exception as error:
            error.add_note(f"{verb}, fault {fault or 'none'}, with {self.peers.params}")
            raise

    async def _act(self, verb: str, rng: random.Random, fault: str) -> None:
        await self.peers.act(verb, rng, fault)
        ledger = await self.pair.ask(lambda store: store.ledger(admit=True), rng)
        found = audit.read(self.pair.raw, self.pair.run_name)
        audit.check(found)
        self.peers.books.check(found, ledger)


def run(
    number: int, histories: int, commands: int, ended: Callable[[], None] = lambda: None, *, shrink: bool = True
) -> Counter[str]:
    """Plays so many histories of at most so many commands, the same ones for the same number. Returns what happened,
    by name. Raises AssertionError with the first history that fails or, to `shrink`, the shortest that can be found.
    """
    with valkey.running(appendfsync="always") as server:
        machine = type("History", (History,), {"server": server, "seen": Counter(), "ended": staticmethod(ended)})
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            seed(number)(machine),
            settings=settings(
                max_examples=histories,
                stateful_step_count=commands,
                deadline=None,
                database=None,
                phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
                suppress_health_check=list(HealthCheck),
            ),
        )
        return machine.seen  # type: ignore[attr-defined, no-any-return]
