"""One server: its client, its breaker, its places for calls, and what it was last able to score."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from services.common.config.remote import RemoteConfig
from services.common.outbound import Place
from services.reward.remote.breaker import Breaker, State
from services.reward.remote.grpc_client import GrpcClient
from services.reward.remote.kinds import Classify, Judge, RemoteRm
from services.reward.remote.outcomes import Answer, BrokenCallError, CallError, Client
from services.reward.scorers.base import Item, Verdict


class Endpoint:
    """`client.start` first, `close` last."""

    def __init__(self, config: RemoteConfig, place: Place, on_change: Callable[[], None]) -> None:
        self.client = _client(config, place)
        self.slots = asyncio.Semaphore(config.concurrency)
        self.breaker = Breaker(
            failures=config.breaker_failures,
            reset_s=config.breaker_reset_s,
            max_reset_s=config.breaker_max_reset_s,
            on_change=on_change,
        )
        self.name = f"{place.host}:{place.port}"
        # Nothing that a server does, not even a slow drip of bytes, makes a call longer.
        self._limit_s = config.timeout_s + config.connect_timeout_s + 1.0
        self._control: Item | None = None
        self._checking: asyncio.Task[bool] | None = None

    @property
    def trouble(self) -> str:
        """Why it gets no calls, or a single one; empty when it gets them."""
        if self.breaker.state is State.CLOSED:
            return ""
        return f"{self.name}: {self.breaker.reason} (breaker {self.breaker.state})"

    @property
    def batch_size(self) -> int:
        return self.client.batch_size if self.breaker.state is State.CLOSED else 1

    async def score(self, items: Sequence[Item]) -> Sequence[Answer]:
        """Raises CallError."""
        try:
            async with asyncio.timeout(self._limit_s):
                answers = await self.client.score(items)
        except TimeoutError:
            raise BrokenCallError(f"timed out after {self._limit_s:g} s", timed_out=True) from None
        for item, answer in zip(items, answers, strict=True):
            if isinstance(answer, Verdict):
                self._control = item
        return answers

    async def still_scores(self, failed: Item) -> bool:
        """Whether it scores the sample that it last scored: then it is not its fault that `failed` was not.

        Where it has scored none so far, the label of `failed` as the completion is one.
        """
        if self._checking is None:
            plain = failed._replace(completion=failed.label, token_ids=b"")
            self._checking = asyncio.create_task(self._check(self._control or plain))
        return await asyncio.shield(self._checking)

    async def _check(self, control: Item) -> bool:
        try:
            [answer] = await self.score([control])
            return isinstance(answer, Verdict)
        except CallError:
            return False
        finally:
            self._checking = None

    async def close(self) -> None:
        self.breaker.close()
        if self._checking is not None:
            self._checking.cancel()
        await self.client.close()


def _client(config: RemoteConfig, place: Place) -> Client:
    if config.kind == "grpc":
        return GrpcClient(config, place)
    kinds: dict[str, Callable[[RemoteConfig, str], Client]] = {"http": RemoteRm, "judge": Judge, "classify": Classify}
    return kinds[config.kind](config, place.url)
