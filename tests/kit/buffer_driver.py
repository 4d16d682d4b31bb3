"""Plays the other services against a store: issues, generates, scores and trains with made-up samples."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.buffer.ids import SampleRef
from services.buffer.records import (
    Generated,
    IssuedPrompt,
    Lease,
    LeasedGroup,
    Released,
    Report,
    RunParams,
    Scored,
    StateCount,
)
from services.buffer.store import Store
from services.common.versions import Version

PARAMS = RunParams(
    group_size=2,
    min_group_size=2,
    batch_groups=2,
    surplus_groups=0,
    max_staleness=1,
    on_stale="wait",
    drop_zero_variance=False,
    judged=False,
    zero_variance_fallback=False,
    refill_groups=1 << 30,
    max_attempts=3,
    lease_ttl_ms=3_600_000,
    dataset_digest="d0",
    seed=7,
)
GENERATE, SCORE, TRAIN = (int(stage) for stage in (1, 2, 3))


def params(**changes: object) -> RunParams:
    if "group_size" in changes:
        changes.setdefault("min_group_size", changes["group_size"])
    return replace(PARAMS, **changes)  # type: ignore[arg-type]


def outcomes(report: Report) -> list[str]:
    return [pb.Outcome.Name(each.outcome).removeprefix("OUTCOME_") for each in report.results]


@dataclass
class Driver:
    """`epoch` and `version` are those of the trainer it plays."""

    store: Store
    epoch: int = 0
    version: Version = field(default_factory=lambda: Version(0, 0))

    async def start(self, step: int = 0) -> None:
        """A trainer comes up: epoch, recovery, first push."""
        self.epoch, _ = await self.store.acquire_epoch()
        await self.store.recover(self.epoch, step, None)
        await self.publish(step)

    async def publish(self, step: int) -> None:
        self.version = Version(self.epoch, step)
        await self.store.publish_version(self.version)

    async def generate_lease(self, count: int = 1024, *, admit: bool = True, version: Version | None = None) -> Lease:
        """Leases as the service does: issues what is wanted, then takes the rest. The lease of a first call that
        needed no issue is returned as it is."""
        groups: list[LeasedGroup] = []
        while True:
            left = count - sum(len(group.samples) for group in groups)
            lease = await self.store.lease_generate("rollout", left, version or self.version, admit=admit)
            groups += lease.groups
            if not lease.wanted:
                return replace(lease, groups=groups)
            prompts = [IssuedPrompt(ordinal, b"prompt %d" % ordinal) for ordinal in lease.wanted]
            await self.store.issue(lease.cursor, prompts)

    def generated(self, lease: Lease, *versions: Version, tokens: int = 4) -> list[Generated]:
        spans = tuple((each.epoch, each.step, each.step) for each in versions or (self.version,))
        return [
            Generated(ref, lease_id, 3 + tokens, tokens, 1, spans, b"payload %d %d" % ref)
            for ref, lease_id in refs(lease)
        ]

    async def generate(self, count: int = 1024) -> list[int]:
        """Leases and completes. Returns the groups' orders."""
        lease = await self.generate_lease(count)
        report = await self.store.complete_generate(self.generated(lease))
        assert set(outcomes(report)) <= {"OK"}
        return [group.order for group in lease.groups]

    async def score(self, count: int = 1024, reward: float | None = None) -> Report:
        """Rewards alternate within a group unless one is given."""
        lease = await self.store.lease_score("reward", count, payload=False)
        return await self.store.complete_score(
            [
                Scored(ref, lease_id, float(ref.index % 2) if reward is None else reward, b"")
                for ref, lease_id in refs(lease)
            ]
        )

    async def fill(self) -> None:
        """Brings as many groups to READY as the bound allows."""
        while await self.generate():
            await self.score()

    async def train(self, step: int, *, trained: bool = True) -> Lease:
        lease = await self.store.lease_train(self.epoch, step, payload=True)
        assert lease.groups, lease.waiting
        assert await self.store.commit_step(self.epoch, step, lease.batch_lease_id, trained=trained)
        return lease

    async def step(self, step: int) -> Lease:
        """A whole step: generate all that may be, train, publish."""
        await self.fill()
        lease = await self.train(step)
        await self.publish(step)
        return lease

    async def counts(self) -> dict[str, int]:
        """Samples by state, with the reason for dropped ones. Checks that nothing is lost or doubled."""
        ledger = await self.store.ledger(admit=True)
        assert ledger.accepted == sum(each.samples for each in ledger.counts)
        return {state_name(each): each.samples for each in ledger.counts}


def state_name(each: StateCount) -> str:
    name = sample_pb2.SampleState.Name(each.state).removeprefix("SAMPLE_STATE_")
    reason = sample_pb2.DropReason.Name(each.drop_reason).removeprefix("DROP_REASON_")
    return f"{name}({reason})" if each.drop_reason else name


def refs(lease: Lease) -> list[tuple[SampleRef, int]]:
    return [(SampleRef(group.order, each.index), each.lease_id) for group in lease.groups for each in group.samples]


def released(lease: Lease, reason: int, **fields: object) -> list[Released]:
    return [Released(ref, lease_id, reason, **fields) for ref, lease_id in refs(lease)]  # type: ignore[arg-type]


def orders(lease: Lease) -> list[int]:
    return [group.order for group in lease.groups]
