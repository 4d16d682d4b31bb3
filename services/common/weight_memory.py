"""Memory of one process that another one on the same machine reads: how a push goes without a wire.

On a CPU it is a file in memory that both map; on a GPU an allocation of its own, which the other process opens by the
64 bytes of its CUDA IPC handle. No object is passed and nothing is unpickled: a name or a handle, and a length.

Imports torch and the standard library alone: SGLang's environment, which loads this file by its place, has none of this
project's packages. The driver's API is used rather than the runtime's: its library has one name everywhere, and what is
allocated there is neither part of a block of torch's allocator nor of one of its expandable segments, which cannot be
shared.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import secrets
import stat
from functools import cache
from pathlib import Path
from typing import Any

import torch

HANDLE_BYTES = 64
_NAME = re.compile(r"bucket-[0-9a-f]{16}")
_OUT_OF_MEMORY = 2
# Lets the handle be opened from another GPU than the memory's, over NVLink or PCIe.
_LAZY_PEER_ACCESS = 1


class SharedFile:
    """`num_bytes` of zeros in a new file of `directory`, as a uint8 tensor. The file goes with `close`."""

    def __init__(self, directory: Path, num_bytes: int) -> None:
        """Raises PermissionError for a directory that others could enter, OSError when there is no room."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(_open_directory(directory))
        self.name = f"bucket-{secrets.token_hex(8)}"
        self._path = directory / self.name
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            # Without it, a file system that is full would be found out by a SIGBUS.
            os.posix_fallocate(descriptor, 0, num_bytes)
            self.tensor = torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)
        except OSError:
            self._path.unlink()
            raise
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Nobody can open it any more. The memory is free when the last one who maps it has gone."""
        self._path.unlink(missing_ok=True)


def open_file(directory: Path, name: str, num_bytes: int) -> torch.Tensor:
    """A file that another process made with `SharedFile`, as a uint8 tensor: writing to it changes this copy only.

    Raises ValueError for a name or a file that is none of these, PermissionError for one that is not this user's alone,
    OSError when it is not there.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name[:80]!r} is not the name of a shared bucket")
    parent = _open_directory(directory)
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    finally:
        os.close(parent)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size != num_bytes:
            raise ValueError(f"{name} is not a file of {num_bytes} bytes")
        _check_private(found, name)
        # Private, since torch has no tensors that cannot be written to.
        mapped = mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return torch.frombuffer(mapped, dtype=torch.uint8)
    finally:
        os.close(descriptor)


class SharedDeviceMemory:
    """An allocation of its own on a GPU, as a uint8 tensor. It is freed with the last view of `tensor`, so whoever has
    opened the handle must have closed it by then.
    """

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        """Raises MemoryError when the GPU has no room, RuntimeError when it cannot be shared."""
        self.tensor = _tensor(_Allocation(device, num_bytes), device)
        self.handle = _export(self.tensor.data_ptr())
        self.device = device_uuid(device)

    def close(self) -> None:
        """Gives up this object's own view."""
        self.tensor = torch.empty(0, dtype=torch.uint8)


