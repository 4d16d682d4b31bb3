"""A valid message as bytes that are valid no more, or not quite: by the message's descriptor, and by its bytes."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message

NESTED = "polyhead.v1.CompletedSample.sample"
"""A bytes field that holds a message of its own."""

_INTEGERS = {
    Field.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    Field.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    Field.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    Field.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}
_EDGES = (-1, 0, 1, 2, 255, 1 << 31, (1 << 32) - 1, 10**15, (1 << 53) - 1, 1 << 53, (1 << 53) + 1, (1 << 64) - 1)
_FLOATS = (float("nan"), float("inf"), float("-inf"), -1.0, -0.0, 1e-320, 1e300)
_TEXTS = (
    *("", " ", "\0", "a\nb", "x" * 129, "é" * 40_000, "x" * 70_000, "\u202e\u0661", "{}", "[]", "null", "1"),
    *(
        '{"a": NaN}',
        '{"a":',
        "[" * 100_000,
        '{"a": 1e999}',
        '[{"content": "no role"}]',
        '{"a": "' + "y" * 66_000 + '"}',
    ),
    *(
        "g00000000-000",
        "g00000001",
        "g99999999999999-999999",
        "g\u0660\u06600000000-000",
        "g-0000001-000",
        "9007199254740993",
    ),
)
_ARRAYS = (b"", b"\0", b"\xff" * 4, struct.pack("<2f", float("nan"), float("inf")), struct.pack("<2i", -1, 1 << 30))
_MANY, _SMALL = 1025, 2000


class Mutator:
    """Every choice comes from `rng`, so that a seed makes the same bytes again."""

    def __init__(self, rng: random.Random, nested: type[Message]) -> None:
        """`nested` is the message inside `NESTED`."""
        self._rng = rng
        self._nested = nested

    def mutated(self, message: Message) -> bytes:
        """What is sent instead of `message`: now and then the message itself."""
        changed = type(message)()
        changed.CopyFrom(message)
        how = self._rng.random()
        if how < 0.75:
            for _ in range(self._rng.choice((1, 1, 2, 4))):
                self._change(changed)
            return _partial(changed)
        if how < 0.97:
            return self.torn(_partial(changed))
        return _partial(changed)

    def torn(self, data: bytes) -> bytes:
        """Bytes with one thing wrong about them."""
        rng, at = self._rng, self._rng.randrange(len(data) + 1)
        number = rng.randrange(1, 20)
        return rng.choice(
            (
                lambda: data[:at],
                lambda: data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:],
                lambda: bytes(byte ^ (1 << rng.randrange(8) if rng.random() < 0.02 else 0) for byte in data),
                lambda: data + data[at:],
                lambda: data + data,
                # A length that lies, a number that does not end, a text that is none, groups that are not closed.
                lambda: data + bytes([number << 3 & 0x7F | 2]) + b"\xff\xff\xff\xff\x07",
                lambda: data + bytes([number << 3 & 0x7F]) + b"\xff" * 11,
                lambda: data + bytes([number << 3 & 0x7F | 2, 2]) + b"\xc3\x28",
                lambda: data + bytes([number << 3 & 0x7F | 3]) * 500,
                lambda: rng.randbytes(rng.randrange(2000)),
            )
        )()

    def _change(self, message: Message) -> None:
        """One hostile change, somewhere in the message."""
        rng = self._rng
        fields = list(message.DESCRIPTOR.fields)
        here = [each for each in fields if each.cpp_type == Field.CPPTYPE_MESSAGE and message_in(message, each)]
        if here and rng.random() < 0.6:
            field = rng.choice(here)
            value = getattr(message, field.name)
            if not _repeated(field):
                return self._change(value)
            if not _is_map(field) and rng.random() < 0.8:
                return self._change(rng.choice(value))
        if not fields:
            return None
        field = rng.choice(fields)
        if _is_map(field):
            return self._change_map(getattr(message, field.name), field)
        if _repeated(field):
            return self._change_list(message, field)
        return self._change_value(message, field)

    def _change_value(self, message: Message, field: Any) -> None:
        rng = self._rng
        if field.cpp_type == Field.CPPTYPE_MESSAGE:
            if rng.random() < 0.5:
                message.ClearField(field.name)
            else:
                getattr(message, field.name).SetInParent()
            return
        if field.full_name == NESTED and rng.random() < 0.7 and (data := getattr(message, field.name)):
            inner = self._nested.FromString(data)
            setattr(message, field.name, self.mutated(inner))
            return
        setattr(message, field.name, self._value(field, getattr(message, field.name)))

    def _change_list(self, message: Message, field: Any) -> None:
        rng, items = self._rng, getattr(message, field.name)
        how = rng.random()
        if how < 0.2:
            message.ClearField(field.name)
        elif how < 0.4 and items:
            del items[rng.randrange(len(items))]
        elif how < 0.7 and items:
            item = rng.choice(items)
            small = not isinstance(item, Message) or item.ByteSize() < _SMALL
            items.extend([item] * rng.choice((1, 3, _MANY if small else 5)))
        elif field.cpp_type == Field.CPPTYPE_MESSAGE:
            items.add()
        else:
            items.append(self._value(field, None))

    def _change_map(self, items: Any, field: Any) -> None:
        key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
        name = self._value(key, "")
        if value.cpp_type == Field.CPPTYPE_MESSAGE:
            items[name].SetInParent()
        else:
            items[name] = self._value(value, None)

    def _value(self, field: Any, old: Any) -> Any:
        rng = self._rng
        if field.cpp_type in _INTEGERS:
            low, high = _INTEGERS[field.cpp_type]
            return min(max(rng.choice(_EDGES) if rng.random() < 0.7 else (old or 0) + rng.choice((-1, 1)), low), high)
        makers: Mapping[int, Callable[[], Any]] = {
            Field.CPPTYPE_DOUBLE: lambda: rng.choice(_FLOATS),
            Field.CPPTYPE_FLOAT: lambda: rng.choice(_FLOATS[:5]),
            Field.CPPTYPE_BOOL: lambda: rng.random() < 0.5,
            Field.CPPTYPE_ENUM: lambda: rng.choice((-1, 0, 1, 2, 3, 4, 5, 77, 1 << 30)),
            Field.CPPTYPE_STRING: lambda: self._text(old or ""),
        }
        return self._bytes(old or b"") if field.type == Field.TYPE_BYTES else makers[field.cpp_type]()

    def _text(self, old: str) -> str:
        return self._rng.choice((*_TEXTS, old * 2, old[:-1]))

    def _bytes(self, old: bytes) -> bytes:
        return self._rng.choice((*_ARRAYS, old[:-1], old + b"\0", old[4:], old * 2, self._rng.randbytes(len(old))))


def message_in(message: Message, field: Any) -> bool:
    """Whether there is something inside a message field."""
    return bool(len(getattr(message, field.name))) if _repeated(field) else message.HasField(field.name)


def _repeated(field: Any) -> bool:
    return bool(field.is_repeated)


def _is_map(field: Any) -> bool:
    return _repeated(field) and field.message_type is not None and field.message_type.GetOptions().map_entry


def _partial(message: Message) -> bytes:
    return message.SerializePartialToString()
