"""The process a program runs in: ``python -I -S launch.py PARENT DIRECTORY LIMITS``, with its source on standard input.

It shuts itself off as far as the kernel lets it, sets its limits and runs the program as ``__main__`` in DIRECTORY.
Run by its path, by an interpreter without site-packages: it imports the standard library only.

The input is JSON: "files", by name; "program", the file to run; and "input", what the program reads. The file it
came in is emptied when the program begins: until then, what fails is the sandbox. The answer is the exit status, and
what the program writes to its standard output.
"""

import contextlib
import ctypes
import io
import json
import os
import resource
import runpy
import signal
import sys

_NEW_NAMESPACES = 0x00020000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000  # mounts, IPC, users, processes, net
_NEW_NET = 0x10000000 | 0x40000000  # users and net alone: some containers allow this and no mounts
_MS_RDONLY, _MS_NOSUID_NODEV, _MS_REC, _MS_PRIVATE = 1, 2 | 4, 1 << 14, 1 << 18
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY = 442, -100, 0x8000, 1
_HIDDEN = ("/proc", "/run", "/dev/shm")  # noqa: S108 - hidden from the program
_LAST_CAPABILITY = 63
_INSIDE_ID = 65534
_MIB = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    parent, directory, limits = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    try:
        _die_with(parent)
        request = json.load(sys.stdin)
        told = os.dup(0)
        isolated = _isolate()
        if isolated:
            child = os.fork()
            if child:
                _exit_like(child)
            _die_with(0)
            with contextlib.suppress(OSError):  # users and processes apart, but the mounts are the kernel's to refuse
                _make_read_only(directory, limits["memory_mb"])
        _drop_capabilities()
        _prepare(directory, request)
        _limit(limits)
        if not isolated:
            _guard_network()
        os.ftruncate(told, 0)
        os.close(told)
    except BaseException:
        os._exit(1)
    _run(directory, request["program"])


def _die_with(parent: int) -> None:
    """The kernel ends this process with its parent, however that ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _isolate() -> bool:
    """Leaves the network, the processes, the mounts and the user's rights behind. False where the kernel refuses."""
    user, group = os.geteuid(), os.getegid()
    if _libc.unshare(_NEW_NAMESPACES) != 0:
        # The network at least, where mounts are refused.
        _libc.unshare(_NEW_NET)
        return False
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{_INSIDE_ID} {user} 1")
    _write("/proc/self/gid_map", f"{_INSIDE_ID} {group} 1")
    return True


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:  # noqa: PTH123 - pathlib would be one more import per run
        file.write(text)


def _exit_like(child: int) -> None:
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _make_read_only(directory: str, size_mb: int) -> None:
    """Everything but `directory`, which is held in memory; what tells of other processes is hidden."""
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE, None)
    attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY, 0, 0, 0)
    if _libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, ctypes.sizeof(attributes)) != 0:
        raise OSError(ctypes.get_errno(), "mount_setattr")
    _mount("tmpfs", directory, "tmpfs", _MS_NOSUID_NODEV, f"size={size_mb}m,nr_inodes=4096,mode=700")
    for path in _HIDDEN:
        if os.path.isdir(path) and not _holds_python(path):  # noqa: PTH112 - as above
            _mount("tmpfs", path, "tmpfs", _MS_NOSUID_NODEV | _MS_RDONLY, "nr_inodes=1,mode=500")


def _mount(source: str, target: str, kind: "str | None", flags: int, data: "str | None") -> None:
    names = [None if name is None else name.encode() for name in (source, target, kind)]
    if _libc.mount(*names, ctypes.c_ulong(flags), None if data is None else data.encode()) != 0:
        raise OSError(ctypes.get_errno(), f"mount {target}")


def _holds_python(path: str) -> bool:
    return any(home.startswith(path + "/") for home in (sys.base_prefix, sys.base_exec_prefix))


def _drop_capabilities() -> None:
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for capability in range(_LAST_CAPABILITY + 1):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _libc.capset(header, none)


def _prepare(directory: str, request: "dict[str, object]") -> None:
    os.chdir(directory)
    for name, text in request["files"].items():  # type: ignore[attr-defined]
        with open(name, "w", encoding="utf-8", errors="surrogatepass") as file:  # noqa: PTH123 - as above
            file.write(text)
    with open(".input", "w+", encoding="utf-8", errors="surrogatepass", newline="") as file:  # noqa: PTH123 - as above
        file.write(request["input"])  # type: ignore[arg-type]
        file.flush()
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        os.dup2(file.fileno(), 0)
    os.unlink(".input")  # noqa: PTH108 - as above
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8", errors="replace")


def _limit(limits: "dict[str, int]") -> None:
    memory = limits["memory_mb"] * _MIB
    for what, value in (
        (resource.RLIMIT_CPU, limits["seconds"]),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, limits["output_mb"] * _MIB),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        ceiling = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (ceiling, ceiling))


def _guard_network() -> None:
    """Best effort where there are no namespaces: what goes through Python's own modules is refused."""

    def refuse(event: str, _arguments: "tuple[object, ...]") -> None:
        if event.startswith(("socket.", "ctypes.dlopen")):
            raise PermissionError(f"{event} is not allowed here")

    sys.addaudithook(refuse)


def _run(directory: str, program: str) -> None:
    sys.argv = [program]
    sys.path.insert(0, directory)
    with contextlib.suppress(ValueError, OSError):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
