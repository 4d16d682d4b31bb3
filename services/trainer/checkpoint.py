"""Checkpoints: safetensors and JSON in ``run.dir/checkpoints/step_00000020``, written atomically.

model-00000.safetensors      weights by Hugging Face name, in the model's dtype: the rows of rank 0
optimizer-00000.safetensors  ``<kind>/<parameter name>``: moments, step counters, float32 master weights where there are
critic-00000.safetensors, critic_optimizer-00000.safetensors
                             the same of PPO's critic, where there is one; its head is float32
adapter-00000.safetensors    instead of model-*, where adapters are trained: theirs, float32; the model is not in it
rng-00000.safetensors        ``<generator>/<rank>``: states of the random number generators, uint8
...                          the same of the other ranks
state.json                   `CheckpointState`, and the digest of each file above
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import structlog
from google.protobuf import json_format

from polyhead.v1 import buffer_pb2 as pb
from services.common.errors import FencedError
from services.common.versions import Version
from services.trainer.files import digest, remove_temporary, temporary_for, write_directory
from services.trainer.lora import LoraState
from services.trainer.ranks.group import RankGroup
from services.trainer.shards import StoredTensor, Tensors, digests, read_shards, write_shards

log = structlog.get_logger()

FORMAT = 2
STATE = "state.json"


@dataclass(frozen=True)
class CheckpointState:
    """All of a checkpoint but its tensors."""

    step: int
    """Training steps committed."""
    version: Version
    """The weights' version: (epoch that wrote it, step)."""
    optimizer_steps: int
    model: str
    """The Hugging Face directory that training began with: configuration and tokenizer are the same."""
    dtype: str
    """Of the model, as in `model.dtype`."""
    config_digest: str
    """Of the settings that shape training: a resumed run may say that they changed."""
    watermark: dict[str, Any] | None
    """A Watermark in protobuf's JSON form; None when the buffer could not be asked before the process had to leave."""
    lora: LoraState | None = None
    """Of adapters; None: all weights are in it."""

    def watermark_message(self) -> pb.Watermark | None:
        return None if self.watermark is None else json_format.ParseDict(self.watermark, pb.Watermark())


@dataclass(frozen=True)
class Checkpoint:
    directory: Path
    state: CheckpointState
    tensors: dict[str, dict[str, StoredTensor]]
    """By part, then by name."""


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, run_dir: Path, keep_last: int) -> None:
        self._root = run_dir / "checkpoints"
        self._keep_last = keep_last

    def clean(self) -> None:
        """Removes unfinished checkpoints of dead processes."""
        remove_temporary(self._root)

    def steps(self) -> list[int]:
        """Steps of all checkpoints that have a name, oldest first, good or not."""
        return sorted(int(path.name.removeprefix("step_")) for path in self._root.glob("step_????????"))

    def newest_epoch(self) -> int:
        """The highest epoch that any checkpoint was written in; 0 for none. Damaged weights do not matter here."""
        epochs = [0]
        for step in self.steps():
            try:
                epochs.append(int(orjson.loads((self._directory(step) / STATE).read_bytes())["version"]["epoch"]))
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return max(epochs)

    def temporary(self, step: int) -> Path:
        """Where all ranks write a checkpoint of `step` before it has its name."""
        return temporary_for(self._directory(step))

    def save(self, state: CheckpointState, tensors: Tensors, temporary: Path, group: RankGroup) -> int:
        """Writes, verifies, and removes the oldest beyond `keep_last`. Returns the oldest step that is kept.

        The other ranks of `group` call `write_shards` meanwhile, for the same `temporary` directory.

        Raises OSError when the disk refuses, or gives back something else than was written; FencedError when there are
        checkpoints of a later epoch already: a trainer that was superseded replaces none of them. Should a later one
        write this very step between that look and the rename, it is replaced after all, and a resumption starts from
        the one before, which is kept and not retired, unless `keep_last` is 1. UnavailableError when a rank is gone.
        """
        said = write_shards(temporary, tensors, group)

        def fill(path: Path) -> None:
            _write_state(path, state, digests(said))
            if (newest := self.newest_epoch()) > state.version.epoch:
                raise FencedError(f"{state.version.epoch} was superseded by {newest}", field="epoch")

        directory = self._directory(state.step)
        write_directory(directory, fill, temporary)
        if (reason := problem(directory)) is not None:
            raise OSError(f"{directory} does not verify after writing: {reason}")
        return self._prune(state.step, self._keep_last)

    def keep_only(self, step: int) -> None:
        """Removes all checkpoints before that of `step`."""
        self._prune(step, 1)

    def load_newest(self, forks: Mapping[int, int] | None = None) -> Checkpoint | None:
        """The newest checkpoint that is complete, verifies, and is of the surviving history; others are skipped with a
        warning. `forks` has the step that each epoch began at.
        """
        for step in reversed(self.steps()):
            directory = self._directory(step)
            reason = problem(directory) or _abandoned(directory, forks or {})
            if reason is None:
                return read(directory)
            log.warning("checkpoint_skipped", step=step, reason=reason)
        return None

    def _prune(self, newest: int, count: int) -> int:
        """Of the checkpoints up to `newest` keeps the last `count`. Returns the step of the oldest kept."""
        steps = [step for step in self.steps() if step <= newest]
        for step in steps[:-count]:
            shutil.rmtree(self._directory(step))
        return steps[-count:][0]

    def _directory(self, step: int) -> Path:
        return self._root / f"step_{step:08d}"


def read(directory: Path) -> Checkpoint:
    """A checkpoint that is known to be whole. Raises OSError, ValueError or KeyError for one that is not."""
    document = orjson.loads((directory / STATE).read_bytes())
    return Checkpoint(directory, _state(document), read_shards(directory, document["files"]))


def problem(directory: Path) -> str | None:
    """Why the checkpoint cannot be used; None when it can."""
    try:
        document = orjson.loads((directory / STATE).read_bytes())
        if document["format"] != FORMAT:
            return f"format {document['format']}, expected {FORMAT}"
        _state(document)
        with ThreadPoolExecutor(thread_name_prefix="digest") as threads:
            found = threads.map(lambda name: digest(directory / name), document["files"])
            for (name, expected), content in zip(document["files"].items(), found, strict=True):
                if content != expected:
                    return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _write_state(directory: Path, state: CheckpointState, files: Mapping[str, str]) -> None:
    document = {"format": FORMAT, **asdict(state), "version": state.version._asdict(), "files": files}
    (directory / STATE).write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))


def _abandoned(directory: Path, forks: Mapping[int, int]) -> str | None:
    """Why a checkpoint that is whole is of no use: a later epoch began below its step, so that its trainer had been
    superseded when it wrote it; None for one of the surviving history.
    """
    version = Version(**orjson.loads((directory / STATE).read_bytes())["version"])
    for epoch, step in forks.items():
        if epoch > version.epoch and step < version.step:
            return f"{version} was abandoned: epoch {epoch} began at step {step}"
    return None


def _state(document: Mapping[str, Any]) -> CheckpointState:
    return CheckpointState(
        step=document["step"],
        version=Version(**document["version"]),
        optimizer_steps=document["optimizer_steps"],
        model=document["model"],
        dtype=document["dtype"],
        config_digest=document["config_digest"],
        watermark=document["watermark"],
        lora=None if (lora := document.get("lora")) is None else LoraState(**lora),
    )
