"""A copy of all weights as large flat buckets, ready for the collective."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import xxhash

from polyhead.v1 import weights_pb2
from services.common.errors import TrainingDivergedError
from services.common.model_files import SCALE_SUFFIX, scale_shape
from services.trainer.weights.form import EngineForm
from services.trainer.weights.quantise import FP8, quantise
from services.trainer.weights.shared import IPC, SharedMemory

MIB = 1 << 20

PLAIN = EngineForm()

# Name, dtype and shape of a tensor on the wire.
_Spec = tuple[str, torch.dtype, tuple[int, ...]]


def weights_device(backend: str, training_device: str = "cpu") -> torch.device:
    """Where the weights of a push have to be for a transport of this kind."""
    on_gpu = backend == "nccl" or (backend == IPC and training_device == "cuda")
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def build_manifest(
    weights: Mapping[str, torch.Tensor], bucket_bytes: int, form: EngineForm = PLAIN
) -> weights_pb2.WeightManifest:
    """Distributes tensors over buckets of at most `bucket_bytes`; a larger tensor gets one of its own. They need no
    content.

    Those that `form` has in fp8 travel as float8_e4m3fn, with their scales as another tensor. Wide dtypes come first,
    so that every tensor lies aligned in its bucket without padding; otherwise the order is that of `weights`, which
    must hold tied tensors once.
    """
    manifest = weights_pb2.WeightManifest()
    layout = xxhash.xxh3_128()
    specs = [spec for name, tensor in form.named(weights.items()) for spec in _specs(name, tensor, form)]
    for name, dtype, shape in sorted(specs, key=lambda spec: -spec[1].itemsize):
        size = torch.Size(shape).numel() * dtype.itemsize
        if not manifest.buckets or manifest.buckets[-1].num_bytes + size > bucket_bytes:
            manifest.buckets.add()
        bucket = manifest.buckets[-1]
        dtype_name = str(dtype).removeprefix("torch.")
        bucket.tensors.add(name=name, dtype=dtype_name, shape=shape)
        bucket.num_bytes += size
        manifest.num_bytes += size
        layout.update(f"{len(manifest.buckets)} {name} {dtype_name} {list(shape)}\n".encode())
    manifest.layout_digest = layout.hexdigest()
    return manifest


def _specs(name: str, tensor: torch.Tensor, form: EngineForm) -> Iterator[_Spec]:
    shape = tuple(tensor.shape)
    if name in form.fp8:
        yield name, FP8, shape
        yield name + SCALE_SUFFIX, torch.float32, scale_shape(shape)
    else:
        yield name, tensor.dtype, shape


class Snapshot:
    """One reusable set of buckets. It holds a full copy of the weights for as long as it lives."""

    def __init__(
        self,
        manifest: weights_pb2.WeightManifest,
        device: torch.device,
        form: EngineForm = PLAIN,
        memory: SharedMemory | None = None,
    ) -> None:
        """`memory`: where the buckets lie if engines are to read them there."""
        self._form = form
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
        self.views = {
            name: view
            for bucket, flat in zip(manifest.buckets, self.buckets, strict=True)
            for name, view in _views(bucket, flat)
        }
        """Every tensor of the manifest by its name."""
        self._scales = {name: self.views[name + SCALE_SUFFIX] for name in self.views if name in form.fp8}
        self._began: torch.cuda.Event | None = None
        self._fill_s = 0.0

    @property
    def shared(self) -> Sequence[weights_pb2.SharedBucket]:
        """Where engines find the buckets; empty when they do not read them there."""
        return self._memory.described if self._memory is not None else ()

    def close(self) -> None:
        """Frees its memory. Nobody may be reading from it."""
        self.buckets, self.views, self._scales = (), {}, {}
        if self._memory is not None:
            self._memory.close()

    def fill(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies all weights in, one after the other, by name: only one of them has to be there at a time. Those that
        travel as fp8 are quantised on the way.

        Nobody may be reading from the snapshot. Raises TrainingDivergedError when a weight that is quantised is not
        finite, which is waited for on a GPU.
        """
        began = time.monotonic()
        if self.buckets and self.buckets[0].is_cuda:
            self._began = torch.cuda.Event(enable_timing=True)
            self._began.record()
        with torch.no_grad():
            for name, tensor in self._form.named(weights):
                if name in self._scales:
                    quantise(tensor, self.views[name], self._scales[name])
                else:
                    self.views[name].copy_(tensor)
        if self._began is not None:
            self.filled = torch.cuda.Event(enable_timing=True)
            self.filled.record()
        self._check_finite()
        self._fill_s = time.monotonic() - began

    def fill_s(self) -> float:
        """Seconds that the last `fill` took, on a GPU by its clock; it waits until it is done there."""
        if self._began is None or self.filled is None:
            return self._fill_s
        self.filled.synchronize()
        return self._began.elapsed_time(self.filled) / 1e3

    def _check_finite(self) -> None:
        if not self._scales or torch.cat([scale.flatten() for scale in self._scales.values()]).isfinite().all():
            return
        name = next(name for name, scale in self._scales.items() if not scale.isfinite().all())
        raise TrainingDivergedError("a weight that is to be pushed is not finite", field=name)


def _views(bucket: weights_pb2.WeightBucket, flat: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    views = []
    start = 0
    for spec in bucket.tensors:
        shape, dtype = list(spec.shape), getattr(torch, spec.dtype)
        end = start + torch.Size(shape).numel() * dtype.itemsize
        views.append((spec.name, flat[start:end].view(dtype).view(shape)))
        start = end
    return views
