"""The collective of one push channel: the trainer is rank 0, the engine's workers follow.

Both ends build it the way SGLang does, so that the same trainer code talks to any engine. Imports torch: only the
trainer and the engines import this module, and nothing but torch may be needed for it, since SGLang's environment has
none of this project's packages.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

LOOPBACK_INTERFACE = "lo"
# torch ends the whole process when a collective outlasts its group's timeout. Whoever uses the group has a deadline of
# its own and aborts the group then, long before that.
_WATCHDOG_FACTOR = 10


class WeightGroup:
    """A process group apart from the default one. One call at a time; `abort` may come from another thread."""

    def __init__(
        self,
        *,
        backend: str,
        address: str,
        port: int,
        rank: int,
        world_size: int,
        name: str,
        timeout_s: float,
        device: str = "cpu",
    ) -> None:
        """Joins ``tcp://address:port`` and returns when all `world_size` members have.

        Rank 0 listens on `address` alone, and on a loopback address gloo's own connections stay on loopback too:
        nothing in either protocol asks who is calling. `device`: where the tensors are, ``cuda:N`` under NCCL.

        Raises torch.distributed.DistError when they do not within `timeout_s`, ValueError when this process already
        has an open group of that `name`.
        """
        timeout = timedelta(seconds=timeout_s)
        if is_loopback(address):
            # For the rest of the process: the channels of one process all lead the same way.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK_INTERFACE)
        if backend == "nccl":
            nccl_cumem()
        store = dist.TCPStore(
            address,
            port,
            world_size,
            is_master=rank == 0,
            timeout=timeout,
            wait_for_workers=True,
            # By itself the store would listen on all interfaces.
            master_listen_fd=listen(address, port) if rank == 0 else None,
        )
        group, _ = c10d._new_process_group_helper(
            world_size,
            rank,
            [],
            dist.Backend(backend),
            dist.PrefixStore(name, store),
            group_name=name,
            timeout=timeout * _WATCHDOG_FACTOR if backend == "nccl" else timeout,
        )
        c10d._world.pg_group_ranks[group] = {index: index for index in range(world_size)}
        self._group: Any = group
        self._store: Any = store  # rank 0 serves the rendezvous: it lives as long as the group
        self._device = torch.device(device)
        # Of its own: neither training nor decoding is to wait for the wire, nor the wire for them.
        self.stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def enqueue(self, flat: torch.Tensor) -> torch.cuda.Event | None:
        """Sends (rank 0) or fills (others) one contiguous uint8 tensor, on `stream`; the event tells when it is done.

        The first one connects the members, which takes NCCL half a second.
        On a CPU it is done when the call returns, and there is no event. Raises RuntimeError when a member is gone.
        """
        if self.stream is None:
            dist.broadcast(flat, src=0, group=self._group)
            return None
        with torch.cuda.device(self._device), torch.cuda.stream(self.stream):
            work = dist.broadcast(flat, src=0, group=self._group, async_op=True)
            assert work is not None
            work.wait()  # of the stream, not of this thread
            done = torch.cuda.Event(blocking=True)
            done.record(self.stream)
        return done

    def broadcast(self, *flats: torch.Tensor, after: torch.cuda.Event | None = None) -> None:
        """Sends or fills `flats` back to back, once `after` has happened; returns when they have arrived."""
        if self.stream is not None and after is not None:
            self.stream.wait_event(after)
        done = None
        for flat in flats:
            done = self.enqueue(flat)
        if done is not None:
            done.synchronize()

    def abort(self) -> None:
        """Frees whoever waits in a collective for a member that does not answer. The group is of no use afterwards."""
        if self._group is not None and self.stream is not None:
            c10d._abort_process_group(self._group)
            self._group = self._store = None

    def close(self) -> None:
        """Leaves the group. Does not wait for the others. Closing twice does nothing."""
        if self._group is None:
            return
        dist.destroy_process_group(self._group)
        # Their threads have to end before the interpreter does, or it aborts at exit.
        self._group = self._store = None


def nccl_version() -> str:
    """Of this process, for example "2.28.9"; empty where there is none."""
    if not torch.cuda.is_available():
        return ""
    return ".".join(map(str, torch.cuda.nccl.version()))


def nccl_cumem() -> str:
    """How NCCL allocates in this process: both ends of a group have to do it alike. Unless the environment says
    otherwise it is settled here, as SGLang settles it; NCCL reads it when the first communicator is made.
    """
    return os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ip_address(address).is_loopback
    except ValueError:  # a name
        return address == "localhost"


def listen(address: str, port: int) -> int:
    """A listening socket's descriptor; whoever gets it closes it. Raises torch.distributed.DistError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family).detach()
    except OSError as error:
        raise dist.DistNetworkError(f"cannot listen on {address}:{port}: {error.strerror}") from error
