"""The tensors of a checkpoint in safetensors: each rank writes its own, and any number of ranks read what they need.

``<part>-<rank>.safetensors``, with five digits: a rank's rows of every tensor of a part. A tensor is what the files of
its part hold under its name, put together along the first dimension in the order of the ranks; one that is not sharded
is in the file of rank 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from services.trainer.files import digest, fsync
from services.trainer.ranks.group import RankGroup

Tensors = Mapping[str, Mapping[str, torch.Tensor]]
"""By part, then by name."""


class Rows(Protocol):
    """A tensor of which ranges of rows are read: one in memory, or a `StoredTensor`."""

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, rows: Any, /) -> torch.Tensor: ...


Stored = Mapping[str, Mapping[str, Rows]]


class StoredTensor:
    """One tensor of a checkpoint. Nothing of it is read before it is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pieces: list[tuple[Any, torch.Size]] = []
        """The open files that have rows of it, in order, and the shapes of those."""

    def add(self, file: Any) -> None:
        self._pieces.append((file, torch.Size(file.get_slice(self._name).get_shape())))

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        first = self._pieces[0][1]
        return torch.Size((sum(shape[0] for _, shape in self._pieces), *first[1:])) if first else first

    def __getitem__(self, rows: slice | EllipsisType, /) -> torch.Tensor:
        """These rows, without a step and at least one; all of it for ``...``."""
        if not self.shape:
            value: torch.Tensor = self._pieces[0][0].get_tensor(self._name)
            return value
        first, last, _ = (slice(None) if rows is ... else rows).indices(self.shape[0])
        found, begin = [], 0
        for file, shape in self._pieces:
            low, high = max(first - begin, 0), min(last - begin, shape[0])
            if low < high:
                found.append(file.get_slice(self._name)[low:high])
            begin += shape[0]
        return found[0] if len(found) == 1 else torch.cat(found)


def write_shards(directory: Path, tensors: Tensors, group: RankGroup) -> list[dict[str, Any]]:
    """Each rank its own, all of them at a time. On rank 0, when all are done: what each has to say, for `digests`.

    Raises UnavailableError when another rank is gone. Nothing else goes wrong here: a disk that refuses is one of the
    things to say.
    """
    try:
        said: dict[str, Any] = {"digests": write_shard(directory, group.rank, tensors)}
    except OSError as error:
        said = {"error": f"rank {group.rank}: {error}"}
    return group.gather(said)


def digests(said: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Of the files of all ranks, by name. Raises OSError when the disk refused one of them."""
    found: dict[str, str] = {}
    for each in said:
        if "error" in each:
            raise OSError(each["error"])
        found |= each["digests"]
    return dict(sorted(found.items()))


def write_shard(directory: Path, rank: int, tensors: Tensors) -> dict[str, str]:
    """The digests of the files, which are on disk. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    written = {}
    for part, named in tensors.items():
        path = directory / f"{part}-{rank:05d}.safetensors"
        try:
            save_file(dict(named), path)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        fsync(path)
        written[path.name] = digest(path)
    return written


def read_shards(directory: Path, files: Iterable[str]) -> dict[str, dict[str, StoredTensor]]:
    """By part, then by name. The files stay open, and take their room on the disk, as long as one of these is held."""
    parts: dict[str, dict[str, StoredTensor]] = {}
    for name in sorted(files):
        part = parts.setdefault(name.rpartition("-")[0], {})
        file = safe_open(directory / name, framework="pt")
        for key in file.keys():  # noqa: SIM118 (no mapping: it cannot be iterated)
            part.setdefault(key, StoredTensor(key)).add(file)
    return parts
