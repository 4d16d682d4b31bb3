"""The one way this service talks to an engine: SGLang's HTTP API, which the in-house engine speaks too."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import Any, Literal, Self

import aiohttp
import orjson

from polyhead.v1 import weights_pb2
from services.rollout.engines.messages import (
    Chunk,
    EngineLoad,
    EngineRefusedError,
    EngineUnavailableError,
    GenerateRequest,
    RequestRefusedError,
    ServerInfo,
)
from services.rollout.engines.receiver import LOAD, START
from services.rollout.engines.self_report import read_loads, read_server_info
from services.rollout.engines.stream import ChunkReader, error_text, events

PauseModeName = Literal["in_place", "retract", "abort"]

# Kinds of memory that an engine can give up, by SGLang's names.
WEIGHTS = frozenset({"weights"})
CACHES = frozenset({"kv_cache", "cuda_graph"})

CALL_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0
# A stream may be silent while the engine is paused for a push, or has more requests than slots. Giving up on one costs
# no tokens: what had streamed is saved, and the sample is leased again.
IDLE_TIMEOUT_S = 600.0
# The engine gives up first, so that its own reason arrives.
COLLECTIVE_SLACK_S = 5.0
# Below the 5 s after which common servers close an idle connection, which would look like an engine that died.
_KEEPALIVE_S = 2.0
_JSON = {"Content-Type": "application/json"}
# What SGLang takes for one rank's tensors, here none: an empty list, pickled, in base64.
_NO_TENSORS = "gARdlC4="


class KeyRefusedError(EngineUnavailableError):
    """The engine was started with another admin key."""


class EngineClient:
    """One HTTP session to one engine. Close it when the engine ends.

    Every call has a deadline. Raises EngineUnavailableError when the engine does not answer within it,
    EngineRefusedError when it refuses an administrative call, RequestRefusedError when it refuses a generation.
    """

    def __init__(self, url: str, admin_key: str = "", *, idle_timeout_s: float = IDLE_TIMEOUT_S) -> None:
        self.url, self.admin_key = url, admin_key
        self._sessions = True
        """Whether the engine may have sessions of weight updates: asking one that has none costs time in each pause."""
        self._stream_timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=idle_timeout_s
        )
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
            headers={"Authorization": f"Bearer {admin_key}"} if admin_key else {},
            # A cumulative event of a long completion is larger than the default of 64 KiB.
            read_bufsize=1 << 20,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._session.close()

    def generate(self, batch: Sequence[GenerateRequest], extra_key: str) -> AsyncGenerator[tuple[int, Chunk], None]:
        """Streams the batch as one request: (index in the batch, new tokens), as they come, until all have finished.

        `extra_key` sets these requests' prefix cache apart from that of other weights. Close the iterator to abort.
        """
        body = {
            "rid": [request.rid for request in batch],
            "input_ids": [list(request.input_ids) for request in batch],
            "sampling_params": [sampling_params(request) for request in batch],
            "extra_key": extra_key,
            "return_logprob": True,
            "stream": True,
        }
        return streamed(self._session, self.url, body, ChunkReader(len(batch)), self._stream_timeout)

    async def health(self, timeout_s: float = CALL_TIMEOUT_S) -> bool:
        """Whether the engine can generate now."""
        try:
            async with self._session.get(f"{self.url}/health_generate", timeout=_total(timeout_s)) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def server_info(self) -> ServerInfo:
        return read_server_info(await self._get("/server_info"))

    async def load(self) -> EngineLoad | None:
        """None from an engine that does not know the route."""
        loads = await self._get("/v1/loads?include=core", missing_ok=True)
        return read_loads(loads) if loads else None

    async def model_info(self) -> Mapping[str, Any]:
        """Among others `model_path` and `weight_version`."""
        return await self._get("/model_info")

    async def pause(self, mode: PauseModeName, *, confirm: bool = True) -> None:
        """Stops generation and returns when no forward pass is running.

        Pausing in place only sets a flag in some engines; /server_info is answered between two passes, so it
        confirms that the pass that was running has ended. Without `confirm` the call returns earlier: for whoever
        has the engine load received weights next, which waits in line behind the pause, and on the GPU behind the
        pass. The confirmation takes several milliseconds of each pause.
        """
        await self._post("/pause_generation", {"mode": mode})
        if confirm:
            await self._get("/server_info")

    async def resume(self) -> None:
        # SGLang would give its allocator's free memory back to the driver first, within the pause.
        await self._post("/continue_generation", {"torch_empty_cache": False})

    async def abort(self, rid: str) -> None:
        """Ends one request; one that is not there is no error."""
        await self._post("/abort_request", {"rid": rid, "abort_all": False})

    async def abort_all(self, timeout_s: float = CALL_TIMEOUT_S) -> None:
        await self._post("/abort_request", {"rid": "", "abort_all": True}, timeout_s)

    async def flush(self) -> None:
        """Empties the prefix cache. Raises EngineRefusedError while requests run."""
        await self._post("/flush_cache", {})

    async def release_memory(self, kinds: Collection[str], timeout_s: float) -> None:
        """Gives up GPU memory: any of `WEIGHTS` and `CACHES`. SGLang ends when it still has a request: `flush` first,
        which is refused until it has none.
        """
        await self._post("/release_memory_occupation", {"tags": sorted(kinds)}, timeout_s)

    async def resume_memory(self, kinds: Collection[str], timeout_s: float) -> None:
        """Takes it back, with nothing in it."""
        await self._post("/resume_memory_occupation", {"tags": sorted(kinds)}, timeout_s)

    async def freeze_gc(self) -> None:
        """Takes what its processes hold at present out of their garbage collections."""
        await self._post("/freeze_gc", {}, missing_ok=True)

    async def init_group(
        self,
        *,
        name: str,
        backend: str,
        master_address: str,
        master_port: int,
        world_size: int,
        rank_offset: int,
        timeout_s: float,
    ) -> None:
        """Joins a collective; returns when every member has."""
        body = {
            "master_address": master_address,
            "master_port": master_port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": name,
            "backend": backend,
            "timeout_s": timeout_s,
        }
        await self._post("/init_weights_update_group", body, timeout_s + COLLECTIVE_SLACK_S)

    async def destroy_group(self, name: str) -> None:
        await self._post("/destroy_weights_update_group", {"group_name": name})

    async def begin_update(self) -> None:
        """Opens a session of weight updates. Engines without sessions are fine."""
        if self._sessions:
            self._sessions = await self._post("/begin_weight_update", {}, missing_ok=True)

    async def end_update(self) -> None:
        """Closes the session; quantised weights are finalised here."""
        if self._sessions:
            self._sessions = await self._post("/end_weight_update", {}, missing_ok=True)

    async def update_from_distributed(
        self,
        bucket: weights_pb2.WeightBucket,
        *,
        group_name: str,
        version: str | None,
        flush: bool = False,
        timeout_s: float,
    ) -> None:
        """Receives one flattened bucket from rank 0 and loads it. `version` goes with the last bucket only.

        `flush` empties the prefix cache, which is refused while requests run: retracted ones do not.
        """
        body = {
            "names": [tensor.name for tensor in bucket.tensors],
            "dtypes": [tensor.dtype for tensor in bucket.tensors],
            "shapes": [list(tensor.shape) for tensor in bucket.tensors],
            "group_name": group_name,
            "load_format": "flattened_bucket",
            "flush_cache": flush,
            "weight_version": version,
        }
        await self._post("/update_weights_from_distributed", body, timeout_s + COLLECTIVE_SLACK_S)

    async def start_receiver(self, ranks: int) -> None:
        """Weights can arrive ahead of a pause from here on. The engine has no requests yet."""
        await self.begin_update()
        await self._call_loader(START, ranks, version=None, flush=False, timeout_s=CALL_TIMEOUT_S)
        await self.end_update()

    async def load_received(self, ranks: int, *, version: str, flush: bool, timeout_s: float) -> None:
        """Brings what its receiver was told to receive into the model; what came of it, the receiver has to say."""
        await self._call_loader(LOAD, ranks, version=version, flush=flush, timeout_s=timeout_s)

    async def _call_loader(
        self, loader: str, ranks: int, *, version: str | None, flush: bool, timeout_s: float
    ) -> None:
        body = {
            "serialized_named_tensors": [_NO_TENSORS] * ranks,
            "load_format": loader,
            "flush_cache": flush,
            "weight_version": version,
        }
        await self._post("/update_weights_from_tensor", body, timeout_s + COLLECTIVE_SLACK_S)

    async def update_from_shared(
        self, buckets: Sequence[Mapping[str, Any]], *, version: str, flush: bool, timeout_s: float
    ) -> None:
        """In-house engine: loads buckets out of memory that the trainer shares, each {file, num_bytes, tensors}."""
        body = {"buckets": list(buckets), "weight_version": version, "flush_cache": flush}
        await self._post("/update_weights_from_shared", body, timeout_s + COLLECTIVE_SLACK_S)

    async def update_from_disk(self, directory: str, *, version: str, flush: bool = False, timeout_s: float) -> None:
        body = {"model_path": directory, "weight_version": version, "flush_cache": flush}
        await self._post("/update_weights_from_disk", body, timeout_s)

    async def _get(self, path: str, *, missing_ok: bool = False) -> Mapping[str, Any]:
        """The answer's object; an empty one for a missing route."""
        _check_open(self._session, path)
        try:
            async with self._session.get(self.url + path, timeout=_total(CALL_TIMEOUT_S)) as response:
                if missing_ok and response.status == 404:
                    return {}
                _check_key(response.status, path)
                if response.status != 200:
                    raise EngineUnavailableError(f"HTTP {response.status}", field=f"engine {path}")
                answer = orjson.loads(await response.read())
        except (aiohttp.ClientError, TimeoutError, OSError, orjson.JSONDecodeError) as error:
            raise EngineUnavailableError(_transport(error), field=f"engine {path}") from error
        if not isinstance(answer, dict):
            raise EngineUnavailableError("is no JSON object", field=f"engine {path}")
        return answer

    async def _post(
        self, path: str, body: Mapping[str, Any], timeout_s: float = CALL_TIMEOUT_S, *, missing_ok: bool = False
    ) -> bool:
        """False for a route that is missing, where that is no error."""
        _check_open(self._session, path)
        try:
            async with self._session.post(
                self.url + path, data=orjson.dumps(body), headers=_JSON, timeout=_total(timeout_s)
            ) as response:
                content = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EngineUnavailableError(_transport(error), field=f"engine {path}") from error
        _check_key(response.status, path)
        if response.status == 200:
            return True
        if missing_ok and response.status in (404, 405):
            return False
        if response.status >= 500:
            raise EngineUnavailableError(f"HTTP {response.status}: {_refusal(content)}", field=f"engine {path}")
        touched = _object(content).get("weights_touched", True)
        raise EngineRefusedError(_refusal(content), field=f"engine {path}", weights_touched=touched is not False)


