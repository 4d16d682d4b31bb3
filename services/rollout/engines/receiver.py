"""The replica's way to the receivers inside its engine: one Unix socket for each of the engine's ranks."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from polyhead.v1 import weights_pb2
from services.common.errors import InvalidArgumentError
from services.rollout.engines.messages import EngineUnavailableError

if TYPE_CHECKING:
    from services.rollout.engines.client import EngineClient

PLUGIN_DIRECTORY = Path(__file__).parent / "sglang_receiver"
DIRECTORY_VARIABLE = "POLYHEAD_RECEIVER_DIR"
START, LOAD = "polyhead_receiver.start", "polyhead_receiver.load"
"""Values of --custom-weight-loader."""

_CALL_TIMEOUT_S = 10.0
_LINE_MAX = 1 << 20


class Inlet(Protocol):
    """Where an engine takes weights ahead of its pause. Every call raises UnavailableError when it fails."""

    async def prepare(
        self, manifest: weights_pb2.WeightManifest, shared: Sequence[weights_pb2.SharedBucket] = ()
    ) -> int:
        """Makes ready for what the manifest announces: how many of its buckets are taken ahead of the pause."""

    async def receive(self, timeout_s: float) -> None:
        """Returns when these have arrived."""

    async def watch(self) -> LoadWatch:
        """To be called before the load that it is about."""

    async def load(self, client: EngineClient, *, version: str, flush: bool, timeout_s: float) -> None:
        """Has the engine bring everything into the model; what came of it, the watch has to say."""

    async def abort(self) -> None:
        """Breaks off whatever is on its way."""

    async def leave(self) -> None:
        """Lets go of the group, or of the memory."""


class EngineReceiver:
    """Weights arrive there ahead of the pause, as far as there is memory. Every call goes to all ranks.

    Raises EngineUnavailableError when one does not answer within the deadline or says why it could not.
    """

    def __init__(self, directory: Path, ranks: int, memory_bytes: int) -> None:
        """`memory_bytes`: of each rank, for weights that arrive ahead of the pause."""
        self._sockets = [directory / f"weights-{rank}.sock" for rank in range(ranks)]
        self.memory_bytes = memory_bytes

    async def check_nccl(self, version: str, cumem: str) -> None:
        """Raises InvalidArgumentError when the trainer's NCCL cannot work with the engine's."""
        for said in await self._all("hello", {}):
            for field, ours in (("nccl_version", version), ("nccl_cumem", cumem)):
                if said[field] != ours:
                    raise InvalidArgumentError(f"the trainer has {ours!r}, the engine {said[field]!r}", field=field)

    async def join(
        self, *, name: str, backend: str, address: str, port: int, world_size: int, rank_offset: int, timeout_s: float
    ) -> None:
        """Joins a collective; returns when every member has, and is connected."""
        arguments = {
            "name": name,
            "backend": backend,
            "address": address,
            "port": port,
            "world_size": world_size,
            "rank_offset": rank_offset,
            "timeout_s": timeout_s,
        }
        await self._all("join", arguments, timeout_s)

    async def leave(self) -> None:
        await self._all("leave", {})

    async def prepare(
        self, manifest: weights_pb2.WeightManifest, shared: Sequence[weights_pb2.SharedBucket] = ()
    ) -> int:
        """Makes room for what the manifest announces: how many of its buckets are taken ahead of the pause. Where the
        trainer shares its memory these are all: they are opened, and need no room.
        """
        arguments: dict[str, Any] = {"digest": manifest.layout_digest, "buckets": None, "memory": self.memory_bytes}
        if shared:
            arguments["shared"] = [
                {"file": place.file, "handle": b64encode(place.handle).decode(), "device": place.device}
                for place in shared
            ]
        answers = await self._all("prepare", arguments)
        if any(answer.get("unknown") for answer in answers):
            buckets = [
                {
                    "num_bytes": bucket.num_bytes,
                    "tensors": [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in bucket.tensors],
                }
                for bucket in manifest.buckets
            ]
            answers = await self._all("prepare", arguments | {"buckets": buckets})
        ahead: set[int] = {answer["ahead"] for answer in answers}
        if len(ahead) > 1:
            raise EngineUnavailableError(f"its ranks have room for {sorted(ahead)} buckets", field="engine receiver")
        return ahead.pop()

    async def receive(self, timeout_s: float) -> None:
        """Returns when the buckets ahead of the pause have arrived."""
        await self._all("receive", {}, timeout_s)

    async def load(self, client: EngineClient, *, version: str, flush: bool, timeout_s: float) -> None:
        await client.load_received(len(self._sockets), version=version, flush=flush, timeout_s=timeout_s)

    async def abort(self) -> None:
        """Breaks off whatever is on its way. The group is of no use afterwards."""
        await self._all("abort", {})

    async def watch(self) -> LoadWatch:
        """To be called before the load that it is about."""
        watch = LoadWatch()
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                for path in self._sockets:
                    await watch.add(path)
        except (OSError, TimeoutError, ValueError) as error:
            watch.close()
            raise _unavailable("watch", error) from error
        return watch

    async def timings(self) -> Mapping[str, float]:
        """Of the last load, of the slowest rank, in seconds. Waits until it has ended on the GPU."""
        answers = await self._all("timings", {})
        return {name: max(answer[name] for answer in answers) for name in answers[0]}

    async def _all(self, verb: str, arguments: Mapping[str, Any], timeout_s: float = _CALL_TIMEOUT_S) -> list[Any]:
        line = orjson.dumps({"verb": verb, "arguments": arguments}) + b"\n"
        try:
            async with asyncio.timeout(timeout_s):
                answers = await asyncio.gather(*(_ask(path, line) for path in self._sockets))
        except (OSError, TimeoutError, ValueError) as error:
            raise _unavailable(verb, error) from error
        for answer in answers:
            if "error" in answer:
                raise EngineUnavailableError(f"{verb}: {answer['error']}", field="engine receiver")
        return answers


class LoadWatch:
    """Hears from each of the engine's ranks how one load went."""

    def __init__(self) -> None:
        self._streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def add(self, path: Path) -> None:
        """One rank. Raises OSError or ValueError when it does not answer."""
        reader, writer = await asyncio.open_unix_connection(path)
        self._streams.append((reader, writer))
        writer.write(b'{"verb": "watch"}\n')
        orjson.loads(await reader.readline())

    async def outcome(self) -> None:
        """Waits for the end of the load. Raises EngineUnavailableError when it failed, or its engine has gone."""
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                answers = [orjson.loads(await reader.readline()) for reader, _ in self._streams]
        except (OSError, TimeoutError, ValueError) as error:
            raise _unavailable("load", error) from error
        for answer in answers:
            if answer["error"]:
                raise EngineUnavailableError(answer["error"], field="engine receiver")

    def close(self) -> None:
        for _, writer in self._streams:
            writer.close()


def _unavailable(verb: str, error: Exception) -> EngineUnavailableError:
    return EngineUnavailableError(f"{verb}: {type(error).__name__} {error}".rstrip(), field="engine receiver")


async def _ask(path: Path, line: bytes) -> Any:
    reader, writer = await asyncio.open_unix_connection(path, limit=_LINE_MAX)
    try:
        writer.write(line)
        await writer.drain()
        answer = await reader.readline()
        return orjson.loads(answer)  # an empty line, of one that died, is no JSON
    finally:
        writer.close()
