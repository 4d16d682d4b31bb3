"""Files of exported groups: JSON lines that people can read, or length-delimited messages that are small."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from google.protobuf import json_format, proto
from google.protobuf.message import DecodeError

from polyhead.v1 import buffer_pb2 as pb
from services.common.errors import ConfigError

_MAX_LINE = 1 << 28


class Writer(Protocol):
    def __call__(self, group: pb.SampleGroup) -> None: ...


def check_name(path: Path) -> None:
    """Raises ConfigError unless the name says which kind of file it is."""
    if path.suffix not in (".jsonl", ".pb"):
        raise ConfigError("must end in .jsonl or .pb", field=str(path))


@contextmanager
def writing(path: Path) -> Iterator[Writer]:
    """Writes groups one by one; the file appears, whole and on disk, when all are written.

    Raises ConfigError when it cannot be written.
    """
    check_name(path)
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            yield _json_writer(file) if path.suffix == ".jsonl" else _binary_writer(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", field=str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def _json_writer(file: BinaryIO) -> Writer:
    def write(group: pb.SampleGroup) -> None:
        text = json_format.MessageToJson(group, indent=None, preserving_proto_field_name=True, ensure_ascii=False)
        file.write(text.encode() + b"\n")

    return write


def _binary_writer(file: BinaryIO) -> Writer:
    stream: Any = file  # typed as BytesIO, without need

    def write(group: pb.SampleGroup) -> None:
        proto.serialize_length_prefixed(group, stream)

    return write


def read(path: Path) -> Iterator[tuple[str, pb.SampleGroup]]:
    """Groups and their places in the file. Raises ConfigError naming the place of what is malformed."""
    check_name(path)
    try:
        with path.open("rb") as file:
            yield from _read_json(path, file) if path.suffix == ".jsonl" else _read_binary(path, file)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", field=str(path)) from error


def _read_json(path: Path, file: BinaryIO) -> Iterator[tuple[str, pb.SampleGroup]]:
    number = 0
    while line := file.readline(_MAX_LINE):
        number += 1
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield where, json_format.Parse(line, pb.SampleGroup())
        except (json_format.ParseError, UnicodeDecodeError) as error:
            raise ConfigError(f"is not a group: {' '.join(str(error).split())[:200]}", field=where) from None


def _read_binary(path: Path, file: BinaryIO) -> Iterator[tuple[str, pb.SampleGroup]]:
    stream: Any = file
    number = 0
    while True:
        number += 1
        where = f"{path} record {number}"
        try:
            group = proto.parse_length_prefixed(pb.SampleGroup, stream)
        except (DecodeError, ValueError) as error:
            raise ConfigError(f"is not a group: {error}", field=where) from None
        if group is None:
            return
        yield where, group
