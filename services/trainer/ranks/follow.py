"""The life of a rank that is not the first: it does what rank 0 says, until that says stop."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import structlog

from polyhead.v1 import buffer_pb2 as pb
from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.common.process import keep_loaded
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.batch.lease import fetch_all
from services.trainer.checkpoint import read
from services.trainer.io_thread import Io
from services.trainer.ranks import commands
from services.trainer.ranks.group import STOP, RankGroup
from services.trainer.ranks.shares import Fetch, clock_of, own_batches
from services.trainer.shards import write_shards
from services.trainer.step import follow_batch, masking_of

log = structlog.get_logger()


def follow(config: Config, io: Io, buffer: BufferClient, rank: int) -> None:
    """Returns when rank 0 lets go. Raises UnavailableError when it, or another rank, is gone."""

    def fetch(samples: list[pb.LeasedSample]) -> None:
        io.call(fetch_all(buffer, samples, config.buffer.limits))

    group = RankGroup.form(config.trainer, rank)
    try:
        backend = TorchBackend(config, group)
        keep_loaded()
        obey(config, backend, fetch)
    finally:
        group.close()


def obey(config: Config, backend: TorchBackend, fetch: Fetch) -> None:
    """The command loop."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint") as executor:
        _obey(config, backend, fetch, executor)


def _obey(config: Config, backend: TorchBackend, fetch: Fetch, executor: ThreadPoolExecutor) -> None:
    group = backend.group
    writing: Future[object] | None = None
    while True:
        name, message = group.receive()
        match name:
            case commands.TRAIN:
                masking = masking_of(config, clock_of(message))
                batches = own_batches(message, group.part, masking, fetch, backend.vocab_size)
                follow_batch(backend, batches, config, masking.clock)
            case commands.WEIGHTS:
                _exhaust(backend.tensors())
            case commands.SAVE:
                if writing is not None:
                    writing.result()
                writing = executor.submit(write_shards, Path(message), backend.state(), group.beside)
            case commands.LOAD:
                checkpoint = read(Path(message))
                backend.load_state(checkpoint.tensors, checkpoint.state.optimizer_steps)
            case _:
                assert name == STOP, name
                log.info("told_to_stop")
                return


def _exhaust(tensors: Iterator[object]) -> None:
    """Takes part to the end. A tensor that is whole on every rank may come of it."""
    for _ in tensors:
        pass
