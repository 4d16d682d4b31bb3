"""Blobs: written once, verified, and removed only when nobody has just put them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from polyhead.v1 import sample_pb2
from services.common import wire
from services.common.blobs import Blobs
from services.common.errors import DataLossError, InvalidArgumentError, LimitError


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs")


def file_of(tmp_path: Path, ref: sample_pb2.BlobRef) -> Path:
    return tmp_path / "blobs" / ref.sha256[:2] / ref.sha256


def test_what_was_put_comes_back(blobs: Blobs) -> None:
    ref = blobs.put(b"routes" * 1000)
    assert (len(ref.sha256), ref.size) == (64, 6000)
    assert blobs.get(ref) == b"routes" * 1000
    assert blobs.get(blobs.put(b"")) == b""


def test_content_is_written_once(blobs: Blobs, tmp_path: Path) -> None:
    ref = blobs.put(b"same")
    written = file_of(tmp_path, ref).stat().st_ino
    assert blobs.put(b"same") == ref
    assert file_of(tmp_path, ref).stat().st_ino == written
    assert len(list((tmp_path / "blobs").glob("*/*"))) == 1


def test_missing_and_altered_blobs_are_named(blobs: Blobs, tmp_path: Path) -> None:
    ref = blobs.put(b"content")
    path = file_of(tmp_path, ref)
    path.write_bytes(b"c0ntent")
    with pytest.raises(DataLossError, match="was altered") as altered:
        blobs.get(ref, "refs[router]")
    assert altered.value.field == "refs[router]"
    path.write_bytes(b"content and more")
    with pytest.raises(DataLossError, match="has 16 bytes, not 7"):
        blobs.check(ref, "refs[router]")
    path.unlink()
    for look in (blobs.get, blobs.check):
        with pytest.raises(DataLossError, match="is missing"):
            look(ref, "refs[router]")


def test_putting_again_mends_what_was_altered(blobs: Blobs, tmp_path: Path) -> None:
    ref = blobs.put(b"content")
    file_of(tmp_path, ref).write_bytes(b"c0ntent")
    blobs.put(b"content")
    assert blobs.get(ref) == b"content"


def test_a_blob_that_was_just_put_again_is_not_removed(blobs: Blobs, tmp_path: Path) -> None:
    ref = blobs.put(b"content")
    os.utime(file_of(tmp_path, ref), (0, 0))
    assert list(blobs.older_than(60)) == [ref.sha256]
    blobs.put(b"content")
    assert not blobs.remove(ref.sha256, 60)
    os.utime(file_of(tmp_path, ref), (0, 0))
    assert blobs.remove(ref.sha256, 60)
    assert not blobs.remove(ref.sha256, 60)
    assert list(blobs.older_than(60)) == []


@pytest.mark.parametrize(
    ("refs", "kind", "field"),
    [
        ({"a": "../../etc/passwd"}, InvalidArgumentError, "refs[a].sha256"),
        ({"a": "A" * 64}, InvalidArgumentError, "refs[a].sha256"),
        ({"": "a" * 64}, InvalidArgumentError, "refs"),
        ({f"r{n}": "a" * 64 for n in range(65)}, LimitError, "refs"),
    ],
)
def test_references_are_checked(refs: dict[str, str], kind: type[Exception], field: str) -> None:
    with pytest.raises(kind) as refused:
        wire.check_refs({name: sample_pb2.BlobRef(sha256=digest) for name, digest in refs.items()}, "refs")
    assert refused.value.field == field  # type: ignore[attr-defined]
