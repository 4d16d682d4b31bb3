"""Malformed requests to one service, and what may come back."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping

import grpc
from google.protobuf.message import Message

from polyhead.v1 import sample_pb2
from services.common.errors import ERROR_FIELD_KEY, ERROR_NAME_KEY
from tests.kit.fuzz.mutations import Mutator

REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.DATA_LOSS,
}


def check_refusal(error: grpc.RpcError, said: str, *, also: frozenset[grpc.StatusCode] = frozenset()) -> None:
    """Raises AssertionError with `said` unless the status says what is wrong with the request, and where. `also` are
    the codes of other failures that may be met, typed too.
    """
    trailing = {str(key): value for key, value in error.trailing_metadata() or ()}
    assert error.code() in REFUSALS | also, said
    assert trailing.get(ERROR_NAME_KEY), said
    assert trailing.get(ERROR_FIELD_KEY), said


async def send_malformed(
    channel: grpc.aio.Channel,
    service: str,
    requests: Mapping[str, Message],
    *,
    seed: int,
    count: int,
    also: frozenset[grpc.StatusCode] = frozenset(),
) -> Counter[str]:
    """`count` requests, made from the valid ones by method. Answers by method and code."""
    rng = random.Random(seed)
    mutator = Mutator(rng, sample_pb2.Sample)
    seen: Counter[str] = Counter()
    for _ in range(count):
        method = rng.choice(list(requests))
        data = mutator.mutated(requests[method])
        try:
            await channel.unary_unary(f"/{service}/{method}")(data, timeout=20)
        except grpc.aio.AioRpcError as error:
            said = f"seed {seed}, {method}({len(data)} bytes {data[:300].hex()}): {error.code()} {error.details()}"
            check_refusal(error, said, also=also)
            seen[f"{method} {error.code().name}"] += 1
        else:
            seen[f"{method} OK"] += 1
    return seen
