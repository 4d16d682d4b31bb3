"""What goes into the store and what comes out of it: plain records, no messages, no text from clients as keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polyhead.v1 import buffer_pb2 as pb
from services.buffer.ids import SampleRef
from services.common.versions import Version

NO_ORDINAL = -1
"""The ordinal of a submitted group: it has no place in the data set."""


@dataclass(frozen=True, slots=True)
class RunParams:
    """The run's settings as the store applies them."""

    group_size: int
    min_group_size: int
    batch_groups: int
    """Groups per step: B."""
    surplus_groups: int
    """over_sampling_batch_size - B."""
    max_staleness: int
    """S"""
    on_stale: str
    """wait, mask or drop."""
    drop_zero_variance: bool
    judged: bool
    """Scored groups wait for the verdict of a user's filter."""
    zero_variance_fallback: bool
    """Groups without variance are kept when they are needed, as with KEEP_IF_INSUFFICIENT."""
    refill_groups: int
    """After the filter has dropped so many groups since the last batch, KEEP_IF_INSUFFICIENT means KEEP."""
    max_attempts: int
    lease_ttl_ms: int
    dataset_digest: str
    seed: int
    """Of the shuffle; 0 when the rows keep their order."""
    scored_whole: bool = False
    """A group is leased to be scored when all its samples are generated, and all of them together."""
    leases_from_clock: bool = False
    """Lease ids of a new run begin at the store's clock: a worker that is late with a sample of a store that was lost
    holds a lease that its successor never grants."""


@dataclass(frozen=True, slots=True)
class IssuedPrompt:
    """One row of the data set on its way into the store."""

    ordinal: int
    prompt: bytes
    """A serialized Prompt."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why nothing could be leased: a key of `policy.REASONS` and the figures it quotes."""

    code: str
    figures: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SampleFacts:
    """The index record of a sample. `oldest` is Version(0, 0) while no token has one."""

    num_tokens: int
    completion_tokens: int
    finish_reason: int
    oldest: Version
    reward: float


@dataclass(frozen=True, slots=True)
class LeasedSample:
    index: int
    lease_id: int
    attempt: int
    facts: SampleFacts
    partial: bytes = b""
    """Saved deltas, as `partials.frame` wrote them."""
    payload: bytes = b""
    """A serialized Sample."""
    score: bytes = b""
    """A serialized Score."""


@dataclass(frozen=True, slots=True)
class LeasedGroup:
    order: int
    ordinal: int
    staleness: int
    prompt: bytes
    """A serialized Prompt; empty in TRAIN leases, whose payloads hold it."""
    samples: Sequence[LeasedSample]
    judge: bool = False
    """SCORE: all its samples are scored, and its verdict is wanted."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The answer to a lease. `waiting` is set when `groups` is empty."""

    groups: Sequence[LeasedGroup]
    waiting: Waiting | None = None
    batch_lease_id: int = 0
    closed_groups: int = 0
    """Groups that this call closed: room for new ones."""
    cursor: int = 0
    wanted: tuple[int, ...] = ()
    """GENERATE: ordinals to issue, at `cursor`, because there is room for more groups than the store holds."""
    left_over: bool = False
    """GENERATE and SCORE: another caller would get something at once."""


@dataclass(frozen=True, slots=True)
class Extension:
    ref: SampleRef
    lease_id: int
    from_token: int = 0
    num_tokens: int = 0
    """Tokens in `delta`; 0 for a heartbeat."""
    delta: bytes = b""
    """A serialized TokenDelta."""


@dataclass(frozen=True, slots=True)
class Generated:
    ref: SampleRef
    lease_id: int
    num_tokens: int
    completion_tokens: int
    finish_reason: int
    versions: tuple[tuple[int, int, int], ...]
    """(epoch, lowest step, highest step) of the tokens, by epoch."""
    payload: bytes
    blobs: tuple[str, ...] = ()
    """Digests of the blobs that the payload refers to, each once."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A score, or the verdict on the group of a sample that was leased to be judged."""

    ref: SampleRef
    lease_id: int
    reward: float
    score: bytes
    verdict: int = 0
    """A GroupVerdict; 0 for a score."""
    verdict_reason: str = ""
    """At most 64 characters that can stand in a counter's name."""


@dataclass(frozen=True, slots=True)
class Released:
    ref: SampleRef
    lease_id: int
    reason: pb.ReleaseReason
    drop_reason: int = 0
    error: str = ""
    tokens_discarded: int = 0

    @property
    def discarded_as(self) -> str:
        """What counts its discarded tokens beside the sum."""
        return f"tokens_discarded.{pb.ReleaseReason.Name(self.reason).removeprefix('RELEASE_REASON_').lower()}"


@dataclass(frozen=True, slots=True)
class Result:
    """What happened to one sample of a batch verb."""

    outcome: int
    saved_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """Results in order, and what the call set free for others."""

    results: Sequence[Result]
    ready_groups: int = 0
    closed_groups: int = 0


@dataclass(frozen=True, slots=True)
class Fetched:
    """`state` 0: no such sample."""

    state: int
    partial: bytes = b""
    payload: bytes = b""
    score: bytes = b""
    prompt: bytes = b""
    """A serialized Prompt, when asked for and there is no payload."""


@dataclass(frozen=True, slots=True)
class Letter:
    """How a sample died, and what `requeue` would do (a RequeueOutcome)."""

    error: str
    died_ms: int
    requeue: int


@dataclass(frozen=True, slots=True)
class ListedSample:
    """`letter` is set for DEAD; `attempt` and `facts` are those at its death then."""

    ref: SampleRef
    attempt: int
    facts: SampleFacts
    letter: Letter | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """`following` is where the next page starts, 0 for nowhere."""

    samples: Sequence[ListedSample]
    following: int


@dataclass(frozen=True, slots=True)
class Requeued:
    """`order` is the group the sample goes on in, -1 for none."""

    outcome: int
    order: int


@dataclass(frozen=True, slots=True)
class ImportedSample:
    """`payload` is a serialized Sample without sample_id and group_id; `score` and `reward` None: to be scored."""

    num_tokens: int
    completion_tokens: int
    finish_reason: int
    versions: tuple[tuple[int, int, int], ...]
    payload: bytes
    reward: float | None = None
    score: bytes = b""
    blobs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImportedGroup:
    prompt: bytes
    """A serialized Prompt."""
    samples: Sequence[ImportedSample]


@dataclass(frozen=True, slots=True)
class WatermarkRecord:
    """Where the data stands at a step: every ordinal below `low_water` and in `closed` is closed."""

    step: int
    low_water: int
    closed: tuple[int, ...]
    dataset_digest: str
    seed: int


@dataclass(frozen=True, slots=True)
class Recovered:
    returned_groups: int
    replayed_steps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StateCount:
    """Samples in one state. `drop_reason` is set for DROPPED. `lengths` counts those with at least one token."""

    state: int
    drop_reason: int
    samples: int
    completion_tokens: int
    lengths: int


@dataclass(frozen=True, slots=True)
class LedgerRecord:
    accepted: int
    counts: Sequence[StateCount]
    """Recounted from the samples themselves."""
    epoch: int
    step: int
    published: Version | None
    cursor: int
    live_groups: int
    """Admitted and not closed, plus consumed but unpublished."""
    live_groups_limit: int
    waiting: Mapping[int, Waiting]
    """Per stage."""
    counters: Mapping[str, int]
