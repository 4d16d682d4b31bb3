"""The group of a trainer's ranks: how they find each other, and what they say to each other.

There are three process groups over the same ranks. The default one carries tensors (gloo on CPUs, NCCL on GPUs) and is
FSDP's; the control group, always gloo, carries messages, and another one like it those of the threads that write
checkpoints. All calls of a group happen in the same order on every rank.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import structlog
import torch
import torch.distributed as dist

from services.common.config.models import TrainerConfig
from services.common.errors import UnavailableError
from services.common.weight_group import LOOPBACK_INTERFACE, is_loopback, listen, nccl_cumem
from services.trainer.ranks.messages import decode, encode

T = TypeVar("T")

log = structlog.get_logger()

FIELD = "trainer.ranks"
BEAT, STOP = "beat", "stop"
# Rank 0 says something at least this often, so that a rank that hears nothing knows that it is gone.
BEAT_S = 2.0


class RankGroup:
    """One process's place among the ranks. The only rank of a trainer of one has nobody to talk to."""

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        control: Any = None,
        context: Any = None,
        context_size: int = 1,
        beside: RankGroup | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.context = context
        """The process group of the ranks that share each packed row with this one; None where nobody does."""
        self.context_size = context_size
        """How many share a row: ranks with consecutive numbers."""
        self.beside = beside or self
        """The same ranks, for a thread of each that says something while the training threads say something else."""
        self._control = control
        self._turn = threading.RLock()
        self._broken = False
        self._ended = threading.Event()

    @classmethod
    def form(cls, config: TrainerConfig, rank: int) -> RankGroup:
        """Returns when all `trainer.ranks` are there. Raises UnavailableError when they are not in time.

        Rank 0 listens at `trainer.rendezvous`. With CPU off-load, a trainer of one rank is a group too.
        """
        if config.ranks == 1 and not config.offload:
            return cls()
        host, _, port = config.rendezvous.rpartition(":")
        if is_loopback(host):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK_INTERFACE)
        if config.device == "cuda":
            nccl_cumem()
        timeout = timedelta(seconds=config.rank_timeout_s)
        leads = rank == 0
        try:
            store = dist.TCPStore(
                host,
                int(port),
                config.ranks,
                is_master=leads,
                timeout=timeout,
                master_listen_fd=listen(host, int(port)) if leads else None,
            )
            backend = "cpu:gloo,cuda:nccl" if config.device == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=config.ranks, timeout=timeout)
            control, beside = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
            context = _context_group(config.ranks, config.context_parallel, rank, timeout)
        except RuntimeError as error:  # torch's DistError is one
            raise UnavailableError(f"they did not all come together: {_line(error)}", field=FIELD) from error
        log.info("ranks_together", rank=rank, ranks=config.ranks)
        alike = cls(rank, config.ranks, beside)
        return cls(rank, config.ranks, control, context, config.context_parallel, alike)

    @property
    def context_rank(self) -> int:
        """Among those that share a row."""
        return self.rank % self.context_size

    @property
    def parts(self) -> int:
        """Into how many a batch is shared out: the data-parallel ranks."""
        return self.size // self.context_size

    @property
    def part(self) -> int:
        """Which of them is this rank's."""
        return self.rank // self.context_size

    def of_parts(self, of_ranks: Sequence[T]) -> list[T]:
        """One of each part: ranks that share rows have come to the same."""
        return list(of_ranks[:: self.context_size])

    def for_ranks(self, of_parts: Sequence[T]) -> list[T]:
        """The reverse."""
        return [of_parts[rank // self.context_size] for rank in range(self.size)]

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @contextmanager
    def command(self, name: str, message: Any = None) -> Iterator[None]:
        """On rank 0: the others are told to do `name` too, and what all of them do together happens inside.

        On the others, which have been told, it only turns the failure of a collective into an UnavailableError.
        """
        with self._turn, self._naming_the_lost():
            if self.leads and self.size > 1:
                self._broadcast([name, message])
            yield

    def receive(self) -> tuple[str, Any]:
        """Not on rank 0: the next command. Raises UnavailableError when rank 0 is gone, or silent for too long."""
        with self._naming_the_lost():
            while True:
                name, message = self._broadcast(None)
                if name != BEAT:
                    return name, message

    def gather(self, message: Any) -> list[Any]:
        """Everybody's messages on rank 0, by rank; nothing on the others."""
        with self._naming_the_lost():
            if self.leads:
                return [message, *(self._recv(rank) for rank in range(1, self.size))]
            self._send(encode(message), 0)
            return []

    def scatter(self, messages: Sequence[Any] = ()) -> Any:
        """This rank's of the `messages` that rank 0 has for each of them."""
        if not self.leads:
            return self._recv(0)
        for rank in range(1, self.size):
            self._send(encode(messages[rank]), rank)
        return messages[0]

    def all_gather(self, message: Any) -> list[Any]:
        """Everybody's messages, by rank: the same on all of them."""
        gathered = self.gather(message)
        if self.size == 1:
            return gathered
        return list(self._broadcast(gathered if self.leads else None))

    def beat(self, lost: Callable[[BaseException], None]) -> None:
        """On rank 0: from here on the others hear something every other second, also while there is nothing to do.

        `lost` gets the UnavailableError when one of them is gone.
        """
        if self.size > 1:
            threading.Thread(target=self._beat, args=(lost,), name="rank-beat", daemon=True).start()

    def close(self) -> None:
        """Rank 0 lets the others leave, unless something they did together has failed. Closing twice does nothing."""
        self._ended.set()
        control, self._control = self._control, None
        if control is None or self._broken:
            return
        if self.leads and self.size > 1:
            self._control = control
            try:
                with self.command(STOP):
                    pass
            except UnavailableError as error:
                log.warning("ranks_not_told", reason=str(error))
            self._control = None
        dist.destroy_process_group()

    def _beat(self, lost: Callable[[BaseException], None]) -> None:
        while not self._ended.wait(BEAT_S):
            if not self._turn.acquire(blocking=False):
                continue  # a command is under way
            try:
                if self._ended.is_set() or self._broken:
                    return
                with self.command(BEAT):
                    pass
            except UnavailableError as error:
                lost(error)
                return
            finally:
                self._turn.release()

    @contextmanager
    def _naming_the_lost(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._broken = True
            if self.size > 1 and _is_of_a_collective(error):
                reason = f"rank {self.rank} of {self.size} lost another one: {_line(error)}"
                raise UnavailableError(reason, field=FIELD) from error
            raise

    def _broadcast(self, message: Any) -> Any:
        data = encode(message) if self.leads else b""
        size = torch.tensor([len(data)], dtype=torch.int64)
        dist.broadcast(size, 0, group=self._control)
        flat = _tensor(data) if self.leads else torch.empty(int(size.item()), dtype=torch.uint8)
        dist.broadcast(flat, 0, group=self._control)
        return message if self.leads else decode(flat.numpy().tobytes())

    def _send(self, data: bytes, rank: int) -> None:
        dist.send(torch.tensor([len(data)], dtype=torch.int64), rank, group=self._control)
        dist.send(_tensor(data), rank, group=self._control)

    def _recv(self, rank: int) -> Any:
        size = torch.empty(1, dtype=torch.int64)
        dist.recv(size, rank, group=self._control)
        flat = torch.empty(int(size.item()), dtype=torch.uint8)
        dist.recv(flat, rank, group=self._control)
        return decode(flat.numpy().tobytes())


def _context_group(ranks: int, size: int, rank: int, timeout: timedelta) -> Any:
    """Every rank makes all of these groups, in the same order, and keeps its own."""
    if size == 1:
        return None
    groups = [dist.new_group(list(range(first, first + size)), timeout=timeout) for first in range(0, ranks, size)]
    return groups[rank // size]


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _is_of_a_collective(error: BaseException) -> bool:
    """gloo's errors are plain RuntimeErrors that name its source files."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _line(error: BaseException) -> str:
    """What gloo says, without where in its source it says so, and without its advice."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).partition(". ")[0]
