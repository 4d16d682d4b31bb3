"""The transport `ipc`: engines on the trainer's machine read the buckets where they are, so nothing is sent."""

from __future__ import annotations

from pathlib import Path

import torch

from polyhead.v1 import weights_pb2
from services.common.errors import UnavailableError
from services.common.weight_memory import SharedDeviceMemory, SharedFile

IPC = "ipc"


class SharedMemory:
    """Where the buckets of one snapshot lie, in a form that engines can open."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        """`directory` is for buckets on a CPU."""
        self._directory = directory
        self._device = device
        self._held: list[SharedFile | SharedDeviceMemory] = []
        self.described: list[weights_pb2.SharedBucket] = []
        """In the order of their allocation."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """One bucket, uint8[num_bytes]. Raises UnavailableError when there is no room for it."""
        try:
            if self._device.type == "cuda":
                memory = SharedDeviceMemory(self._device, num_bytes)
                self.described.append(weights_pb2.SharedBucket(handle=memory.handle, device=memory.device))
                self._held.append(memory)
                return memory.tensor
            file = SharedFile(self._directory, num_bytes)
        except (MemoryError, OSError) as error:
            raise UnavailableError(f"cannot share {num_bytes} bytes: {error}", field="trainer.weights") from error
        self.described.append(weights_pb2.SharedBucket(file=file.name))
        self._held.append(file)
        return file.tensor

    def close(self) -> None:
        """No engine can open them any more. On a GPU they are free as soon as nobody here has a view of them."""
        for memory in self._held:
            memory.close()
        self._held.clear()
        self.described.clear()


class SharedGroup:
    """Stands where a collective would: the bytes are in place already."""

    def broadcast(self, *flats: torch.Tensor, after: torch.cuda.Event | None = None) -> None:
        """Returns when `flats` may be read, which is when `after` has happened."""
        if after is not None:
            after.synchronize()

    def abort(self) -> None:
        """Nobody waits in it."""

    def close(self) -> None:
        """There is nothing to leave."""
