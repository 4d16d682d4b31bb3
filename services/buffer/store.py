"""The interface of the store. One conformance suite holds for every implementation (tests/contract)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from services.buffer.ids import SampleRef
from services.buffer.records import (
    Extension,
    Fetched,
    Generated,
    ImportedGroup,
    IssuedPrompt,
    Lease,
    LeasedGroup,
    LedgerRecord,
    Page,
    Recovered,
    Released,
    Report,
    Requeued,
    RunParams,
    Scored,
    WatermarkRecord,
)
from services.common.versions import Version

UNBOUNDED = 1 << 50
"""Bytes of an answer that need not fit into a message."""


class Store(ABC):
    """Durable mailboxes of one run. Every method is atomic and safe to repeat, leases under the same `request_id`.

    All raise UnavailableError when the store does not answer or is full, FencedError for an epoch that was superseded
    and PreconditionError for a call that does not fit the present state.
    """

    @abstractmethod
    async def open(self, params: RunParams) -> None:
        """Creates the run, or joins it with new settings.

        Raises ConfigError naming both values when the group size, the data set or its seed differ from the run's, or
        when the server evicts what it holds; warns when it may lose what it acknowledged.
        """

    @abstractmethod
    async def close(self) -> None: ...

    @abstractmethod
    async def used_memory(self) -> int:
        """Bytes."""

    @abstractmethod
    async def issue(self, cursor: int, prompts: Sequence[IssuedPrompt]) -> int:
        """Makes a group of each prompt and moves the cursor behind the last. Returns how many groups were made.

        0 when the cursor is no longer at `cursor`: another buffer process was first.
        """

    @abstractmethod
    async def submit(self, request_id: str, prompts: Sequence[bytes]) -> list[int]:
        """Makes a group of each prompt (serialized Prompt), once per `request_id`. Returns their orders.

        The newest `policy.KEPT_SUBMITS` request ids are remembered.
        """

    @abstractmethod
    async def lease_generate(
        self,
        replica_id: str,
        max_samples: int,
        version: Version,
        *,
        admit: bool,
        request_id: str = "",
        more: bool = False,
        max_bytes: int = UNBOUNDED,
    ) -> Lease:
        """Leases PENDING samples: admitted groups first, by order; then new groups while the bound and `admit` let.

        Expired leases are taken back first. `Lease.wanted` may be set beside `Lease.groups`. The answer stays below
        `max_bytes`, one sample excepted. When the replica's last request had the same `request_id`, what is left of
        its leases is the answer; with `more`, they are added to.
        """

    @abstractmethod
    async def lease_score(
        self,
        replica_id: str,
        max_samples: int,
        *,
        payload: bool,
        request_id: str = "",
        max_bytes: int = UNBOUNDED,
    ) -> Lease:
        """Leases GENERATED samples, oldest group first, with `request_id` and `max_bytes` as in `lease_generate`.

        Expired leases are taken back first.
        """

    @abstractmethod
    async def lease_train(self, epoch: int, step: int, *, payload: bool, max_bytes: int = UNBOUNDED) -> Lease:
        """Leases the batch of a step, whole groups, the same one when asked again.

        Payloads that are more than `max_bytes` together, with the scores, are left out.
        """

    @abstractmethod
    async def fetch(self, refs: Sequence[SampleRef], *, prompts: bool = False) -> list[Fetched]:
        """One record per reference, in order; with `prompts`, those of samples without payload too."""

    @abstractmethod
    async def extend(self, samples: Sequence[Extension]) -> Report:
        """Moves deadlines; appends deltas. A lease that expired but was not yet taken back may still be extended."""

    @abstractmethod
    async def complete_generate(self, samples: Sequence[Generated]) -> Report:
        """GENERATING to GENERATED; the partial is replaced by the payload."""

    @abstractmethod
    async def complete_score(self, samples: Sequence[Scored]) -> Report:
        """SCORING to SCORED; a group whose samples are all scored becomes READY, or is dropped by the filter: at once,
        or where `policy.speculative` says so with the commit of a step that came to it.
        """

    @abstractmethod
    async def partials(self, max_groups: int) -> list[LeasedGroup]:
        """The oldest live groups with a PENDING sample and some tokens: records and scores, nothing leased."""

    @abstractmethod
    async def prefer(self, orders: Sequence[int]) -> None:
        """These groups' PENDING samples are leased first, in this order. Replaces what was said before."""

    @abstractmethod
    async def release(self, stage: int, samples: Sequence[Released]) -> Report:
        """Ends leases of `stage` (GENERATE or SCORE) by their reasons."""

    @abstractmethod
    async def commit_step(self, epoch: int, step: int, batch_lease_id: int, *, trained: bool) -> bool:
        """TRAINING to CONSUMED, or to DROPPED(INVALID) when not `trained`. False when it had been done before."""

    @abstractmethod
    async def publish_version(self, version: Version) -> None:
        """Records that every serving replica has `version`: the floor of what is leased from now on. Groups that no
        later step may train are closed, and issued again.
        """

    @abstractmethod
    async def watermark(self, epoch: int, step: int) -> WatermarkRecord:
        """What was closed when `step` was committed. O(ordinals closed since the last confirmed checkpoint)."""

    @abstractmethod
    async def confirm_checkpoint(self, epoch: int, oldest_kept_step: int) -> int:
        """CONSUMED to RETIRED up to that step, payloads deleted. Returns the number of samples retired."""

    @abstractmethod
    async def acquire_epoch(self, known_epoch: int = 0) -> tuple[int, int]:
        """A new epoch, above `known_epoch` too, which fences all earlier ones, and the last committed step."""

    @abstractmethod
    async def recover(self, epoch: int, step: int, watermark: WatermarkRecord | None) -> Recovered:
        """Undoes history above `step`; what it consumed is READY again, bound to its step and position.

        A bound group whose staleness at its step would pass the bound is closed as STALE and issued again, unless
        on_stale is mask. An older or empty store takes `watermark` over. Raises ConfigError when the watermark is of
        another data set.
        """

    @abstractmethod
    async def register_replica(self, replica_id: str, replica: bytes, ttl_ms: int) -> Version | None:
        """Stores a serialized Replica for `ttl_ms`. Returns the version a rollout replica has to reach to serve."""

    @abstractmethod
    async def list_replicas(self) -> list[bytes]:
        """Replicas whose time has not run out, by id."""

    @abstractmethod
    async def ledger(self, *, admit: bool) -> LedgerRecord:
        """Where every sample is. O(open samples)."""

    @abstractmethod
    async def list_samples(self, state: int, start: int, limit: int) -> Page:
        """At most `limit` samples in a state whose samples are kept, from `start`, 0 or what the page before says.

        O(open samples), for CONSUMED O(consumed samples), for DEAD O(limit).
        """

    @abstractmethod
    async def requeue(self, refs: Sequence[SampleRef]) -> list[Requeued]:
        """Gives dead samples another chance, as `RequeueOutcome` in the contract says. One record each, in order."""

    @abstractmethod
    async def referenced_blobs(self, digests: Sequence[str]) -> set[str]:
        """Those that the payload of a sample refers to."""

    @abstractmethod
    async def import_groups(self, request_id: str, groups: Sequence[ImportedGroup]) -> tuple[list[int], int]:
        """Accepts groups that were generated elsewhere, all or none, once per `request_id` (see `submit`).

        Returns their orders and how many became READY. Raises PreconditionError while no version is published, beyond
        the staleness bound, and for tokens that this run's history does not have or may no longer train.
        """
