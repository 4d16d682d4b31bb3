"""gRPC set-up: typed errors through a real server, deadlines, malformed requests, health, reflection, addresses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from polyhead.v1 import reward_pb2, reward_pb2_grpc
from services.common import errors, rpc
from services.common.errors import ConfigError, PolyheadError

SERVICE = "polyhead.v1.RewardService"
METHOD = f"/{SERVICE}/Score"


class Servicer(reward_pb2_grpc.RewardServiceServicer):
    """Raises what the test has put into `error`, else answers with nothing."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:
        if self.error is not None:
            raise self.error
        return reward_pb2.ScoreResponse()


async def start(servicer: Servicer, address: str = "127.0.0.1:0", **options: int) -> rpc.Server:
    def register(server: Any) -> None:
        reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server)

    return await rpc.serve(address, register, [SERVICE], **options)


@pytest.fixture
def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
async def server(servicer: Servicer) -> AsyncIterator[rpc.Server]:
    started = await start(servicer)
    yield started
    await started.stop(0)


@pytest.fixture
async def channel(server: rpc.Server) -> AsyncIterator[grpc.aio.Channel]:
    opened = rpc.channel(server.address)
    yield opened
    await opened.close()


async def call(channel: grpc.aio.Channel) -> reward_pb2.ScoreResponse:
    return await reward_pb2_grpc.RewardServiceStub(channel).Score(reward_pb2.ScoreRequest(), timeout=5)


async def failure(channel: grpc.aio.Channel) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel)
    return caught.value


@pytest.mark.parametrize(
    "cls", [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, PolyheadError)]
)
@pytest.mark.parametrize(
    ("reason", "field"),
    [
        ("is over 5, at most 3", "samples[2].sample"),
        ("no field here", ""),
        ("a: colon, and a % sign: 100 %", "a"),
        ("nicht da: größer als 3 × 4", "/tmp/Übung/größe.toml"),
        ("two\nlines", "a\nfield"),
        ("a" * 100_000, "b" * 10_000),
    ],
)
async def test_typed_errors_arrive_as_they_were_raised(
    servicer: Servicer, channel: grpc.aio.Channel, cls: type[PolyheadError], reason: str, field: str
) -> None:
    servicer.error = cls(reason, field=field)
    error = await failure(channel)
    typed = errors.from_rpc_error(error)
    assert error.code() == cls.code
    assert type(typed) is cls
    if len(reason) < 1000:
        assert (typed.reason, typed.field, str(typed)) == (reason, field, str(servicer.error))
    else:
        assert typed.reason.startswith("a" * 500)
        assert typed.field.startswith("b" * 100)


async def test_other_exceptions_are_no_typed_errors(servicer: Servicer, channel: grpc.aio.Channel) -> None:
    servicer.error = RuntimeError("a bug")
    error = await failure(channel)
    assert error.code() == grpc.StatusCode.UNKNOWN
    assert errors.from_rpc_error(error) is None


async def test_a_call_without_a_deadline_is_not_sent(channel: grpc.aio.Channel) -> None:
    with pytest.raises(ValueError, match=r"RewardService/Score' called without a deadline"):
        await reward_pb2_grpc.RewardServiceStub(channel).Score(reward_pb2.ScoreRequest())


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x12\x05abc", b"\x0a\x02\xff\xfe"])
async def test_malformed_bytes_are_an_invalid_argument(channel: grpc.aio.Channel, data: bytes) -> None:
    raw = channel.unary_unary(METHOD, request_serializer=bytes, response_deserializer=bytes)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await raw(data, timeout=5)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith("request: cannot be parsed")


async def test_an_unknown_method_is_unimplemented(channel: grpc.aio.Channel) -> None:
    raw = channel.unary_unary(f"/{SERVICE}/Guess", request_serializer=bytes, response_deserializer=bytes)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await raw(b"", timeout=5)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_messages_over_the_limit_are_refused(servicer: Servicer) -> None:
    server = await start(servicer, message_mb=1)
    async with rpc.channel(server.address, message_mb=8) as channel:
        big = reward_pb2.ScoreRequest(scorer="x" * (2 << 20))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reward_pb2_grpc.RewardServiceStub(channel).Score(big, timeout=5)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await call(channel) == reward_pb2.ScoreResponse()
    await server.stop(0)


async def test_health_follows_the_server(server: rpc.Server, channel: grpc.aio.Channel) -> None:
    async def status() -> int:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        return answer.status

    assert await status() == health_pb2.HealthCheckResponse.SERVING
    await server.set_serving(False)
    assert await status() == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_reflection_lists_the_services(channel: grpc.aio.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    listed = [
        service.name
        async for answer in stub.ServerReflectionInfo(iter([request]), timeout=5)
        for service in answer.list_services_response.service
    ]
    assert {SERVICE, "grpc.health.v1.Health"} <= set(listed)


async def test_a_port_in_use_is_a_config_error(server: rpc.Server) -> None:
    with pytest.raises(ConfigError, match="cannot be bound") as caught:
        await start(Servicer(), server.address)
    assert caught.value.field == server.address


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0:1", "10.1.2.3:1", "example.com:1", "[::]:1", "169.254.169.254:80", ":1", "", "localhost.example.com:1"],
)
@pytest.mark.parametrize("use", [rpc.channel, start])
async def test_plaintext_stays_on_this_machine(address: str, use: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="loopback"):
        await start(Servicer(), address) if use is start else use(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1.2.3"])
async def test_loopback_is_served_and_the_address_holds_the_port(servicer: Servicer, host: str) -> None:
    server = await start(servicer, f"{host}:0")
    assert server.address.startswith(f"{host}:")
    assert not server.address.endswith(":0")
    async with rpc.channel(server.address) as channel:
        assert await call(channel) == reward_pb2.ScoreResponse()
    await server.stop(0)


async def test_unix_sockets_are_served(servicer: Servicer, tmp_path: Path) -> None:
    server = await start(servicer, f"unix:{tmp_path}/s")
    async with rpc.channel(server.address) as channel:
        assert await call(channel) == reward_pb2.ScoreResponse()
    await server.stop(0)


def test_grpc_knows_the_options():
    """It ignores those that it does not know."""
    library = Path(grpc._cython.cygrpc.__file__).read_bytes()
    assert [name for name, _ in rpc._options(1) if name.encode() not in library] == []