def open_handle(handle: bytes, uuid: str, num_bytes: int, device: torch.device) -> torch.Tensor:
    """Memory of another process, as a uint8 tensor; it is unmapped with the last view of it, whose reads have to be
    over by then. `device`: of the caller; `uuid`: of the GPU that the memory is on.

    Raises ValueError for what is no handle or a GPU that this process does not see, RuntimeError when it does not open.
    """
    if len(handle) != HANDLE_BYTES:
        raise ValueError(f"a handle has {HANDLE_BYTES} bytes, not {len(handle)}")
    seen = [device_uuid(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    if uuid not in seen:
        raise ValueError(f"the trainer's GPU {uuid} is not among those that the engine sees: {', '.join(seen)}")
    return _tensor(_Mapping(device, handle, num_bytes), torch.device("cuda", seen.index(uuid)))


def device_uuid(device: torch.device) -> str:
    """Of a CUDA device, as nvidia-smi writes it without "GPU-"."""
    return str(torch.cuda.get_device_properties(device).uuid)


class _Span:
    """What torch wraps without copying, and holds for as long as there is a view of it."""

    def __init__(self, device: torch.device, address: int, num_bytes: int) -> None:
        self.device = device
        self.address = address
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (num_bytes,),
            "typestr": "|u1",
            "version": 3,
        }


class _Allocation(_Span):
    def __init__(self, device: torch.device, num_bytes: int) -> None:
        _enter(device)
        address = ctypes.c_uint64()
        status = _driver().cuMemAlloc_v2(ctypes.byref(address), num_bytes)
        if status == _OUT_OF_MEMORY:
            torch.cuda.empty_cache()  # what torch keeps for later
            status = _driver().cuMemAlloc_v2(ctypes.byref(address), num_bytes)
        if status == _OUT_OF_MEMORY:
            free, _ = torch.cuda.mem_get_info(device)
            raise MemoryError(f"{device} has no room for {num_bytes} bytes: {free} are free")
        _check(status, "cuMemAlloc")
        super().__init__(device, address.value, num_bytes)

    def __del__(self) -> None:
        if hasattr(self, "device"):
            _enter(self.device)
            _driver().cuMemFree_v2(ctypes.c_uint64(self.address))


class _Mapping(_Span):
    def __init__(self, device: torch.device, handle: bytes, num_bytes: int) -> None:
        _enter(device)
        address = ctypes.c_uint64()
        status = _driver().cuIpcOpenMemHandle_v2(
            ctypes.byref(address), _Handle.from_buffer_copy(handle), _LAZY_PEER_ACCESS
        )
        _check(status, "cuIpcOpenMemHandle")
        super().__init__(device, address.value, num_bytes)

    def __del__(self) -> None:
        if hasattr(self, "device"):
            _enter(self.device)
            _driver().cuIpcCloseMemHandle(ctypes.c_uint64(self.address))


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


def _export(address: int) -> bytes:
    handle = _Handle()
    _check(_driver().cuIpcGetMemHandle(ctypes.byref(handle), ctypes.c_uint64(address)), "cuIpcGetMemHandle")
    return bytes(handle)


def _tensor(span: _Span, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(span, device=device)


@cache
def _driver() -> Any:
    driver = ctypes.CDLL("libcuda.so.1")
    pointer = ctypes.POINTER(ctypes.c_uint64)
    driver.cuMemAlloc_v2.argtypes = (pointer, ctypes.c_size_t)
    driver.cuMemFree_v2.argtypes = (ctypes.c_uint64,)
    driver.cuIpcGetMemHandle.argtypes = (ctypes.POINTER(_Handle), ctypes.c_uint64)
    driver.cuIpcOpenMemHandle_v2.argtypes = (pointer, _Handle, ctypes.c_uint)
    driver.cuIpcCloseMemHandle.argtypes = (ctypes.c_uint64,)
    driver.cuDeviceGet.argtypes = (ctypes.POINTER(ctypes.c_int), ctypes.c_int)
    driver.cuDevicePrimaryCtxRetain.argtypes = (ctypes.POINTER(ctypes.c_void_p), ctypes.c_int)
    driver.cuCtxSetCurrent.argtypes = (ctypes.c_void_p,)
    driver.cuGetErrorName.argtypes = (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p))
    return driver


@cache
def _context(ordinal: int) -> int:
    """The device's primary context, which torch uses too. It is retained for the rest of the process."""
    torch.cuda.init()
    number, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_driver().cuDeviceGet(ctypes.byref(number), ordinal), "cuDeviceGet")
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), number), "cuDevicePrimaryCtxRetain")
    assert context.value is not None
    return context.value


def _enter(device: torch.device) -> None:
    """Makes the device's context that of the calling thread."""
    ordinal = torch.cuda.current_device() if device.index is None else device.index
    _check(_driver().cuCtxSetCurrent(_context(ordinal)), "cuCtxSetCurrent")


def _check(status: int, call: str) -> None:
    if status:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(name))
        raise RuntimeError(f"{call}: {(name.value or b'').decode() or status}")


def _open_directory(directory: Path) -> int:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _check_private(os.fstat(descriptor), str(directory))
    except PermissionError:
        os.close(descriptor)
        raise
    return descriptor


def _check_private(found: os.stat_result, name: str) -> None:
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(f"{name} is not this user's alone")
