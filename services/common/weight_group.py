"""The collective of one push channel: the trainer is rank 0, the engine's workers follow.

Both ends build it the way SGLang does, so that the same trainer code talks to the in-house engine and to SGLang.
Imports torch: only the trainer and the engine import this module.
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


class WeightGroup:
    """A process group apart from the default one. Not thread-safe; every call blocks."""

    def __init__(
        self, *, backend: str, address: str, port: int, rank: int, world_size: int, name: str, timeout_s: float
    ) -> None:
        """Joins ``tcp://address:port`` and returns when all `world_size` members have.

        Rank 0 listens on `address` alone, and on a loopback address gloo's own connections stay on loopback too:
        nothing in either protocol asks who is calling.

        Raises torch.distributed.DistError when they do not within `timeout_s`, ValueError when this process already
        has an open group of that `name`.
        """
        timeout = timedelta(seconds=timeout_s)
        if _is_loopback(address):
            # For the rest of the process: the channels of one process all lead the same way.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK_INTERFACE)
        store = dist.TCPStore(
            address,
            port,
            world_size,
            is_master=rank == 0,
            timeout=timeout,
            wait_for_workers=True,
            # By itself the store would listen on all interfaces.
            master_listen_fd=_listen(address, port) if rank == 0 else None,
        )
        group, _ = c10d._new_process_group_helper(
            world_size,
            rank,
            [],
            dist.Backend(backend),
            dist.PrefixStore(name, store),
            group_name=name,
            timeout=timeout,
        )
        c10d._world.pg_group_ranks[group] = {index: index for index in range(world_size)}
        self._group: Any = group
        self._store: Any = store  # rank 0 serves the rendezvous: it lives as long as the group

    def broadcast(self, flat: torch.Tensor) -> None:
        """Sends (rank 0) or fills (others) one contiguous uint8 tensor. Raises RuntimeError when a member is gone."""
        dist.broadcast(flat, src=0, group=self._group)

    def close(self) -> None:
        """Leaves the group. Does not wait for the others. Closing twice does nothing."""
        if self._group is None:
            return
        dist.destroy_process_group(self._group)
        # Their threads have to end before the interpreter does, or it aborts at exit.
        self._group = self._store = None


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:  # a name
        return address == "localhost"


def _listen(address: str, port: int) -> int:
    """A listening socket's descriptor; whoever gets it closes it. Raises torch.distributed.DistError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family).detach()
    except OSError as error:
        raise dist.DistNetworkError(f"cannot listen on {address}:{port}: {error.strerror}") from error
