"""What goes to an engine and what comes back, whichever engine it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import structlog

from services.common.errors import ConfigError, PolyheadError, UnavailableError

# Older ones unpickle what reaches them over the network (CVE-2026-3059, CVE-2026-3060).
SGLANG_MINIMUM = (0, 5, 10)
# From here on a request says which version each of its tokens is of.
_SGLANG_EXACT = (0, 5, 23)
# From here on the prefix cache can be flushed while requests wait; the scheduler of an older one ends instead.
_SGLANG_FLUSHES = (0, 5, 23)

log = structlog.get_logger()


class EngineUnavailableError(UnavailableError):
    """The engine does not answer, answers nonsense, or broke off in the middle of an answer."""


class EngineRefusedError(PolyheadError):
    """The engine understood an administrative call and refused it."""

    def __init__(self, reason: str, *, field: str = "", weights_touched: bool = True) -> None:
        super().__init__(reason, field=field)
        self.weights_touched = weights_touched
        """Whether bytes of a weight update may have reached the model. True when the engine does not say."""


class RequestRefusedError(PolyheadError):
    """The engine refused a generation request as malformed: the request is at fault, not the engine."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One completion. `rid` is unique among all requests the engine has ever seen."""

    rid: str
    input_ids: Sequence[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    sampling_seed: int


class Finish(Enum):
    """Why a request ended. ABORT: by the engine, unfinished, to be resumed. ERROR: it can never be served. LOST: its
    stream broke, so nothing more is known of it; to be resumed.
    """

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class EngineSpan:
    """Completion tokens [start, end) of one request, by the version text the engine was given."""

    version: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one request that are new since the chunk before."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    """Nats, temperature-scaled and untruncated; NaN where the engine had none."""
    total: int
    """Completion tokens of the request so far, these included."""
    spans: Sequence[EngineSpan] | None
    """Cover [0, total); None when the engine does not say yet."""
    version: str | None
    """What the engine served when it put this event together; None when it does not say."""
    finish: Finish | None
    message: str
    """Why, for ABORT and ERROR."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What an engine says about itself."""

    name: str
    """For example "torch_engine/0.1.0"."""
    context_length: int | None
    """Tokens of prompt and completion together that every request may reach, and be resumed from; None when the
    engine does not say."""
    ranks: int = 1
    """Members it brings to a weight group."""
    overlapped: bool = False
    """Whether it decodes one pass ahead: the tokens of a pass that ended before a pause in place come out after it."""
    max_running_requests: int | None = None
    """Slots of its continuous batch."""
    kv_tokens: int | None = None
    """Tokens that its KV memory holds."""
    model_path: str = ""
    stream_interval: int | None = None
    """Tokens between two events of a stream; None when it does not say."""
    prefix_cache: bool = True
    """Whether a prompt may find KV that an earlier request has left."""

    shares_memory: bool = False
    """Whether it reads weights out of memory that the trainer shares, without a receiver inside."""

    sleeps: bool = False
    """Whether it can give up its memory and take it back."""

    @property
    def flushes(self) -> bool:
        """Whether its prefix cache can be emptied while retracted requests wait."""
        return not _older_sglang(self, _SGLANG_FLUSHES)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine has to do at this moment."""

    running: int
    waiting: int
    """Requests that it has no slot or no memory for."""
    used_tokens: int
    max_tokens: int
    """Of KV memory."""
    slots: int = 0
    """Of its continuous batch; 0 when it does not say."""


def check_version(info: ServerInfo) -> None:
    """Raises ConfigError for an SGLang that is too old to be used here."""
    if _older_sglang(info, SGLANG_MINIMUM):
        minimum = ".".join(map(str, SGLANG_MINIMUM))
        version = info.name.partition("/")[2]
        raise ConfigError(f"SGLang {version} is too old: {minimum} or newer is needed", field="rollout.engine.python")


def warn_of_inexact_versions(info: ServerInfo) -> None:
    """To be called once for each engine that is attached: logs whether it leaves token versions to be guessed."""
    if _older_sglang(info, _SGLANG_EXACT) and info.stream_interval != 1:
        log.warning(
            "token_versions_inexact",
            engine=info.name,
            stream_interval=info.stream_interval,
            reason="token versions are upper bounds of age: at each push up to stream_interval tokens of a request are "
            "stamped one version too old; use stream_interval = 1, or SGLang " + ".".join(map(str, _SGLANG_EXACT)),
        )


def _older_sglang(info: ServerInfo, release: Sequence[int]) -> bool:
    kind, _, version = info.name.partition("/")
    numbers = [int(number) for number in re.findall(r"\d+", version)[:3]]
    return kind == "sglang" and numbers < list(release)
