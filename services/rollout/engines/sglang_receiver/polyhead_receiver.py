"""Where weights arrive inside SGLang: two functions for its --custom-weight-loader, and what they share.

SGLang's own way of receiving a bucket copies each byte three times within the pause: into a concatenation of empty
tensors, off the wire, into the model. Here the bytes arrive in *slots* that are allocated once. As many buckets as
there are slots arrive while the engine decodes; only the copies into the model, and the wire of whatever did not fit,
take place in the pause. Where the trainer shares its memory with the engine, its buckets themselves are the slots.

`start` runs once in each scheduler process and opens a Unix socket there; the replica, which runs on this machine,
drives the rest by it. `load` runs in the scheduler's loop, while the engine is paused. Only the standard library and
torch may be imported: this is SGLang's environment.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DIRECTORY_VARIABLE = "POLYHEAD_RECEIVER_DIR"
SHARED_VARIABLE = "POLYHEAD_SHARED_DIR"
"""Where the trainer shares buckets on a CPU."""
# Left to SGLang for what it allocates itself while it runs.
RESERVE_BYTES = 1 << 30
_SHARED = -1
_LINE_MAX = 64 << 20

# Where a view lies in its storage: dtype, offset, size, stride.
Place = tuple[torch.dtype, int, torch.Size, tuple[int, ...]]
# Targets in the model, and where each one's bytes are in the slot; for each dtype, since copies of several are not made
# at once.
Copies = list[tuple[list[torch.Tensor], list[Place]]]


def _common(name: str) -> Any:
    """A module that the trainer uses too, by its place: this environment does not have the package."""
    path = Path(__file__).parents[3] / "common" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"polyhead_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


weight_group = _common("weight_group")
weight_memory = _common("weight_memory")


class Plan:
    """One layout of buckets: the slots that they arrive in, and how they get from there into the model."""

    def __init__(self, buckets: Sequence[Mapping[str, Any]], slots: Sequence[torch.Tensor]) -> None:
        self.sizes = [bucket["num_bytes"] for bucket in buckets]
        self._tensors = [bucket["tensors"] for bucket in buckets]
        self._slots = slots
        self._copies: list[Copies | None] = [None] * len(buckets)
        self._sources: list[list[list[torch.Tensor]] | None] = [None] * len(buckets)
        """Of the recorded copies, in the present slots; None until they are wanted."""
        self._addresses: tuple[int, ...] = ()

    def rebase(self, slots: Sequence[torch.Tensor]) -> None:
        """The slots are these from here on, of the same sizes, or none; what is recorded stays true of them."""
        self._slots = slots
        self._sources = [None] * len(self.sizes)

    @property
    def recorded(self) -> float:
        """The share of buckets whose copies are known."""
        return sum(copies is not None for copies in self._copies) / len(self._copies)

    def target(self, bucket: int) -> torch.Tensor:
        return self._slots[bucket % len(self._slots)][: self.sizes[bucket]]

    def check(self, model: Any) -> None:
        """Forgets the recorded copies if the model's parameters are not where they were."""
        addresses = tuple(tensor.data_ptr() for tensor in _weights(model))
        if addresses != self._addresses:
            self._addresses = addresses
            self._copies = [None] * len(self.sizes)
            self._sources = [None] * len(self.sizes)

    def load(self, model: Any, bucket: int) -> None:
        """Copies an arrived bucket into the model. The copies that `load_weights` makes the first time are made again
        later: it spends more time on names than the GPU on bytes.
        """
        slot, copies = self.target(bucket), self._copies[bucket]
        if copies is None:
            with _Recorder() as recorder:
                model.load_weights(_views(self._tensors[bucket], slot))
            self._copies[bucket] = recorder.copies(model, slot)
            return
        found = self._sources[bucket]
        if found is None:
            found = self._sources[bucket] = [[_at(place, slot) for place in places] for _, places in copies]
        for (targets, _), sources in zip(copies, found, strict=True):
            torch._foreach_copy_(targets, sources)


def _at(place: Place, slot: torch.Tensor) -> torch.Tensor:
    dtype, *where = place
    return torch.empty(0, dtype=dtype, device=slot.device).set_(slot.untyped_storage(), *where)


_HARMLESS = (torch.ops.aten.detach.default, torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default)


