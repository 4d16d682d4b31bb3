"""The collective of one push channel: the trainer is rank 0, the engine's workers follow.

Both ends build it the way SGLang does, so that the same trainer code talks to the in-house engine and to SGLang.
Imports torch: only the trainer and the engine import this module.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


class WeightGroup:
    """A process group apart from the default one. Not thread-safe; every call blocks."""

    def __init__(
        self, *, backend: str, address: str, port: int, rank: int, world_size: int, name: str, timeout_s: float
    ) -> None:
        """Joins ``tcp://address:port`` and returns when all `world_size` members have.

        Raises torch.distributed.DistError when they do not within `timeout_s`, ValueError when this process already
        has an open group of that `name`.
        """
        timeout = timedelta(seconds=timeout_s)
        store = dist.TCPStore(address, port, world_size, is_master=rank == 0, timeout=timeout, wait_for_workers=True)
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
