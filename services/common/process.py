"""Child processes that cannot outlive their parent, and what a process does with its own memory."""

from __future__ import annotations

import ctypes
import gc
import os
import secrets
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
# glibc's names of what mallopt sets, and the most its main heap may hold back or get at once.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MAPPED_ABOVE, _KEPT_FREE, _HEAP_STEP = 32 << 20, 128 << 20, 8 << 20
_PREFIX = "POLYHEAD_"
_SECRET_SUFFIXES = ("PASSWORD", "KEY", "TOKEN")
_REDACTED = "***"
_FIRST_PORT = 20_000
_PORT_TRIES = 64
_libc = ctypes.CDLL(None, use_errno=True)


def spawn(
    command: Sequence[str],
    *,
    log_path: Path,
    env: Mapping[str, str] | None = None,
    death_signal: signal.Signals = signal.SIGTERM,
    foreign: bool = False,
) -> subprocess.Popen[bytes]:
    """Starts `command` with its output appended to `log_path`, which only its owner may read.

    Its environment is this process's and `env`. A `foreign` program, one that is no service of the run, gets nothing
    of what configures those: secrets are among it.

    It leads a session of its own, so a terminal's Ctrl-C reaches only the parent, which forwards it; and the kernel
    sends it `death_signal` when the parent ends, however that happens. Call it from a thread that lives as long as
    the process: the kernel watches the thread.
    """
    log_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if not (foreign and _configures(name))}
    parent_pid = os.getpid()

    def before_exec() -> None:
        die_with_parent(parent_pid, death_signal)

    log_path.touch(mode=0o600)
    with log_path.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**inherited, **(env or {})},
            start_new_session=True,
            preexec_fn=before_exec,
        )


def die_with_parent(parent_pid: int, death_signal: signal.Signals = signal.SIGKILL) -> None:
    """For the first lines of a child: the kernel sends this process `death_signal` when its parent ends.

    `parent_pid` is who started it, as the parent told it: had that process ended before this call, the kernel would
    never send anything, so the child ends here.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, death_signal)
    if os.getppid() != parent_pid:
        raise SystemExit(1)


@contextmanager
def loading() -> Iterator[None]:
    """For imports that take seconds: they make hardly any garbage, and to look for it is a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        keep_loaded()
        gc.enable()


def keep_loaded() -> None:
    """To be called when a process has imported and built what it lives with: garbage collections leave that alone.

    A full one would otherwise go through all of it again and again, and no call is answered meanwhile: 0.1-0.5 s with
    torch loaded.
    """
    gc.freeze()


def keep_freed_memory() -> None:
    """Lets malloc use freed memory of the size of messages again, up to 128 MiB of it.

    It would give it back to the kernel with each message and fault it in anew with the next: half of the time that it
    takes to serialize and send one of a megabyte. Does nothing without glibc.
    """
    if hasattr(_libc, "mallopt"):
        for name, size in (
            (_M_MMAP_THRESHOLD, _MAPPED_ABOVE),
            (_M_TRIM_THRESHOLD, _KEPT_FREE),
            (_M_TOP_PAD, _HEAP_STEP),
        ):
            _libc.mallopt(name, size)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port nobody listens on now, and none of those that the kernel gives to whoever asks for any."""
    for _ in range(_PORT_TRIES):
        port = _FIRST_PORT + secrets.randbelow(_first_ephemeral_port() - _FIRST_PORT)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((host, port))
            return port
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _first_ephemeral_port() -> int:
    try:
        low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        low = 0
    return low if low > _FIRST_PORT + _PORT_TRIES else 32_768


def last_lines(log_path: Path, count: int = 20, secrets: Sequence[str] = ()) -> str:
    """The end of a log, for an error message: without `secrets`, and without those in this process's environment."""
    try:
        with log_path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - 65_536))
            text = log.read().decode(errors="replace")
    except OSError:
        return ""
    for secret in filter(None, (*secrets, *_environments_secrets())):
        text = text.replace(secret, _REDACTED)
    return "\n".join(text.splitlines()[-count:])


def _configures(variable: str) -> bool:
    """Whether it is a setting of a run. Their names are taken in either case."""
    return variable.upper().startswith(_PREFIX)


def _environments_secrets() -> Sequence[str]:
    return [
        value for name, value in os.environ.items() if _configures(name) and name.upper().endswith(_SECRET_SUFFIXES)
    ]
