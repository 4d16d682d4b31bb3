"""HTTP/2 as a broken peer speaks it to a gRPC server: frames that lie, that stop, or that are none."""

from __future__ import annotations

import random
import socket
import struct
from contextlib import suppress

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW, _CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
_END_STREAM, _END_HEADERS = 1, 4


def send(rng: random.Random, address: tuple[str, int], path: str, message: bytes) -> None:
    """One connection, used badly. What the server answers is not looked at."""
    with socket.create_connection(address, timeout=5) as connection:
        connection.settimeout(0.05)
        # The server may hang up at any byte.
        with suppress(OSError):
            connection.sendall(_bytes(rng, path, message))
            connection.recv(4096)


def _bytes(rng: random.Random, path: str, message: bytes) -> bytes:
    opened = _PREFACE + _frame(_SETTINGS, 0, 0, b"") + _frame(_HEADERS, _END_HEADERS, 1, _headers(path))
    whole = struct.pack(">BI", 0, len(message)) + message
    body = rng.choice(
        (
            # The length of the message lies, or it is said to be compressed, or its flag is none.
            struct.pack(">BI", 0, len(message) + 7) + message,
            struct.pack(">BI", 0, (64 << 20) + 1) + message,
            struct.pack(">BI", 0, (1 << 32) - 1) + message,
            struct.pack(">BI", 0, 0) + message,
            struct.pack(">BI", 1, len(message)) + message,
            struct.pack(">BI", 7, len(message)) + message,
            whole + whole,
            whole[:3],
            b"",
        )
    )
    cut = rng.randrange(len(opened) + 1)
    return rng.choice(
        (
            opened + _frame(_DATA, _END_STREAM, 1, body),
            opened + _frame(_DATA, 0, 1, body),
            opened + _frame(_DATA, 0, 1, whole) + _frame(_RESET, 0, 1, struct.pack(">I", 8)),
            opened + _frame(_DATA, _END_STREAM, 1, whole)[: rng.randrange(9)],
            opened + _frame(_DATA, _END_STREAM, 3, whole),
            opened + _frame(_CONTINUATION, 0, 1, rng.randbytes(20)) + _frame(_WINDOW, 0, 0, b"\0\0\0\0"),
            opened + _frame(rng.randrange(256), rng.randrange(256), rng.getrandbits(31), rng.randbytes(50)),
            opened[:cut] + rng.randbytes(30),
            opened[:cut],
            _PREFACE + _frame(_SETTINGS, 0, 0, rng.randbytes(6)) + _frame(_GOAWAY, 0, 0, rng.randbytes(8)),
            _PREFACE + struct.pack(">I", 0xFFFFFF00)[:3] + rng.randbytes(100),
            b"GET / HTTP/1.1\r\n\r\n",
            rng.randbytes(200),
        )
    )


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _headers(path: str) -> bytes:
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in fields.items())


def _text(text: str) -> bytes:
    """A literal of HPACK, not compressed; at most 126 bytes."""
    return bytes([len(text)]) + text.encode()
