"""A network that fails: a proxy between a client and a server, which cuts, delays, throttles, tears and loses.

Bytes are carried as TCP would: what a cut holds back arrives when it heals, what `lose` swallows never does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

_CHUNK = 1 << 16
WAYS = ("up", "down")
"""From the client to the server, and back."""


@dataclass(eq=False)
class _Connection:
    writers: list[asyncio.StreamWriter]
    lost: bool = False
    """Half-open: nothing arrives any more, and neither end is told."""
    torn: bool = False
    """It ends in the middle of what is sent next."""

    def abort(self) -> None:
        for writer in self.writers:
            writer.transport.abort()


@dataclass
class Proxy:
    """Listens on 127.0.0.1. Everything but `port` is for its own event loop."""

    upstream: Callable[[], str]
    """Asked for each connection: host:port, or the path of a unix socket."""
    latency_s: float = 0.0
    """Each chunk waits this long."""
    bytes_per_s: float = 0.0
    """0: no limit."""
    port: int = 0
    _passes: dict[str, asyncio.Event] = field(default_factory=lambda: {way: asyncio.Event() for way in WAYS})
    _connections: set[_Connection] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def start(self, port: int = 0) -> Proxy:
        """0 takes any port."""
        self.heal()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port, limit=_CHUNK)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def close(self) -> None:
        self._server.close()
        for connection in self._connections:
            connection.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self, *ways: str) -> None:
        """Nothing passes in these directions, in both by default."""
        for way in ways or WAYS:
            self._passes[way].clear()

    def lose(self) -> None:
        """Of the connections there are, both ends go on as if the other were slow. New ones are whole."""
        for connection in self._connections:
            connection.lost = True

    def tear(self) -> None:
        """Each connection there is ends in the middle of the next message."""
        for connection in self._connections:
            connection.torn = True

    def heal(self) -> None:
        """Undoes `cut`, latency and rate."""
        self.latency_s = self.bytes_per_s = 0.0
        for passes in self._passes.values():
            passes.set()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._carry(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection([writer])
        self._connections.add(connection)
        try:
            await self._passes["up"].wait()  # who asks for a connection is not heard either
            inner_reader, inner_writer = await _connect(self.upstream())
            connection.writers.append(inner_writer)
            await asyncio.gather(
                self._pump("up", connection, reader, inner_writer), self._pump("down", connection, inner_reader, writer)
            )
        except OSError:
            pass  # no server there: the client is hung up on
        finally:
            connection.abort()
            self._connections.discard(connection)

    async def _pump(
        self, way: str, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(_CHUNK if not self.bytes_per_s else max(1, int(self.bytes_per_s / 10))):
            if self.latency_s or self.bytes_per_s:
                await asyncio.sleep(self.latency_s + (len(data) / self.bytes_per_s if self.bytes_per_s else 0.0))
            await self._passes[way].wait()
            if connection.lost:
                continue
            if connection.torn:
                writer.write(data[: len(data) // 2])
                with suppress(OSError):
                    await writer.drain()
                connection.abort()
                return
            writer.write(data)
            await writer.drain()
        if not connection.lost:
            connection.abort()


async def _connect(upstream: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if upstream.startswith("/"):
        return await asyncio.open_unix_connection(upstream, limit=_CHUNK)
    host, _, port = upstream.rpartition(":")
    return await asyncio.open_connection(host, int(port), limit=_CHUNK)
