"""A server of polyhead.v1.RewardService, somebody else's."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Sequence
from pathlib import Path

import grpc

from polyhead.v1 import reward_pb2, reward_pb2_grpc, sample_pb2
from services.common.config.remote import RemoteConfig
from services.common.errors import ConfigError, LimitError, from_rpc_error
from services.common.outbound import Place, parse_network
from services.common.rpc import outside_channel
from services.common.wire import TOKEN_DTYPE
from services.reward.remote.outcomes import (
    Answer,
    BadAnswerError,
    BrokenCallError,
    CallError,
    RefusedError,
    UnreachableError,
)
from services.reward.remote.resolving import resolve
from services.reward.scorers.base import Item, SampleError, Verdict, to_spans

_Code = grpc.StatusCode
# These say nothing about the samples, and will not pass by themselves.
_NOT_FOR_US = (_Code.UNAUTHENTICATED, _Code.PERMISSION_DENIED, _Code.UNIMPLEMENTED, _Code.NOT_FOUND)
_REFUSED = (_Code.INVALID_ARGUMENT, _Code.OUT_OF_RANGE, _Code.FAILED_PRECONDITION)
_MAX_REASON = 200


class GrpcClient:
    """Keeps a channel to the addresses that the name had when it was last resolved; a call that fails renews them."""

    def __init__(self, config: RemoteConfig, place: Place) -> None:
        """Raises ConfigError for certificates that cannot be read."""
        self._config, self._place = config, place
        self._networks = [parse_network(each) for each in config.networks]
        self._credentials = _credentials(config) if place.scheme == "grpcs" else None
        token = config.token.get_secret_value() if config.token is not None else ""
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._opening = asyncio.Lock()
        self._channel: grpc.aio.Channel | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self.batch_size = config.batch_size

    async def start(self) -> None:
        """Nothing to open yet: a server may come later."""

    async def close(self) -> None:
        self._retire(self._channel, grace_s=0)
        await asyncio.gather(*self._closing, return_exceptions=True)

    async def score(self, items: Sequence[Item]) -> Sequence[Answer]:
        channel = await self._open()
        message = reward_pb2.ScoreRequest(scorer=self._config.scorer, items=[_to_proto(each) for each in items])
        try:
            response = await reward_pb2_grpc.RewardServiceStub(channel).Score(
                message, timeout=self._config.timeout_s, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is _Code.UNAVAILABLE:
                self._retire(channel, grace_s=self._config.timeout_s)
            raise self._failure(error) from error
        if len(response.results) != len(items):
            raise BadAnswerError(f"{len(response.results)} results for {len(items)} items")
        return [_answer(item, result) for item, result in zip(items, response.results, strict=True)]

    async def _open(self) -> grpc.aio.Channel:
        async with self._opening:
            if self._channel is None:
                target, host = await self._target(), self._place.host
                self._channel = outside_channel(
                    target, self._credentials, host=host, response_kb=self._config.max_response_kb
                )
            return self._channel

    async def _target(self) -> str:
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                found = await resolve(self._place.host, self._place.port, self._networks)
        except TimeoutError as error:
            raise UnreachableError("cannot be resolved: timed out") from error
        except OSError as error:
            raise UnreachableError(f"cannot be resolved: {error.strerror}") from error
        ours = [each["host"] for each in found if each["family"] == found[0]["family"]]
        if found[0]["family"] == socket.AF_INET6:
            return "ipv6:" + ",".join(f"[{host}]:{self._place.port}" for host in ours)
        return "ipv4:" + ",".join(f"{host}:{self._place.port}" for host in ours)

    def _retire(self, channel: grpc.aio.Channel | None, grace_s: float) -> None:
        """Calls that are under way on a channel may end; new ones get another."""
        if channel is not None and channel is self._channel:
            self._channel = None
            task = asyncio.create_task(channel.close(grace_s))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _failure(self, error: grpc.aio.AioRpcError) -> CallError:
        code, said = error.code(), " ".join((error.details() or "").split())[:_MAX_REASON]
        reason = f"{code.name}: {said}".rstrip(": ")
        if code is _Code.DEADLINE_EXCEEDED:
            return BrokenCallError(f"timed out after {self._config.timeout_s:g} s", timed_out=True)
        if code is _Code.UNAVAILABLE:
            return UnreachableError(reason)
        if code in _NOT_FOR_US:
            return UnreachableError(reason, retry=False)
        if code is _Code.RESOURCE_EXHAUSTED:
            too_large = isinstance(from_rpc_error(error), LimitError) or "larger than max" in said
            return BadAnswerError(reason) if too_large else UnreachableError(reason)
        return RefusedError(reason) if code in _REFUSED else BrokenCallError(reason)


def _to_proto(item: Item) -> reward_pb2.ScoreItem:
    prompt = sample_pb2.Prompt(label=item.label, metadata_json=item.metadata_json)
    if item.messages_json:
        prompt.messages_json = item.messages_json
    else:
        prompt.text = item.prompt
    prompt_length = len(item.token_ids) // TOKEN_DTYPE.itemsize - item.completion_tokens if item.token_ids else 0
    return reward_pb2.ScoreItem(
        sample_id=item.sample_id,
        prompt=prompt,
        completion=item.completion,
        token_ids=item.token_ids,
        prompt_length=prompt_length,
    )


def _answer(item: Item, result: reward_pb2.ScoreResult) -> Answer:
    if result.sample_id != item.sample_id:
        return BadAnswerError(f"the result is of {result.sample_id!r:.80}")
    if result.HasField("error"):
        reason = " ".join(result.error.message.split())[:_MAX_REASON] or "no reason given"
        unavailable = result.error.kind == reward_pb2.SCORE_ERROR_KIND_UNAVAILABLE
        return UnreachableError(reason) if unavailable else SampleError(reason)
    if not result.HasField("score"):
        return BadAnswerError("the result is neither a score nor an error")
    parts = dict(result.score.parts)
    bad = next((name for name, part in {"reward": result.score.reward, **parts}.items() if not math.isfinite(part)), "")
    if bad:
        return BadAnswerError(f"{bad} is not a finite number")
    try:
        spans = to_spans([[span.start, span.end, span.reward] for span in result.score.spans])
    except SampleError as error:
        return BadAnswerError(str(error))
    return Verdict(result.score.reward, parts, spans)


def _credentials(config: RemoteConfig) -> grpc.ChannelCredentials:
    def read(path: Path | None) -> bytes | None:
        return path.read_bytes() if path is not None else None

    try:
        return grpc.ssl_channel_credentials(read(config.ca), read(config.key), read(config.cert))
    except OSError as error:
        raise ConfigError(f"the certificates cannot be used: {error}", field="reward.remote") from error
