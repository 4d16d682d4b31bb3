"""Messages that are put together from serialized parts.

protobuf's encoder copies a payload several times while it grows its buffer. Here each is copied once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from google.protobuf.message import Message

_LENGTH_DELIMITED = 2


class Spliced:
    """`message` with fields appended to it: bytes, strings or messages, each already serialized.

    What was appended comes after the message's own fields, which the wire format lets be in any order: an element of a
    repeated field behind those the message has, another field as if it had been set.
    """

    __slots__ = ("parts", "size")

    def __init__(self, message: Message) -> None:
        head = message.SerializeToString()
        self.parts = [head]
        """What `serialized` joins."""
        self.size = len(head)
        """Bytes when serialized."""

    def append(self, field: int, value: bytes | Self) -> None:
        """`field` is the number that the contract gives it."""
        parts, size = ([value], len(value)) if isinstance(value, bytes) else (value.parts, value.size)
        prefix = _varint(field << 3 | _LENGTH_DELIMITED) + _varint(size)
        self.parts.append(prefix)
        self.parts += parts
        self.size += len(prefix) + size

    def serialized(self) -> bytes:
        return b"".join(self.parts)


def serializer(plain: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """Of messages as `plain` does, and of spliced ones."""

    def serialize(message: Any) -> bytes:
        return message.serialized() if isinstance(message, Spliced) else plain(message)

    return serialize


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
