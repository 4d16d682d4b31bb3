"""How many parts a serialized message has, counted before it is parsed: an empty submessage takes two bytes on the wire
and a hundred in memory, so that a message within its size may still be more than a process can hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from services.common.errors import LimitError

MAX_PARTS = 100_000
"""Fields with all that they hold. A full batch of samples has fewer."""
# What is smaller cannot grow to much, and is not looked at.
_SMALL = 1 << 20
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def check_parts(data: bytes, descriptor: Any, field: str) -> None:
    """Raises LimitError, naming where in `field` the count ran out. What is malformed is left to the parser."""
    if len(data) > _SMALL:
        counter = _Counter(data)
        if counter.run_out(0, len(data), descriptor):
            where = ".".join([field, *reversed(counter.path)])
            raise LimitError(f"more than {MAX_PARTS} parts", field=where)


class _Counter:
    """`path` leads to where the count ran out, innermost name first."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._left = MAX_PARTS
        self.path: list[str] = []

    def run_out(self, at: int, end: int, descriptor: Any) -> bool:
        fields = _fields(descriptor)
        while at < end:
            self._left -= 1
            try:
                tag, at = self._varint(at, end)
                start, at = self._skipped(at, end, tag & 7)
            except ValueError:
                return False
            name, inner = fields.get(tag >> 3, ("", None))
            nested = inner is not None and tag & 7 == _BYTES
            if self._left < 0 or (nested and self.run_out(start, at, inner)):
                self.path += [name] if name else []
                return True
        return False

    def _skipped(self, at: int, end: int, wire_type: int) -> tuple[int, int]:
        """Where the value begins and ends."""
        start = at
        if wire_type == _VARINT:
            _, at = self._varint(at, end)
        elif wire_type == _BYTES:
            length, start = self._varint(at, end)
            at = start + length
        elif wire_type in (_FIXED64, _FIXED32):
            at += 8 if wire_type == _FIXED64 else 4
        else:
            raise ValueError
        if at > end:
            raise ValueError
        return start, at

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while at < end and shift < 70:
            byte = self._data[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value, at
        raise ValueError


@cache
def _fields(descriptor: Any) -> Mapping[int, tuple[str, Any]]:
    """Names, and the descriptors of the messages in them, by number."""
    return {each.number: (each.name, each.message_type) for each in descriptor.fields}