class _Recorder(TorchDispatchMode):
    """Notes each copy; `pure` as long as there were only copies, views of what is copied, and paddings that stay."""

    def __init__(self) -> None:
        super().__init__()
        self._targets: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        self._pure = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self._targets.append(args[0])
            self._sources.append(args[1])
        elif not func.is_view and func not in _HARMLESS:
            self._pure = False
        return func(*args, **(kwargs or {}))

    def copies(self, model: Any, slot: torch.Tensor) -> Copies | None:
        """None when what happened was more than copies from the slot into the model."""
        storages = {tensor.untyped_storage().data_ptr() for tensor in _weights(model)}
        source = slot.untyped_storage().data_ptr()
        into = all(target.untyped_storage().data_ptr() in storages for target in self._targets)
        out_of = all(each.untyped_storage().data_ptr() == source for each in self._sources)
        if not (self._pure and into and out_of and self._targets):
            return None
        by_dtypes: dict[Any, tuple[list[torch.Tensor], list[Place]]] = {}
        for target, copied in zip(self._targets, self._sources, strict=True):
            pair = [target.detach(), copied.detach()]
            if target.dtype == copied.dtype and target.element_size() == 1:
                pair = [each.view(torch.uint8) for each in pair]  # fp8 is copied as bytes
            targets, places = by_dtypes.setdefault(tuple(each.dtype for each in pair), ([], []))
            targets.append(pair[0])
            places.append((pair[1].dtype, pair[1].storage_offset(), pair[1].size(), pair[1].stride()))
        return list(by_dtypes.values())


