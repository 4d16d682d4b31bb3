"""Large side data of samples, by reference: files named by their content, written once, verified when they are read."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from polyhead.v1 import sample_pb2
from services.common.errors import DataLossError


class Blobs:
    """A directory of blobs, for any number of processes that see the same filesystem.

    Between `put` and the moment the store knows a sample that refers to it, only its age protects a blob.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def put(self, data: bytes) -> sample_pb2.BlobRef:
        """Returns when the blob is on disk. A blob that is there already counts as new again."""
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked(fcntl.LOCK_SH):
            if _size(path) == len(data) and path.read_bytes() == data:
                os.utime(path)
            else:
                _write(path, data)
        return sample_pb2.BlobRef(sha256=digest, size=len(data))

    def get(self, ref: sample_pb2.BlobRef, field: str = "blob") -> bytes:
        """The content. Raises DataLossError when it is missing or is not what was put."""
        try:
            data = self._path(ref.sha256).read_bytes()
        except FileNotFoundError:
            raise DataLossError(f"blob {ref.sha256} is missing", field=field) from None
        if len(data) != ref.size or hashlib.sha256(data).hexdigest() != ref.sha256:
            raise DataLossError(f"blob {ref.sha256} was altered", field=field)
        return data

    def check(self, ref: sample_pb2.BlobRef, field: str) -> None:
        """Raises DataLossError unless a file of that size is there; does not read it."""
        size = _size(self._path(ref.sha256))
        if size is None:
            raise DataLossError(f"blob {ref.sha256} is missing", field=field)
        if size != ref.size:
            raise DataLossError(f"blob {ref.sha256} has {size} bytes, not {ref.size}", field=field)

    def older_than(self, age_s: float) -> Iterator[str]:
        """Digests of the blobs that were last put so long ago."""
        before = time.time() - age_s
        for path in self._directory.glob("[0-9a-f][0-9a-f]/*"):
            if _put_at(path) <= before:
                yield path.name

    def remove(self, digest: str, age_s: float) -> bool:
        """Deletes a blob unless it was put again meanwhile. Returns whether it did."""
        path = self._path(digest)
        with self._locked(fcntl.LOCK_EX):
            if _put_at(path) > time.time() - age_s:
                return False
            path.unlink(missing_ok=True)
            return True

    def _path(self, digest: str) -> Path:
        return self._directory / digest[:2] / digest

    @contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        """Who looks at a blob's age to delete it and who renews it must not cross."""
        with (self._directory / "lock").open("ab") as lock:
            fcntl.flock(lock, kind)
            yield


def _write(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as part:
        try:
            part.write(data)
            part.flush()
            os.fsync(part.fileno())
            Path(part.name).replace(path)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _put_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
