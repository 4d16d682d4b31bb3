"""The errors that cross service borders, and how each looks on the wire.

A failure of one sample is data (an `Outcome`, a dead letter) and never one of these. An error here ends an RPC or a
process: it names the field or the thing at fault and says why, in one line.
"""

from __future__ import annotations

from urllib.parse import quote, unquote

import grpc


class PolyheadError(Exception):
    """Base of every error that a user or another service may see.

    `code` is the gRPC status it becomes; `exit_code` is the process exit status when it ends a command.
    """

    code = grpc.StatusCode.INTERNAL
    exit_code = 1

    def __init__(self, reason: str, *, field: str = "") -> None:
        self.reason = reason
        self.field = field
        super().__init__(f"{field}: {reason}" if field else reason)


class ConfigError(PolyheadError, ValueError):
    """The configuration cannot be run: unknown key, wrong type, values that do not fit together."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    exit_code = 2


class InvalidArgumentError(PolyheadError, ValueError):
    """A message is malformed; `field` names the part at fault. Nothing was stored."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    exit_code = 2


class LimitError(PolyheadError):
    """A message is over a limit. Retrying the same thing does not help."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class FencedError(PolyheadError):
    """The caller's epoch has been superseded (I4). Fatal to the process that gets it."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    exit_code = 3


class PreconditionError(PolyheadError):
    """The call does not fit the present state (a gap in steps, a push that was never begun)."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class UnavailableError(PolyheadError):
    """Something this service depends on does not answer now. Retrying later is right."""

    code = grpc.StatusCode.UNAVAILABLE


class DataLossError(PolyheadError):
    """What was stored is missing or altered. Retrying does not bring it back."""

    code = grpc.StatusCode.DATA_LOSS


class TrainingDivergedError(PolyheadError):
    """Three steps in a row were not finite, or the weights are not."""

    exit_code = 4


_BY_NAME: dict[str, type[PolyheadError]] = {
    cls.__name__: cls
    for cls in (
        PolyheadError,
        ConfigError,
        InvalidArgumentError,
        LimitError,
        FencedError,
        PreconditionError,
        UnavailableError,
        DataLossError,
        TrainingDivergedError,
    )
}

# Trailing metadata that carries the typed error beside the gRPC status.
ERROR_NAME_KEY = "polyhead-error"
ERROR_FIELD_KEY = "polyhead-error-field"


# gRPC fails a call whose trailing metadata is over 8 KiB, and a character may become 12 bytes on its way.
_MAX_REASON = 500
_MAX_FIELD = 120


def to_status(error: PolyheadError) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Details and trailing metadata from which `from_rpc_error` rebuilds the error, cut where it is very long.

    A subclass of one service travels as its nearest base that all services know.
    """
    name = next(cls.__name__ for cls in type(error).__mro__ if cls.__name__ in _BY_NAME)
    field = error.field[:_MAX_FIELD]
    reason = error.reason[:_MAX_REASON]
    # Metadata is ASCII without line ends; a field may be a path.
    metadata = ((ERROR_NAME_KEY, name), (ERROR_FIELD_KEY, quote(field, safe=" /[]:")))
    return (f"{field}: {reason}" if field else reason), metadata


def from_rpc_error(error: grpc.aio.AioRpcError) -> PolyheadError | None:
    """The typed error behind an RPC failure, or None when the transport itself failed."""
    metadata = {str(key): value for key, value in error.trailing_metadata() or ()}
    cls = _BY_NAME.get(str(metadata.get(ERROR_NAME_KEY, "")))
    if cls is None:
        return None
    field = unquote(str(metadata.get(ERROR_FIELD_KEY, "")))
    reason = error.details() or ""
    return cls(reason.removeprefix(f"{field}: ") if field else reason, field=field)
