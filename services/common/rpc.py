"""gRPC the way every service here uses it: health and reflection on, errors typed, deadlines required.

Channels are plaintext and therefore loopback or unix sockets only.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.common.errors import ConfigError, InvalidArgumentError, LimitError, PolyheadError, to_status
from services.common.parts import check_parts
from services.common.splice import serializer

log = structlog.get_logger()

MIB = 1 << 20

_TRANSPORT = [
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Of pings that the transport sends for reasons of its own: while one is unanswered, there is no keepalive.
    ("grpc.http2.ping_timeout_ms", 10_000),
    # The server's default allows a ping every 5 minutes and closes channels that ask more often.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A service that was restarted is back within a second or two; gRPC's default backs off up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Python copies a message once more for each frame: of the default size a megabyte would be 64 of them.
    ("grpc.http2.max_frame_size", 16 * MIB - 1),
]
_SPREAD = '{"loadBalancingConfig": [{"round_robin": {}}]}'


def _options(message_mb: int) -> list[tuple[str, int | str]]:
    return [
        *_TRANSPORT,
        ("grpc.max_receive_message_length", message_mb * MIB),
        ("grpc.max_send_message_length", message_mb * MIB),
    ]


@dataclass(frozen=True)
class _Refused:
    """Stands in for a request that was not parsed, so that the handler can answer why."""

    error: PolyheadError


class _ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Turns typed errors into gRPC statuses, and malformed requests into INVALID_ARGUMENT."""

    def __init__(self) -> None:
        # A handler is the same for all calls of its method, and making one takes as long as parsing a request.
        self._handlers: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        method = handler_call_details.method
        if method not in self._handlers:
            handler = await continuation(handler_call_details)
            if handler is None:  # any text may be asked for: it is not remembered
                return None
            self._handlers[method] = handler if handler.unary_unary is None else _typed(handler, method)
        return self._handlers[method]


def _typed(handler: Any, method: str) -> Any:
    inner, parse = handler.unary_unary, handler.request_deserializer
    # What generated code gives is the class method of the message.
    descriptor = parse.__self__.DESCRIPTOR

    def deserialize(data: bytes) -> Any:
        try:
            check_parts(data, descriptor, "request")
            return parse(data)
        except LimitError as error:
            return _Refused(error.with_traceback(None))
        except DecodeError as error:
            return _Refused(InvalidArgumentError(f"cannot be parsed: {error}", field="request"))

    async def behaviour(request: Any, context: Any) -> Any:
        try:
            if isinstance(request, _Refused):
                raise request.error
            return await inner(request, context)
        except PolyheadError as error:
            code, (details, metadata) = error.code, to_status(error)
        except (grpc.aio.AbortError, grpc.aio.AioRpcError):
            raise
        except Exception:  # a fault of ours: told here with its trace, and answered by gRPC as UNKNOWN
            log.exception("rpc_failed", method=method)
            raise
        # What aborts the call stands in a cycle with this frame: the request, which may be large, would last until the
        # next collection of cycles, and so would those frames that the error knows.
        request = None
        return await context.abort(code, details, metadata)

    return grpc.unary_unary_rpc_method_handler(behaviour, deserialize, serializer(handler.response_serializer))


def channel(address: str, *, message_mb: int = 64) -> grpc.aio.Channel:
    """A channel to another service. Its unary calls raise ValueError when they are made without a deadline.

    `address` may be a list, host:port,host:port, of replicas any of which will do: calls are spread over those that
    are up. Raises ConfigError for an address that plaintext must not go to.
    """
    options = _options(message_mb)
    for each in address.split(","):
        _require_local(each)
    if "," in address:
        options.append(("grpc.service_config", _SPREAD))
        address = f"ipv4:{address}"
    # In plaintext, to this machine only: `_require_local` has refused any other.
    opened = grpc.aio.insecure_channel(address, options=options)
    plain = opened.unary_unary

    # Not an interceptor: that costs 0.15 ms a call, half as much as the call itself.
    def unary_unary(
        method: str, request_serializer: Callable[[Any], bytes] | None = None, *args: Any, **kwargs: Any
    ) -> Callable[..., Any]:
        call = plain(method, request_serializer and serializer(request_serializer), *args, **kwargs)

        def with_deadline(request: Any, *, timeout: float | None = None, **options: Any) -> Any:
            if timeout is None:
                raise ValueError(f"{method!r} called without a deadline")
            return call(request, timeout=timeout, **options)

        return with_deadline

    opened.unary_unary = unary_unary  # type: ignore[method-assign, assignment]
    return opened


def outside_channel(
    target: str, credentials: grpc.ChannelCredentials | None, *, host: str, response_kb: int
) -> grpc.aio.Channel:
    """A channel to a server of somebody else's, known as `host`. `target` holds addresses, not names: ipv4:host:port.

    Proxies of the environment are not used. Without credentials it is plaintext, which the caller answers for.
    """
    options: list[tuple[str, int | str]] = [
        *_TRANSPORT,
        ("grpc.max_receive_message_length", response_kb << 10),
        ("grpc.max_send_message_length", -1),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
        ("grpc.default_authority", host),
    ]
    if credentials is None:
        # Only for what the operator has configured without TLS: never an address from data (`outbound.py`).
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, credentials, [*options, ("grpc.ssl_target_name_override", host)])


@dataclass(frozen=True)
class Server:
    """A serving gRPC server. `address` holds the real port."""

    address: str
    _server: grpc.aio.Server
    _health: health.aio.HealthServicer

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set("", status)

    async def stop(self, grace_s: float) -> None:
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


async def serve(
    address: str,
    register: Callable[[grpc.aio.Server], None],
    services: Sequence[str],
    *,
    message_mb: int = 64,
    max_concurrent: int | None = None,
) -> Server:
    """Starts a server with health and reflection. `services` are the full names it answers for.

    Raises ConfigError when the address cannot be bound or is not local.
    """
    _require_local(address)
    server = grpc.aio.server(
        interceptors=[_ErrorInterceptor()],
        # Without this a second server could bind the same port unnoticed.
        options=[*_options(message_mb), ("grpc.so_reuseport", 0)],
        maximum_concurrent_rpcs=max_concurrent,
    )
    register(server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError("cannot be bound: is another process listening there?", field=address) from error
    await server.start()
    host = address.rpartition(":")[0]
    started = Server(address if address.startswith("unix:") else f"{host}:{port}", server, health_servicer)
    await started.set_serving(True)
    return started


def _require_local(address: str) -> None:
    if address.startswith("unix:"):
        return
    host = address.rpartition(":")[0].strip("[]")
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise ConfigError("plaintext gRPC is for loopback addresses only", field=address)
