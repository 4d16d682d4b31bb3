"""The routes that change what the engine does: pauses, aborts, weights."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import structlog
from aiohttp import web

from services.common.errors import InvalidArgumentError, PolyheadError, PreconditionError
from services.rollout.engines.torch_engine.engine import Engine
from services.rollout.engines.torch_engine.http_json import Handler, read_object, reply, take
from services.rollout.engines.torch_engine.weight_updates import FLATTENED_BUCKET, Bucket, GroupAddress, SharedBucket

log = structlog.get_logger()

DEFAULT_GROUP = "weight_update_group"
DEFAULT_GROUP_TIMEOUT_S = 60.0


class _NotFlushedError(PreconditionError):
    """The update itself succeeded."""


class AdminRoutes:
    def __init__(self, engine: Engine) -> None:
        self._engine, self._updates = engine, engine.updates

    def routes(self) -> list[web.RouteDef]:
        post: dict[str, Handler] = {
            "/pause_generation": self.pause,
            "/continue_generation": self.resume,
            "/abort_request": self.abort,
            "/flush_cache": self.flush,
            "/init_weights_update_group": self.init_group,
            "/destroy_weights_update_group": self.destroy_group,
            "/begin_weight_update": self.begin_update,
            "/end_weight_update": self.end_update,
            "/update_weights_from_distributed": self.update_from_group,
            "/update_weights_from_disk": self.update_from_disk,
            "/update_weights_from_shared": self.update_from_shared,
            "/weights_checker": self.check_weights,
            "/release_memory_occupation": self.release_memory,
            "/resume_memory_occupation": self.resume_memory,
        }
        get: dict[str, Handler] = {"/flush_cache": self.flush, "/weights_checker": self.check_weights}
        return [
            *(web.post(path, handler) for path, handler in post.items()),
            *(web.get(path, handler, allow_head=False) for path, handler in get.items()),
        ]

    async def pause(self, request: web.Request) -> web.Response:
        mode = take(await read_object(request), "mode", str, "abort")
        if mode not in ("abort", "retract", "in_place"):
            raise InvalidArgumentError(f"must be abort, retract or in_place, not {mode!r}", field="mode")
        await self._engine.thread.pause(mode)
        return reply({"message": "Generation paused successfully.", "status": "ok"})

    async def resume(self, request: web.Request) -> web.Response:
        await self._engine.thread.resume()
        return reply({"message": "Generation continued successfully.", "status": "ok"})

    async def abort(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        if take(body, "abort_all", bool, False):
            await self._engine.abort_all()
        elif rid := take(body, "rid", str, ""):
            self._engine.abort([rid])
        return web.Response(status=200)

    async def flush(self, request: web.Request) -> web.Response:
        """There is no prefix cache to flush; the answer is SGLang's."""
        if not await self._idle():
            return web.Response(text="Cache not flushed: requests are running or waiting.\n", status=400)
        return web.Response(text="Cache flushed.\n")

    async def init_group(self, request: web.Request) -> web.Response:
        async def join() -> str:
            await self._updates.join(_group_address(await read_object(request)))
            return "Succeeded to initialize custom process group."

        return await self._outcome(join())

    async def destroy_group(self, request: web.Request) -> web.Response:
        async def leave() -> str:
            await self._updates.leave(take(await read_object(request), "group_name", str, DEFAULT_GROUP))
            return "Succeeded to destroy custom process group."

        return await self._outcome(leave())

    async def begin_update(self, request: web.Request) -> web.Response:
        return await self._outcome(self._updates.begin())

    async def end_update(self, request: web.Request) -> web.Response:
        return await self._outcome(self._updates.end())

    async def update_from_group(self, request: web.Request) -> web.Response:
        async def receive() -> str:
            body = await read_object(request)
            bucket = _bucket(body)
            self._engine.require_weights()
            await self._abort_if_asked(body)
            await self._updates.receive(bucket, self._engine.thread)
            return await self._updated(body, bucket.weight_version)

        return await self._outcome(receive())

    async def update_from_disk(self, request: web.Request) -> web.Response:
        async def load() -> str:
            body = await read_object(request)
            path, version = Path(take(body, "model_path", str)), take(body, "weight_version", str, None)
            self._engine.require_weights()
            await self._abort_if_asked(body)
            await self._updates.load_from_disk(path, version, self._engine.thread)
            return await self._updated(body, version)

        return await self._outcome(load(), num_paused_requests=0)

    async def update_from_shared(self, request: web.Request) -> web.Response:
        async def load() -> str:
            body = await read_object(request)
            version = take(body, "weight_version", str)
            self._engine.require_weights()
            await self._updates.load_shared(_shared_buckets(body), version, self._engine.thread)
            return await self._updated(body, version)

        return await self._outcome(load())

    async def release_memory(self, request: web.Request) -> web.Response:
        await self._engine.release_memory(_tags(await read_object(request)))
        return web.Response(status=200)

    async def resume_memory(self, request: web.Request) -> web.Response:
        await self._engine.resume_memory(_tags(await read_object(request)))
        return web.Response(status=200)

    async def check_weights(self, request: web.Request) -> web.Response:
        action = take(await read_object(request), "action", str, "checksum")
        if action != "checksum":
            raise InvalidArgumentError(f"must be checksum, not {action!r}", field="action")
        self._engine.require_weights()
        sums = await self._engine.thread.call(self._engine.parameters.checksums)
        whole = hashlib.sha256("".join(f"{name}{sums[name]}" for name in sorted(sums)).encode()).hexdigest()
        rank = {"checksums": sums, "per_gpu_checksum": whole, "parallelism_info": []}
        return reply({"success": True, "message": "Success", "ranks": [rank], "per_engine_checksum": whole})

    async def _updated(self, body: dict[str, Any], version: str | None) -> str:
        """The message of a successful update. Raises _NotFlushedError where SGLang would not flush its cache."""
        if take(body, "flush_cache", bool, True) and not await self._idle():
            raise _NotFlushedError(
                "Weights were updated, but the cache was not flushed: requests are running or queued"
            )
        return "Succeeded to update model weights." + (f" Weight version updated to {version}." if version else "")

    async def _outcome(self, work: Coroutine[Any, Any, str | None], **more: Any) -> web.Response:
        """Success and failure as SGLang's weight routes answer them, and whether the model was touched.

        Work that has begun is finished even when the client goes away: a collective cannot be left half done.
        """
        try:
            message = await asyncio.shield(asyncio.create_task(work))
        except PolyheadError as error:
            touched = self._updates.touched or isinstance(error, _NotFlushedError)
            log.warning("weight_route_refused", reason=str(error), weights_touched=touched)
            return reply({"success": False, "message": str(error), "weights_touched": touched, **more}, 400)
        return reply({"success": True, "message": message or "Success", **more})

    async def _abort_if_asked(self, body: dict[str, Any]) -> None:
        if take(body, "abort_all_requests", bool, False):
            await self._engine.abort_all()

    async def _idle(self) -> bool:
        """No request holds KV, and none waits unless the engine is paused."""
        scheduler, thread = self._engine.scheduler, self._engine.thread
        return await thread.call(
            lambda: scheduler.num_running == 0 and (thread.paused is not None or scheduler.num_waiting == 0)
        )


