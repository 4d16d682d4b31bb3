"""Memory that is given up and taken back in place: tensors keep their names and views, and lose what was in them."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Releasable:
    """The storages under some tensors, each once."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        self._storages = [(storage, storage.nbytes()) for storage in storages.values()]

    @property
    def num_bytes(self) -> int:
        """That are held at present."""
        return sum(storage.nbytes() for storage, _ in self._storages)

    def release(self) -> None:
        for storage, _ in self._storages:
            storage.resize_(0)

    def resume(self) -> None:
        """Zeros: a masked position of the KV cache still takes part in a product, and 0 × NaN is NaN."""
        for storage, num_bytes in self._storages:
            storage.resize_(num_bytes)
            storage.fill_(0)


class Memory:
    """What the engine holds by SGLang's tags. A tag that is none of these holds nothing here."""

    def __init__(self, weights: Iterable[torch.Tensor], caches: Iterable[torch.Tensor]) -> None:
        self._held = {"weights": Releasable(weights), "kv_cache": Releasable(caches)}
        self.asleep: set[str] = set()

    @property
    def num_bytes(self) -> int:
        return sum(held.num_bytes for held in self._held.values())

    def release(self, tags: Iterable[str]) -> None:
        for tag in self._held.keys() & set(tags) - self.asleep:
            self._held[tag].release()
            self.asleep.add(tag)

    def resume(self, tags: Iterable[str]) -> None:
        for tag in self.asleep & set(tags):
            self._held[tag].resume()
            self.asleep.remove(tag)
