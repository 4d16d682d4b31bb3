"""The append-only string that holds a partial sample: serialized TokenDeltas, each after its length (uint32, LE)."""

from __future__ import annotations

import struct

_LENGTH = struct.Struct("<I")


def frame(delta: bytes) -> bytes:
    """What is appended for one delta."""
    return _LENGTH.pack(len(delta)) + delta


def split(partial: bytes) -> list[bytes]:
    """The deltas of a partial, in order."""
    deltas, at = [], 0
    while at < len(partial):
        (length,) = _LENGTH.unpack_from(partial, at)
        at += _LENGTH.size + length
        deltas.append(partial[at - length : at])
    return deltas
