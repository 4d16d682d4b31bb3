"""JSON over aiohttp: bodies in, answers and errors out."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
import structlog
from aiohttp import web

from services.common.errors import InvalidArgumentError, PolyheadError

log = structlog.get_logger()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def reply(body: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")


def refusal(message: str, status: int = 400) -> web.Response:
    """An error as SGLang's /generate writes it."""
    return reply({"error": {"message": message, "code": status}}, status)


async def read_object(request: web.Request) -> dict[str, Any]:
    """The JSON object in the body; an empty body is an empty object. Raises InvalidArgumentError."""
    data = await request.read()
    try:
        body = orjson.loads(data) if data else {}
    except orjson.JSONDecodeError as error:
        raise InvalidArgumentError(f"is not valid JSON: {error}", field="body") from None
    if not isinstance(body, dict):
        raise InvalidArgumentError("must be a JSON object", field="body")
    return body


def take(body: Mapping[str, Any], field: str, kind: type, default: Any = ...) -> Any:
    """A field of the body; null counts as absent, and an integer as a float where that is wanted.

    Raises InvalidArgumentError when it is missing or of another type.
    """
    value = body.get(field)
    if value is None:
        if default is ...:
            raise InvalidArgumentError("is missing", field=field)
        return default
    fits = isinstance(value, int if kind is float and isinstance(value, int) else kind)
    if not fits or (kind is not bool and isinstance(value, bool)):
        raise InvalidArgumentError(f"must be of type {kind.__name__}, not {value!r}", field=field)
    return value


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """No failure leaves without a JSON reason, and none ends the server."""
    try:
        return await handler(request)
    except PolyheadError as error:
        return refusal(str(error))
    except web.HTTPException as error:
        return refusal(f"{request.method} {request.path}: {error.reason}", error.status)
    except ConnectionError:
        raise  # the client went away: there is nobody to answer
    except Exception as error:
        log.exception("request_failed", path=request.path)
        return refusal(f"internal error: {type(error).__name__}", 500)


def require_key(key: str | None, paths: frozenset[str]) -> Any:
    """A middleware that asks for `Authorization: Bearer key` on `paths`, when there is a key."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if key is not None and request.path in paths:
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), key.encode()):
                return reply({"error": "Unauthorized"}, 401)
        return await handler(request)

    return check
