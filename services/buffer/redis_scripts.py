"""Lua scripts on a Redis connection: loaded once, called by digest, and every failure as one typed error."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgpack
import structlog
from redis import exceptions as failures
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from services.buffer.durability import Durability
from services.common import errors
from services.common.errors import ConfigError, PolyheadError, UnavailableError

log = structlog.get_logger()

_DIRECTORY = Path(__file__).parent / "scripts"
_MAX_CONNECTIONS = 32
_CONNECT_TIMEOUT_S = 5.0
_CALL_TIMEOUT_S = 10.0

# Scripts by name, with the files that follow common.lua.
_PARTS: dict[str, tuple[str, ...]] = {
    "open": ("open",),
    "issue": ("issue",),
    "submit": ("submits", "submit"),
    "lease_generate": ("leases", "lease_generate"),
    "lease_score": ("leases", "lease_score"),
    "lease_train": ("leases", "plan", "lease_train"),
    "fetch": ("fetch",),
    "extend": ("batch", "extend"),
    "heartbeat": ("batch", "extend"),
    "complete_generate": ("batch", "complete_generate"),
    "complete_score": ("batch", "complete_score"),
    "partials": ("leases", "partials"),
    "prefer": ("prefer",),
    "release": ("batch", "release"),
    "commit_step": ("commit_step",),
    "publish_version": ("publish_version",),
    "watermark": ("watermark",),
    "confirm_checkpoint": ("retire", "confirm_checkpoint"),
    "acquire_epoch": ("acquire_epoch",),
    "recover": ("retire", "recover"),
    "replicas": ("replicas",),
    "lost": ("lost",),
    "ledger": ("leases", "plan", "ledger"),
    "list_samples": ("dead", "list_samples"),
    "referenced_blobs": ("referenced_blobs",),
    "requeue": ("dead", "requeue"),
    "import_groups": ("submits", "import_groups"),
}
# A full store refuses these. Everything else frees memory or leads to it, and what it adds is bounded by the groups
# that are live: admission stops well before the store is full. "extend" is "heartbeat" with tokens.
_NEEDS_ROOM = {"issue", "submit", "extend", "requeue", "import_groups"}
# A run that another client wiped out is created again before anything else is done with it.
_GUARD = "if not M then return fail('RunMissing', '', '') end\n"


@cache
def source(name: str) -> str:
    """The whole text of a script."""
    shebang = "#!lua\n" if name in _NEEDS_ROOM else "#!lua flags=allow-oom\n"
    common = (_DIRECTORY / "common.lua").read_text()
    guard = "" if name == "open" else _GUARD
    parts = "".join((_DIRECTORY / f"{part}.lua").read_text() for part in _PARTS[name])
    return shebang + common + guard + parts


class RunMissing(PolyheadError):  # noqa: N818 - a condition that the store heals, not a failure its callers see
    """The store holds no such run."""


class StoreFullError(UnavailableError):
    """The store is out of memory: what needs room has to wait until a checkpoint frees some."""


class ScriptRunner:
    """Calls scripts under the keys of one run. `where` names the store in errors."""

    def __init__(self, url: str, password: str | None, run_name: str) -> None:
        pool = BlockingConnectionPool.from_url(
            url,
            password=password,
            max_connections=_MAX_CONNECTIONS,
            timeout=_CALL_TIMEOUT_S,
            socket_timeout=_CALL_TIMEOUT_S,
            socket_connect_timeout=_CONNECT_TIMEOUT_S,
            protocol=2,
            # The callers retry: a script must not run twice behind their back.
            retry=Retry(NoBackoff(), 0),
        )
        self._redis = Redis.from_pool(pool)
        self._prefix = f"{{{run_name}}}:"
        self.where = url.rpartition("@")[2]
        self._digests: dict[str, str] = {}
        self.acknowledged = 0
        """The highest position that the store has answered with: it never goes back unless the store lost writes."""

    async def close(self) -> None:
        await self._redis.aclose()

    async def run(self, name: str, arguments: object, blobs: Sequence[bytes] = ()) -> tuple[Any, list[bytes]]:
        """One script call: its body and the byte strings that follow it. Raises what the script refused with."""
        packed = msgpack.packb(arguments, use_bin_type=False)
        acknowledged = self.acknowledged
        try:
            answer = await self._call(name, packed, blobs)
        except (failures.RedisError, OSError) as error:
            raise translate(error, self.where) from error
        body = msgpack.unpackb(answer[0], strict_map_key=False)
        if isinstance(body, dict) and "error" in body:
            if body["error"] == "RunMissing":
                raise RunMissing("the store holds no such run", field=self.where)
            kind: type[PolyheadError] = getattr(errors, body["error"])
            raise kind(body["reason"], field=body["field"])
        *stored, before, after = answer[1:]
        self.acknowledged = max(self.acknowledged, after)
        if before < acknowledged and name != "lost":
            await self._report_lost(before, acknowledged)
        return body, stored

    async def _report_lost(self, found: int, acknowledged: int) -> None:
        (missing,), _ = await self.run("lost", [found, acknowledged])
        if missing:
            log.error("lost_after_restart", store=self.where, writes=missing)

    async def used_memory(self) -> int:
        """Bytes the server has allocated."""
        try:
            info = await self._redis.info("memory")
        except (failures.RedisError, OSError) as error:
            raise translate(error, self.where) from error
        return int(info["used_memory"])

    async def durability(self) -> Durability:
        """What the server says of its memory policy and its append-only file."""
        try:
            memory, persistence = await self._redis.info("memory"), await self._redis.info("persistence")
        except (failures.RedisError, OSError) as error:
            raise translate(error, self.where) from error
        try:
            appendfsync = (await self._redis.config_get("appendfsync")).get("appendfsync")
        except failures.ResponseError:  # managed servers hide CONFIG
            appendfsync = None
        return Durability(
            int(memory.get("maxmemory", 0)),
            str(memory.get("maxmemory_policy", "noeviction")),
            bool(persistence.get("aof_enabled", 0)),
            appendfsync,
        )

    async def _call(self, name: str, packed: bytes, blobs: Sequence[bytes]) -> list[Any]:
        digest = self._digests.get(name)
        if digest is not None:
            try:
                return await self._redis.evalsha(digest, 1, self._prefix, packed, *blobs)
            except failures.NoScriptError:
                pass
        self._digests[name] = digest = await self._redis.script_load(source(name))
        return await self._redis.evalsha(digest, 1, self._prefix, packed, *blobs)


def translate(error: Exception, where: str) -> PolyheadError:
    """A failure of the server or the connection as one clear line."""
    if (untrusted := _untrusted(error)) is not None:
        return ConfigError(
            f"its certificate is not trusted: {untrusted.verify_message}; add ?ssl_ca_certs=FILE to store.url",
            field=f"store {where}",
        )
    if isinstance(error.__cause__, failures.RedisError):  # what went wrong while connecting
        error = error.__cause__
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, failures.AuthenticationError | failures.AuthorizationError | failures.NoPermissionError):
        return ConfigError(f"refused: {text}", field=f"store {where}")
    if isinstance(error, failures.OutOfMemoryError) or "OOM " in text:
        return StoreFullError("out of memory: raise store.max_memory_mb or retire checkpoints", field=f"store {where}")
    if isinstance(error, failures.ConnectionError | failures.TimeoutError | OSError):
        return UnavailableError(f"does not answer: {text}", field=f"store {where}")
    if "NOAUTH" in text or "WRONGPASS" in text or "NOPERM" in text:
        return ConfigError(f"refused: {text}", field=f"store {where}")
    if isinstance(error, failures.ReadOnlyError) or any(word in text for word in ("MISCONF", "READONLY", "NOREPLICAS")):
        return UnavailableError(f"refuses writes: {text}", field=f"store {where}")
    return PolyheadError(f"failed: {text}", field=f"store {where}")


def _untrusted(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    """The certificate's refusal behind a failure to connect."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error
