"""A new store and a buffer before it, as processes, for the benchmarks of the buffer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.bench.buffer_flow import GROUP_SIZE, GROUPS, MAX_STALENESS
from tests.kit.valkey import Valkey, running

_START_LIMIT_S = 60.0
_CONFIG = """
[run]
name = "bench"
dir = "{directory}/run"
[data]
prompt_data = "{directory}/data.jsonl"
[batch]
rollout_batch_size = {groups}
n_samples_per_prompt = {size}
[staleness]
max_staleness = {staleness}
[store]
url = "{store}"
max_memory_mb = {memory}
[buffer]
address = "{address}"
"""


class Scene:
    """`server` is the store, `address` the buffer's; what both write is in `directory`."""

    def __init__(self, server: Valkey, directory: Path, max_staleness: int, max_memory_mb: int) -> None:
        self.server = server
        self.directory = directory
        self.address = f"unix:{directory}/buffer.sock"
        (directory / "data.jsonl").write_text("".join(json.dumps({"input": f"{n} + 1 ="}) + "\n" for n in range(100)))
        self._config = directory / "run.toml"
        self._config.write_text(
            _CONFIG.format(
                directory=directory,
                groups=GROUPS,
                size=GROUP_SIZE,
                staleness=max_staleness,
                store=server.url,
                memory=max_memory_mb,
                address=self.address,
            )
        )
        self._buffer: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The buffer's."""
        assert self._buffer is not None, "not started"
        return self._buffer.pid

    def start_buffer(self) -> None:
        """Does not wait until it answers."""
        command = [sys.executable, "-m", "services.buffer", "-c", str(self._config)]
        self._buffer = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": ".:protos"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def wait_until_up(self) -> None:
        """Raises TimeoutError."""
        deadline = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < deadline:
            with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(self.address.removeprefix("unix:"))
                return
            time.sleep(0.01)
        raise TimeoutError("the buffer does not listen")

    def kill_buffer(self) -> None:
        """SIGKILL, and waits for the end."""
        if self._buffer is not None:
            self._buffer.kill()
            self._buffer.wait()


@contextmanager
def scene(
    directory: Path | None = None, *, max_staleness: int = MAX_STALENESS, max_memory_mb: int = 2048, **store: Any
) -> Iterator[Scene]:
    """With the store's file in `directory`; by default where temporary files are."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        data = Path(place) / "store"
        data.mkdir()
        with running(directory=data, max_memory_mb=max_memory_mb, **store) as server:
            found = Scene(server, Path(place), max_staleness, max_memory_mb)
            found.start_buffer()
            try:
                found.wait_until_up()
                yield found
            finally:
                found.kill_buffer()
