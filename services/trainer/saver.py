"""Checkpoints beside training: on each rank the training thread copies and another one writes; rank 0's also verifies
and confirms.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import structlog
from google.protobuf import json_format

from polyhead.v1 import buffer_pb2 as pb
from services.common.buffer_client import BufferClient
from services.common.errors import PolyheadError, UnavailableError
from services.common.versions import Version
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.checkpoint import CheckpointState, CheckpointStore
from services.trainer.io_thread import Io
from services.trainer.lora import LoraState
from services.trainer.ranks import commands
from services.trainer.ranks.group import RankGroup
from services.trainer.shards import Tensors

log = structlog.get_logger()

# Between two attempts to make room in the store, when the disk had none for the checkpoint that takes.
RELIEVE_AGAIN_S = 30.0
# A process that has been told to stop does not wait longer than this for a buffer that may be gone already.
BUFFER_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Origin:
    """What a checkpoint says of the run that it is of."""

    model: str
    """The directory that training began with."""
    dtype: str
    config_digest: str
    lora: LoraState | None = None


class Saver:
    """One checkpoint at a time: the next waits until the last is on disk. Each rank holds a copy of its part meanwhile.

    A disk that refuses a checkpoint ends nothing: the ones before stay, training goes on, and the next one is tried
    when it is due. Only at the end of the run, `finish` raises it.
    """

    def __init__(
        self, store: CheckpointStore, buffer: BufferClient, io: Io, epoch: int, origin: Origin, last_step: int
    ) -> None:
        """`last_step` is the step of the checkpoint the run starts from; 0 for none."""
        self._store = store
        self._buffer = buffer
        self._io = io
        self._epoch = epoch
        self._origin = origin
        self._saved_step = last_step
        self._failure: PolyheadError | None = None
        """Why the last checkpoint was not written."""
        self._relieved_at = 0
        self._relieve_after = 0.0
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, backend: TorchBackend, version: Version) -> None:
        """Copies the state and returns; the rest happens beside training. Nothing to do if this step has been saved.

        Raises what ended the save before, but for a disk that refused; and FencedError when another trainer has taken
        over.
        """
        self._wait()
        if version.step == self._saved_step:
            return
        watermark = self._io.call(self._watermark(version.step))
        state = CheckpointState(
            step=version.step,
            version=version,
            optimizer_steps=backend.optimizer_steps,
            model=self._origin.model,
            dtype=self._origin.dtype,
            config_digest=self._origin.config_digest,
            watermark=None if watermark is None else json_format.MessageToDict(watermark),
            lora=self._origin.lora,
        )
        temporary = self._store.temporary(version.step)
        with backend.group.command(commands.SAVE, str(temporary)):
            tensors = backend.state()
        self._writing = self._submit(self._write, state, tensors, temporary, backend.group.beside)

    def relieve(self, backend: TorchBackend, version: Version) -> None:
        """The buffer's store is filling up: like `save`, and then everything up to this step is given up.

        Older checkpoints go first, because what the buffer retires can not be replayed from them any more. Before the
        first step there is nothing to give up, and a second call for the same step does nothing.
        """
        if version.step in (0, self._relieved_at) or time.monotonic() < self._relieve_after:
            return
        self._relieve_after = time.monotonic() + RELIEVE_AGAIN_S
        self.save(backend, version)
        self._writing = self._submit(self._keep_only, version.step, self._writing)

    def finish(self) -> None:
        """Returns when the last checkpoint is on disk and confirmed. Raises what kept it from that."""
        self._wait()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        self._executor.shutdown(wait=True)

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _submit(self, work: Callable[..., None], *arguments: object) -> Future[None]:
        # The context carries what every log line says.
        return self._executor.submit(contextvars.copy_context().run, work, *arguments)

    def _keep_only(self, step: int, written: Future[None] | None) -> None:
        """`written` is the save of that very step. It has ended: there is one thread."""
        if written is not None:
            written.result()
        if step != self._saved_step:
            return
        try:
            self._store.keep_only(step)
        except OSError as error:
            raise PolyheadError(f"older checkpoints were not removed: {error}", field="run.dir") from error
        self._relieved_at, self._relieve_after = step, 0.0
        log.info("store_relieved", step=step)
        self._io.call(self._confirm(step))

    def _write(self, state: CheckpointState, tensors: Tensors, temporary: Path, group: RankGroup) -> None:
        try:
            oldest = self._store.save(state, tensors, temporary, group)
        except OSError as error:
            failure = PolyheadError(f"the checkpoint of step {state.step} was not written: {error}", field="run.dir")
            log.error("checkpoint_not_written", step=state.step, reason=str(error))
            self._failure = failure
            return
        self._saved_step, self._failure = state.step, None
        log.info("checkpoint_written", step=state.step, oldest_kept=oldest)
        self._io.call(self._confirm(oldest))

    async def _watermark(self, step: int) -> pb.Watermark | None:
        try:
            async with asyncio.timeout(BUFFER_TIMEOUT_S):
                return await self._buffer.get_watermark(self._epoch, step)
        except (TimeoutError, UnavailableError) as error:
            log.warning("checkpoint_without_watermark", step=step, reason=str(error) or "the buffer does not answer")
            return None

    async def _confirm(self, oldest_kept_step: int) -> None:
        try:
            async with asyncio.timeout(BUFFER_TIMEOUT_S):
                await self._buffer.confirm_checkpoint(self._epoch, oldest_kept_step)
        except (TimeoutError, UnavailableError) as error:
            # The next one covers it.
            log.warning("checkpoint_not_confirmed", step=oldest_kept_step, reason=str(error) or "no answer")
