"""A throw-away embedded Valkey for tests: private directory, unix socket, killed and started again at will."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from services.common import embedded_store

START_LIMIT_S = 10.0


class Valkey:
    """One server. Its data outlives `kill` and `start`, until `remove`."""

    def __init__(
        self,
        *,
        appendfsync: Literal["always", "everysec"] = "everysec",
        max_memory_mb: int = 256,
        directory: Path | None = None,
    ) -> None:
        """`directory` holds the append-only file of an earlier server, and stays."""
        # Unix socket paths are short: pytest's own temporary directories can be too deep.
        self.directory = Path(tempfile.mkdtemp(prefix="vk-"))
        self.socket_path = self.directory / "s"
        self.url = embedded_store.url(self.socket_path)
        self._data = directory or self.directory
        self._command = embedded_store.command(self._data, self.socket_path, appendfsync, max_memory_mb)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> None:
        """Returns when the server answers. Raises RuntimeError with its log when it ends instead."""
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + START_LIMIT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.directory / "log").read_text())
            time.sleep(0.002)

    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def empty(self) -> None:
        """Starts it again without its data."""
        self.kill()
        shutil.rmtree(self._data / "appendonlydir", ignore_errors=True)
        self.start()

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(1.0)
                probe.connect(str(self.socket_path))
                probe.sendall(b"PING\r\n")
                return probe.recv(16).startswith(b"+PONG")
        except OSError:
            return False


@contextmanager
def running(**options: object) -> Iterator[Valkey]:
    """A started server, removed at the end."""
    server = Valkey(**options)  # type: ignore[arg-type]
    try:
        server.start()
        yield server
    finally:
        server.remove()