async def streamed(
    session: aiohttp.ClientSession,
    url: str,
    body: Mapping[str, Any],
    reader: ChunkReader,
    timeout: aiohttp.ClientTimeout,
) -> AsyncGenerator[tuple[int, Chunk], None]:
    """The chunks of one /generate call. Raises RequestRefusedError, or EngineUnavailableError when it breaks."""
    _check_open(session, "/generate")
    try:
        async with session.post(f"{url}/generate", data=orjson.dumps(body), headers=_JSON, timeout=timeout) as response:
            if response.status in (400, 413, 422):
                raise RequestRefusedError(_refusal(await response.read()), field="engine /generate")
            if response.status != 200:
                reason = f"HTTP {response.status}: {_refusal(await response.read())}"
                raise EngineUnavailableError(reason, field="engine /generate")
            async for event in events(response.content):
                yield reader.read(event)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise EngineUnavailableError(_transport(error), field="engine /generate") from error


def sampling_params(request: GenerateRequest) -> dict[str, Any]:
    params: dict[str, Any] = {
        "max_new_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "sampling_seed": request.sampling_seed,
    }
    if request.stop:
        params["stop"] = list(request.stop)
    if request.stop_token_ids:
        params["stop_token_ids"] = list(request.stop_token_ids)
    return params


def _check_open(session: aiohttp.ClientSession, path: str) -> None:
    """A session is closed when its engine has ended, perhaps before a call of it began."""
    if session.closed:
        raise EngineUnavailableError("not running", field=f"engine {path}")


def _check_key(status: int, path: str) -> None:
    if status in (401, 403):
        raise KeyRefusedError(f"the admin key was refused: HTTP {status}", field=f"engine {path}")


def _total(seconds: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_TIMEOUT_S)


def _transport(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _refusal(content: bytes) -> str:
    answer = _object(content)
    return error_text(answer.get("error") or answer.get("message") or content[:500].decode(errors="replace"))
