"""A copy of all weights as large flat buckets, ready for the collective."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import xxhash

from polyhead.v1 import weights_pb2
from services.trainer.weights.shared import IPC, SharedMemory

MIB = 1 << 20


def weights_device(backend: str, training_device: str = "cpu") -> torch.device:
    """Where the weights of a push have to be for a transport of this kind."""
    on_gpu = backend == "nccl" or (backend == IPC and training_device == "cuda")
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def build_manifest(weights: Mapping[str, torch.Tensor], bucket_bytes: int) -> weights_pb2.WeightManifest:
    """Distributes tensors over buckets of at most `bucket_bytes`; a larger tensor gets one of its own. They need no
    content.

    Wide dtypes come first, so that every tensor lies aligned in its bucket without padding; otherwise the order is
    that of `weights`, which must hold tied tensors once.
    """
    manifest = weights_pb2.WeightManifest()
    layout = xxhash.xxh3_128()
    ordered = sorted(weights.items(), key=lambda item: -item[1].element_size())
    for name, tensor in ordered:
        size = tensor.numel() * tensor.element_size()
        if not manifest.buckets or manifest.buckets[-1].num_bytes + size > bucket_bytes:
            manifest.buckets.add()
        bucket = manifest.buckets[-1]
        dtype = str(tensor.dtype).removeprefix("torch.")
        bucket.tensors.add(name=name, dtype=dtype, shape=tensor.shape)
        bucket.num_bytes += size
        manifest.num_bytes += size
        layout.update(f"{len(manifest.buckets)} {name} {dtype} {list(tensor.shape)}\n".encode())
    manifest.layout_digest = layout.hexdigest()
    return manifest


class Snapshot:
    """One reusable set of buckets. It holds a full copy of the weights for as long as it lives."""

    def __init__(
        self, manifest: weights_pb2.WeightManifest, device: torch.device, memory: SharedMemory | None = None
    ) -> None:
        """`memory`: where the buckets lie if engines are to read them there."""
        self.manifest = manifest
        self._memory = memory
        self.buckets: Sequence[torch.Tensor] = [
            torch.empty(bucket.num_bytes, dtype=torch.uint8, device=device)
            if memory is None
            else memory.allocate(bucket.num_bytes)
            for bucket in manifest.buckets
        ]
        self.users = 0
        """Pushes that still read from it."""
        self.filled: torch.cuda.Event | None = None
        """On a GPU, when the last `fill` is done there: the wire has to wait for that, and for nothing else."""
        self._views = {
            name: view
            for bucket, flat in zip(manifest.buckets, self.buckets, strict=True)
            for name, view in _views(bucket, flat)
        }

    @property
    def shared(self) -> Sequence[weights_pb2.SharedBucket]:
        """Where engines find the buckets; empty when they do not read them there."""
        return self._memory.described if self._memory is not None else ()

    def close(self) -> None:
        """Frees its memory. Nobody may be reading from it."""
        self.buckets, self._views = (), {}
        if self._memory is not None:
            self._memory.close()

    def fill(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies all weights in, one after the other, by name: only one of them has to be there at a time.

        Nobody may be reading from the snapshot.
        """
        with torch.no_grad():
            for name, tensor in weights:
                self._views[name].copy_(tensor)
        if self.buckets and self.buckets[0].is_cuda:
            self.filled = torch.cuda.Event()
            self.filled.record()


def _views(bucket: weights_pb2.WeightBucket, flat: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    views = []
    start = 0
    for spec in bucket.tensors:
        shape, dtype = list(spec.shape), getattr(torch, spec.dtype)
        end = start + torch.Size(shape).numel() * dtype.itemsize
        views.append((spec.name, flat[start:end].view(dtype).view(shape)))
        start = end
    return views