class Receiver:
    """Of one tensor-parallel rank. Commands come one at a time, but `abort`; `load` comes from the scheduler."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = next(_weights(model)).device
        self._group: Any = None
        self._slots: list[torch.Tensor] = []
        self._plan: Plan | None = None
        self._known = ("", 0)
        """Digest and memory of the plan; the memory of one with the trainer's buckets is `_SHARED`."""
        self._arrived: list[Any] = []
        """For each bucket that was received ahead of the pause, the event of its arrival."""
        self._marks: list[tuple[str, Any]] = []
        self._load_cpu_s = 0.0
        """What the last load took of the scheduler's time."""
        self._watchers: list[socket.socket] = []
        """Will be told how the next load went."""
        self._one_command = threading.Lock()

    def handle(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One command; an error is an answer too."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread
        verb = request["verb"]
        try:
            if verb == "abort":
                return self._abort()
            with self._one_command:
                commands: dict[str, Callable[..., dict[str, Any]]] = {
                    "hello": self._hello,
                    "join": self._join,
                    "leave": self._leave,
                    "prepare": self._prepare,
                    "receive": self._receive,
                    "timings": self._timings,
                }
                return commands[verb](**request.get("arguments", {}))
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def _hello(self) -> dict[str, Any]:
        return {"nccl_version": weight_group.nccl_version(), "nccl_cumem": weight_group.nccl_cumem()}

    def _join(self, rank_offset: int, **group: Any) -> dict[str, Any]:
        self._leave()
        rank = rank_offset + _rank()
        self._group = weight_group.WeightGroup(rank=rank, device=str(self._device), **group)
        return {}

    def _leave(self) -> dict[str, Any]:
        group, self._group = self._group, None
        if group is not None:
            group.close()
        self._release_shared()
        return {}

    def _abort(self) -> dict[str, Any]:
        """Frees whoever waits for bytes that will not come; under gloo once the trainer's end is closed too."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()
        return {}

    def _prepare(
        self,
        digest: str,
        buckets: Sequence[Mapping[str, Any]] | None,
        memory: int,
        shared: Sequence[Mapping[str, str]] = (),
    ) -> dict[str, Any]:
        """Makes ready for a layout, in slots of at most `memory` bytes in all but at least two, or in the trainer's
        buckets where these are `shared`: how many will be taken ahead of the pause. `buckets` may be left out for a
        layout that is known.
        """
        self._arrived, self._watchers = [], []
        if shared:
            return self._prepare_shared(digest, buckets, shared)
        if self._plan is None or self._known != (digest, memory):
            if buckets is None:
                return {"unknown": True}
            _check_fp8(self._model, buckets)
            self._plan = None  # its slots are given up first
            self._slots = self._allocate([bucket["num_bytes"] for bucket in buckets], memory)
            self._plan, self._known = Plan(buckets, self._slots), (digest, memory)
        return {"ahead": min(len(self._slots), len(self._plan.sizes))}

    def _prepare_shared(
        self, digest: str, buckets: Sequence[Mapping[str, Any]] | None, shared: Sequence[Mapping[str, str]]
    ) -> dict[str, Any]:
        """Opens the trainer's buckets, until they have been loaded."""
        known = self._plan if self._known == (digest, _SHARED) else None
        if known is None and buckets is None:
            return {"unknown": True}
        if known is None:
            _check_fp8(self._model, buckets or ())
        self._slots = []
        sizes = known.sizes if known is not None else [bucket["num_bytes"] for bucket in buckets or ()]
        self._slots = [self._open(place, size) for place, size in zip(shared, sizes, strict=True)]
        if known is not None:
            known.rebase(self._slots)
        elif buckets is not None:
            self._plan, self._known = Plan(buckets, self._slots), (digest, _SHARED)
        return {"ahead": len(sizes)}

    def _open(self, place: Mapping[str, str], num_bytes: int) -> torch.Tensor:
        opened: torch.Tensor
        if place["file"]:
            opened = weight_memory.open_file(Path(os.environ[SHARED_VARIABLE]), place["file"], num_bytes)
        else:
            handle = b64decode(place["handle"])
            opened = weight_memory.open_handle(handle, place["device"], num_bytes, self._device)
        return opened

    def _release_shared(self) -> None:
        """The trainer is going to free its buckets: nothing here may still map them."""
        if self._known[1] != _SHARED or self._plan is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self._plan.rebase([])
        self._slots = []

    def _allocate(self, sizes: Sequence[int], memory: int) -> list[torch.Tensor]:
        """Raises MemoryError when there is no room for as few as two slots."""
        self._slots = []
        largest = max(sizes)
        # With a slot for each bucket, none need be larger than its bucket.
        fitting = max(min(2, len(sizes)), memory // largest)
        wanted = sizes if sum(sizes) <= memory else [largest] * min(len(sizes), fitting)
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # nobody may still be reading from what is given back now
            torch.cuda.empty_cache()
            room = torch.cuda.mem_get_info(self._device)[0] - RESERVE_BYTES
            if sum(wanted) > room:
                wanted = [largest] * min(len(sizes), max(0, room) // largest)
            if len(wanted) < min(2, len(sizes)):
                raise MemoryError(f"two buckets of {largest} bytes have no room in {max(0, room)}")
        return [torch.empty(size, dtype=torch.uint8, device=self._device) for size in wanted]

    def _receive(self) -> dict[str, Any]:
        """Returns when the buckets that fit have arrived. The engine may decode: nothing touches the model."""
        plan, group = self._plan, self._group
        assert plan is not None, "prepare comes first"
        began = time.monotonic()
        plan.check(self._model)
        if self._known[1] == _SHARED:
            self._arrived = [None] * len(plan.sizes)
            return {"seconds": time.monotonic() - began}
        assert group is not None, "join comes first"
        if self._marks and self._marks[-1][1] is not None:
            group.stream.wait_event(self._marks[-1][1])  # until then the slots are being read
        try:
            arrived = [group.enqueue(plan.target(bucket)) for bucket in range(min(len(self._slots), len(plan.sizes)))]
            if arrived[-1] is not None:
                arrived[-1].synchronize()
        finally:
            if group is not self._group:
                group.close()  # given up meanwhile, and not to be closed under this call
        self._arrived = arrived
        return {"seconds": time.monotonic() - began}

    def watch(self, connection: socket.socket) -> None:
        """The next load sends its outcome there, itself: the scheduler's loop spins while the engine is paused, and
        each time that a thread of this process wants its turn costs that thread 5 ms.
        """
        self._watchers.append(connection)

    def load(self) -> None:
        """Brings every bucket into the model: those that have arrived, and the others as they arrive.

        An error is for the watchers: raised here, it would end the engine.
        """
        began = time.monotonic()
        try:
            self._load()
            self._release_shared()
            error = ""
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        self._arrived = []
        self._load_cpu_s = time.monotonic() - began
        watchers, self._watchers = self._watchers, []
        for connection in watchers:
            with suppress(OSError):  # it has gone
                connection.sendall(_line({"error": error}))

    def _load(self) -> None:
        plan, group, arrived = self._plan, self._group, list(self._arrived)
        assert plan is not None, "nothing was prepared"
        assert arrived, "nothing has arrived"
        slots, buckets = len(self._slots), len(plan.sizes)
        self._marks = [("begun", self._mark())]
        if self._device.type == "cuda":
            current = torch.cuda.current_stream()
        for bucket in range(buckets):
            if arrived[bucket] is not None:
                current.wait_event(arrived[bucket])
            plan.load(self._model, bucket)
            loaded = self._mark()
            self._marks.append((f"bucket {bucket}", loaded))
            following = bucket + slots
            if following < buckets:
                # Its slot is free as soon as this bucket has left it.
                if loaded is not None:
                    group.stream.wait_event(loaded)
                arrived.append(group.enqueue(plan.target(following)))

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _timings(self) -> dict[str, Any]:
        """Of the last load: what the scheduler spent on it, and the GPU, from the end of the pass before it."""
        seconds = {"load_cpu_s": self._load_cpu_s}
        marks = [event for _, event in self._marks]
        if marks and marks[-1] is not None:
            marks[-1].synchronize()
            seconds["load_gpu_s"] = marks[0].elapsed_time(marks[-1]) / 1e3
        return seconds | {"recorded": self._plan.recorded if self._plan is not None else 0.0}


_receiver: Receiver | None = None


def start(model: Any, _tensors: object) -> None:
    """A weight loader that loads nothing: the first call begins to listen."""
    global _receiver
    if _receiver is not None:
        return
    _receiver = Receiver(model)
    path = Path(os.environ[DIRECTORY_VARIABLE]) / f"weights-{_rank()}.sock"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    threading.Thread(target=_serve, args=(listener, _receiver), name="polyhead-receiver", daemon=True).start()


def load(_model: Any, _tensors: object) -> None:
    """A weight loader: everything that the replica has prepared."""
    assert _receiver is not None, "start comes first"
    _receiver.load()


def _serve(listener: socket.socket, receiver: Receiver) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_converse, args=(connection, receiver), daemon=True).start()


def _converse(connection: socket.socket, receiver: Receiver) -> None:
    """One JSON object a line, each answered by one; after "watch" comes another one, from the next load."""
    with suppress(OSError), connection, connection.makefile("rb") as stream:  # it may not wait for its answer
        while line := stream.readline(_LINE_MAX):
            request = json.loads(line)
            if request["verb"] == "watch":
                receiver.watch(connection)
                connection.sendall(_line({}))
            else:
                connection.sendall(_line(receiver.handle(request)))


def _line(answer: Mapping[str, Any]) -> bytes:
    return json.dumps(answer).encode() + b"\n"


def _rank() -> int:
    """Among the engine's own ranks."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _weights(model: Any) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _check_fp8(model: Any, buckets: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError when fp8 weights are to come, and the model has them in another layout than they are stored in:
    repacked for a kernel, or with the scales of DeepGEMM on Blackwell. Its loaders would take them all the same.
    """
    if not any(dtype.startswith("float8") for bucket in buckets for _, dtype, _ in bucket["tensors"]):
        return
    scales = [(name, tensor) for name, tensor in model.named_parameters() if name.endswith("weight_scale_inv")]
    weights = dict(model.named_parameters())
    for name, scale in scales:
        weight = weights.get(name.removesuffix("_scale_inv"))
        laid_out = getattr(scale, "format_ue8m0", False) or scale.dtype != torch.float32
        if laid_out or weight is None or weight.dtype != torch.float8_e4m3fn:
            raise ValueError(f"{name}: the engine holds it in a layout of its own: try --fp8-gemm-backend triton")
    if not scales:
        raise ValueError("fp8 weights are to come, and the engine has none")


def _views(tensors: Sequence[Sequence[Any]], flat: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """`tensors`: name, dtype and shape of each, in the order of their bytes."""
    views = []
    start = 0
    for name, dtype_name, shape in tensors:
        dtype = getattr(torch, dtype_name)
        end = start + torch.Size(shape).numel() * dtype.itemsize
        views.append((name, flat[start:end].view(dtype).view(shape)))
        start = end
    return views
