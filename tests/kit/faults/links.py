"""The connections of a run, each through a fault proxy: of rollout, reward and trainer to the buffers, of these to the
store.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.kit.faults.proxy import Proxy

LINKS = ("rollout-buffer", "reward-buffer", "trainer-buffer", "buffer-store")
# What may happen to a link, and for how long: longer than a lease (3 s) and a registration (4 s), or a call (10 s).
FAULTS: dict[str, tuple[float, Callable[[Proxy], None]]] = {
    "cut": (5.0, Proxy.cut),
    "cut-long": (15.0, Proxy.cut),
    "cut-up": (5.0, lambda proxy: proxy.cut("up")),
    "cut-down": (5.0, lambda proxy: proxy.cut("down")),
    "half-open": (0.0, Proxy.lose),
    "torn": (0.0, Proxy.tear),
    "latency": (5.0, lambda proxy: setattr(proxy, "latency_s", 0.2)),
    "slow": (5.0, lambda proxy: setattr(proxy, "bytes_per_s", 10_000.0)),
}
CUTS = tuple(fault for fault in FAULTS if fault.startswith("cut"))
_FILE = "links.json"


class Links:
    """The test's side. `close` it after the run."""

    def __init__(self, directory: Path, run_dir: Path, buffers: int = 1) -> None:
        """`directory` is that of the fault points, `buffers` how many of them the run has."""
        self._config = run_dir / "config.toml"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._proxies = {
            link: [self._start(link, index) for index in range(1 if link == "buffer-store" else buffers)]
            for link in LINKS
        }
        ports = {link: [proxy.port for proxy in proxies] for link, proxies in self._proxies.items()}
        (directory / _FILE).write_text(json.dumps(ports))

    def strike(self, link: str, fault: str) -> None:
        """Until `heal`."""
        self._on_all(link, FAULTS[fault][1])

    def heal(self, link: str) -> None:
        self._on_all(link, Proxy.heal)

    def close(self) -> None:
        """A second time is no harm."""
        if self._loop.is_closed():
            return
        for proxies in self._proxies.values():
            for proxy in proxies:
                asyncio.run_coroutine_threadsafe(proxy.close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _on_all(self, link: str, act: Callable[[Proxy], None]) -> None:
        for proxy in self._proxies[link]:
            self._loop.call_soon_threadsafe(act, proxy)

    def _start(self, link: str, index: int) -> Proxy:
        proxy = Proxy(lambda: self._upstream(link, index))
        return asyncio.run_coroutine_threadsafe(proxy.start(), self._loop).result(10)

    def _upstream(self, link: str, index: int) -> str:
        """The launcher chooses ports and sockets, and writes them down before it starts anything."""
        from services.common.config import load  # not for every process of a run

        config = load(self._config)
        if link == "buffer-store":
            return config.store.url.removeprefix("unix://")
        return config.buffer.addresses[index]


def install(role: str, directory: Path) -> None:
    """In a process of the run: its connections go through the proxies, where there are any."""
    if not (directory / _FILE).exists():
        return
    ports = json.loads((directory / _FILE).read_text())
    if role == "buffer":
        from services.buffer import redis_store

        _redirect(redis_store.RedisStore, "url", f"redis://127.0.0.1:{ports['buffer-store'][0]}")
    elif f"{role}-buffer" in ports:
        from services.common.buffer_client import BufferClient

        addresses = ",".join(f"127.0.0.1:{port}" for port in ports[f"{role}-buffer"])
        _redirect(BufferClient, "address", addresses)


def _redirect(owner: Any, name: str, value: str) -> None:
    """`owner` is made with `value` for its first argument, whatever it is told."""
    inner = owner.__init__

    def init(self: Any, _: str, *rest: Any, **named: Any) -> None:
        inner(self, value, *rest, **named)

    owner.__init__ = init
