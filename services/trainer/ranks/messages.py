"""Small messages between ranks: msgpack, with numpy arrays as their bytes. Nothing in one is ever executed."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np

_ARRAY = 1


def encode(message: Any) -> bytes:
    """Of None, numbers, strings, bytes, lists, dicts and numpy arrays of numbers."""
    encoded: bytes = msgpack.packb(message, default=_array)
    return encoded


def decode(data: bytes) -> Any:
    """What `encode` was given, tuples as lists."""
    return msgpack.unpackb(data, ext_hook=_restored, strict_map_key=False)


def _array(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray) or value.dtype.hasobject:
        raise TypeError(f"{type(value).__name__} does not travel between ranks")
    return msgpack.ExtType(_ARRAY, msgpack.packb([value.dtype.str, value.shape, value.tobytes()]))


def _restored(code: int, data: bytes) -> Any:
    assert code == _ARRAY
    dtype, shape, content = msgpack.unpackb(data)
    return np.frombuffer(content, dtype=np.dtype(dtype)).reshape(shape).copy()
