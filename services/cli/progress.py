"""How a run looks while it runs: a live panel on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live
from rich.table import Table

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.cli.observe import Observer
from services.cli.supervisor import Child
from services.common.config import Config

LINE_EVERY_S = 5.0
# Mean reward is shown over this many steps.
WINDOW = 20

_QUEUES = ("PENDING", "GENERATING", "GENERATED", "SCORING", "READY", "CONSUMED")


class Progress:
    """Shows an Observer. `close` it before anything else is printed."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._console = Console(stderr=True, highlight=False)
        self._live: Live | None = None
        self._last_line = 0.0
        self._last: tuple[float, int] | None = None

    def __call__(self, seen: Observer) -> None:
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=2, transient=False)
                self._live.start()
            self._live.update(self._table(seen))
        elif time.monotonic() - self._last_line > LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._console.print(
                "  ".join(f"{name} {value}" for name, value in self._rows(seen) if value), soft_wrap=True
            )

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def restarted(self, child: Child, status: int) -> None:
        ended = f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
        if waiting_for := child.waiting_for:
            ended += f", it waits for {waiting_for}"
        self.say(f"{child.role} {ended}; restarting it (its log: {child.log_path})")

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _table(self, seen: Observer) -> Table:
        table = Table(title=f"polyhead {self._config.run.name}", show_header=False, title_justify="left")
        for name, value in self._rows(seen):
            table.add_row(name, value)
        return table

    def _rows(self, seen: Observer) -> list[tuple[str, str]]:
        last = seen.last_step
        recent = [seen.steps[step] for step in range(last - WINDOW + 1, last + 1) if step in seen.steps]
        rows = [("step", f"{last}/{self._config.run.num_rollout}")]
        if recent:
            rows.append(("reward", f"{sum(line['reward_mean'] for line in recent) / len(recent):.3f}"))
            rows.append(("staleness", _staleness(recent)))
        rows.append(("tokens/s", self._tokens_per_s(seen)))
        if (ledger := seen.ledger) is not None:
            rows.append(("queues", queues(ledger)))
            rows.append(("waiting", "; ".join(waiting(ledger))))
        return rows

    def _tokens_per_s(self, seen: Observer) -> str:
        if seen.ledger is None:
            return ""
        now, tokens = time.monotonic(), int(seen.ledger.counters.get("tokens_generated", 0))
        before, self._last = self._last, (now, tokens)
        if before is None or now == before[0]:
            return ""
        return f"{(tokens - before[1]) / (now - before[0]):.0f}"


def queues(ledger: pb.GetLedgerResponse) -> str:
    """Samples by state, the ones in the works only."""
    counts = {
        sample_pb2.SampleState.Name(row.state).removeprefix("SAMPLE_STATE_"): row.samples for row in ledger.counts
    }
    return " ".join(f"{name.lower()} {counts.get(name, 0)}" for name in _QUEUES)


def lost(ledger: pb.GetLedgerResponse) -> str:
    """What the store forgot although it had acknowledged it; empty when nothing."""
    writes = ledger.counters.get("lost_after_restart", 0)
    return f"the store came back without {writes} acknowledged writes (lost_after_restart)" if writes else ""


def waiting(ledger: pb.GetLedgerResponse) -> list[str]:
    """Who waits for whom, a phrase per stage."""
    names = {
        sample_pb2.STAGE_GENERATE: "rollout",
        sample_pb2.STAGE_SCORE: "reward",
        sample_pb2.STAGE_TRAIN: "trainer",
    }
    return [f"{names[row.stage]}: {row.reason}" for row in ledger.waiting_for if row.reason]


def _staleness(recent: list[dict[str, object]]) -> str:
    total: dict[int, int] = {}
    for line in recent:
        histogram = line["staleness"]
        assert isinstance(histogram, dict)
        for steps, samples in histogram.items():
            total[int(steps)] = total.get(int(steps), 0) + samples
    samples = sum(total.values()) or 1
    return " ".join(f"{steps}:{100 * count / samples:.0f}%" for steps, count in sorted(total.items()))