def _group_address(body: dict[str, Any]) -> GroupAddress:
    rank, world_size = take(body, "rank_offset", int), take(body, "world_size", int)
    if not 0 < rank < world_size:
        raise InvalidArgumentError(
            f"{rank} is not in (0, world_size = {world_size}): rank 0 sends", field="rank_offset"
        )
    return GroupAddress(
        name=take(body, "group_name", str, DEFAULT_GROUP),
        backend=take(body, "backend", str, "nccl"),
        address=take(body, "master_address", str),
        port=take(body, "master_port", int),
        rank=rank,
        world_size=world_size,
        timeout_s=take(body, "timeout_s", float, DEFAULT_GROUP_TIMEOUT_S),
    )


def _bucket(body: dict[str, Any]) -> Bucket:
    load_format = take(body, "load_format", str, None)
    if load_format not in (None, FLATTENED_BUCKET):
        raise InvalidArgumentError(f"must be {FLATTENED_BUCKET} or null, not {load_format!r}", field="load_format")
    bucket = Bucket(
        names=_list_of(body, "names", str),
        dtypes=_list_of(body, "dtypes", str),
        shapes=_list_of(body, "shapes", list),
        group_name=take(body, "group_name", str, DEFAULT_GROUP),
        flattened=load_format == FLATTENED_BUCKET,
        weight_version=take(body, "weight_version", str, None),
    )
    if not len(bucket.names) == len(bucket.dtypes) == len(bucket.shapes):
        raise InvalidArgumentError("names, dtypes and shapes must be as many", field="names")
    return bucket


def _tags(body: dict[str, Any]) -> list[str]:
    """Everything, when none are named."""
    return _list_of(body, "tags", str) if body.get("tags") else ["kv_cache", "weights", "cuda_graph"]


def _shared_buckets(body: dict[str, Any]) -> list[SharedBucket]:
    return [
        SharedBucket(
            file=take(bucket, "file", str),
            num_bytes=take(bucket, "num_bytes", int),
            tensors=[_tensor_spec(spec) for spec in _list_of(bucket, "tensors", list)],
        )
        for bucket in _list_of(body, "buckets", dict)
    ]


def _tensor_spec(spec: list[Any]) -> tuple[str, str, list[int]]:
    match spec:
        case [str(name), str(dtype), list(shape)] if all(isinstance(size, int) and size >= 0 for size in shape):
            return name, dtype, shape
    raise InvalidArgumentError("must be lists of name, dtype and shape", field="tensors")


def _list_of(body: dict[str, Any], field: str, kind: type) -> list[Any]:
    values = take(body, field, list)
    if not all(isinstance(value, kind) for value in values):
        raise InvalidArgumentError(f"must be a list of {kind.__name__}", field=field)
    if field == "shapes" and not all(isinstance(size, int) and size >= 0 for shape in values for size in shape):
        raise InvalidArgumentError("must be lists of sizes", field=field)
    return list(values)
