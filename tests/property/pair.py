"""The reference store, which never restarts, beside Redis stores of one run on a Valkey that is killed at will.

Every call is made on both. A call that a fault struck is made again with the same ids, as clients do; whether its first
try took effect unheard is read off the server's own count of writes, and then the reference gets the call twice, too.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import redis

from services.buffer.memory_store import MemoryStore
from services.buffer.records import Report, RunParams
from services.buffer.redis_store import RedisStore
from services.buffer.store import Store
from services.common.errors import PolyheadError
from tests.kit import valkey

Call = Callable[[Store], Awaitable[Any]]

REQUEST_LOST, ANSWER_LOST, ANSWER_DROPPED, RACE = "request_lost", "answer_lost", "answer_dropped", "race"
FAULTS = (REQUEST_LOST, ANSWER_LOST, ANSWER_DROPPED, RACE)
"""The server is killed before the call; after it, its answer unread; only the connection ends so; the server is killed
at a random moment of the call."""
BUFFERS = 2
_RACE_S = 0.0008
_OK, _DUPLICATE = 1, 2


class Pair:
    """`seen` counts the faults and what became of the calls they struck."""

    def __init__(self, server: valkey.Valkey, run_name: str, seen: Counter[str]) -> None:
        self.now_ms = 0
        self.memory = MemoryStore(lambda: self.now_ms)
        self.server = server
        self.seen = seen
        self.run_name = run_name
        self.redis = [self._new_store() for _ in range(BUFFERS)]
        self.raw = redis.Redis.from_url(server.url)
        self._broken: set[int] = set()

    async def open(self, params: RunParams) -> None:
        self._params = params
        for store in (self.memory, *self.redis):
            await store.open(params)

    async def close(self) -> None:
        self.raw.close()
        for store in self.redis:
            await store.close()

    async def restart_buffer(self, at: int) -> None:
        """A buffer process ends, whatever it remembers, and another takes its place."""
        await self.redis[at].close()
        self.redis[at] = self._new_store()
        await self.redis[at].open(self._params)
        self._broken.discard(at)
        self.seen["restart_buffer"] += 1

    def restart_store(self) -> None:
        """SIGKILL and start again, with what is in the append-only file."""
        self.server.kill()
        self._start()
        self.seen["kill_store"] += 1

    async def ask(self, call: Call, rng: random.Random, fault: str = "") -> Any:
        """The answer, the same from both stores, or an error as its type and text."""
        at = rng.randrange(BUFFERS)
        expected = await outcome(call, self.memory)
        if not fault:
            answer = await self._asked(call, at)
        elif (answer := await self._struck(call, at, rng, fault)) is None:
            unheard = self._writes() != self._before or fault in (ANSWER_LOST, ANSWER_DROPPED)
            self.seen[f"{fault}: {'took effect unheard' if unheard else 'nothing had happened'}"] += 1
            first = expected
            if unheard:
                expected = await outcome(call, self.memory)
            answer = await self._asked(call, rng.randrange(BUFFERS))
            _check_repeatable(first, answer)
        assert answer == expected, f"redis:  {answer}\nmemory: {expected}"
        return answer

    async def _struck(self, call: Call, at: int, rng: random.Random, fault: str) -> Any:
        """What a call that a fault strikes answers, None for nothing."""
        self._before = self._writes()
        if fault == REQUEST_LOST:
            self.server.kill()
            await _unanswered(call, self.redis[at])
            self._start()
            return None
        if fault == RACE:
            return await self._raced(call, at, rng.uniform(0.0, _RACE_S))
        scripts = self.redis[at]._scripts
        heard = scripts._call

        async def unheard(name: str, packed: bytes, blobs: Any) -> list[Any]:
            await heard(name, packed, blobs)
            raise redis.ConnectionError("the answer was lost")

        scripts._call = unheard  # type: ignore[method-assign]
        await _unanswered(call, self.redis[at])
        if fault == ANSWER_LOST:
            self.restart_store()
        await self.restart_buffer(at)
        return None

    async def _raced(self, call: Call, at: int, wait_s: float) -> Any:
        running = asyncio.ensure_future(outcome(call, self.redis[at]))
        for _ in range(3):  # connecting aside, the request is on its way by then
            await asyncio.sleep(0)
        until = time.perf_counter() + wait_s
        while time.perf_counter() < until:
            pass
        self.server.kill()
        answer = await running
        self._start()
        if not _unavailable(answer):
            self.seen["race: heard"] += 1
            return answer
        return None

    async def _asked(self, call: Call, at: int) -> Any:
        """A connection to a server that was killed fails once before it is made anew."""
        answer = await outcome(call, self.redis[at])
        if _unavailable(answer) and at in self._broken:
            self._broken.discard(at)
            answer = await outcome(call, self.redis[at])
        return answer

    def _start(self) -> None:
        self.server.start()
        self._broken = set(range(BUFFERS))
        self.raw.close()
        self.raw = redis.Redis.from_url(self.server.url)

    def _new_store(self) -> RedisStore:
        return RedisStore(self.server.url, run_name=self.run_name)

    def _writes(self) -> int:
        return int(self.raw.get(f"{{{self.run_name}}}:writes") or 0)

    def expire(self) -> None:
        """All leases are over: the clock of the reference jumps, in Redis the deadlines are moved into the past."""
        state = self.memory.state
        self.now_ms += state.params.lease_ttl_ms + 1
        rows = [(row.due_ms, group.order, index) for group in state.groups.values() for index, row in _indexed(group)]
        places = {
            order * state.params.group_size + index: place for place, (_, order, index) in enumerate(sorted(rows))
        }
        for stage in (1, 2):
            key = f"{{{self.run_name}}}:lease:{stage}"
            if members := self.raw.zrange(key, 0, -1):
                self.raw.zadd(key, {member: places[int(member)] for member in members})


def _indexed(group: Any) -> Any:
    return enumerate(group.samples)


async def outcome(call: Call, store: Store) -> Any:
    """The answer, or an error as its type and text."""
    try:
        return await call(store)
    except PolyheadError as error:
        return type(error).__name__, str(error)


def failed(answer: Any) -> bool:
    return isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], str)


def _unavailable(answer: Any) -> bool:
    return failed(answer) and answer[0] == "UnavailableError"


async def _unanswered(call: Call, store: Store) -> None:
    answer = await outcome(call, store)
    # A call that is refused before it is sent needs no store.
    assert _unavailable(answer), answer


def _check_repeatable(first: Any, again: Any) -> None:
    """What was done, or would have been, by the first try is done, and by one try alone."""
    if isinstance(first, Report):
        for once, twice in zip(first.results, again.results, strict=True):
            allowed = (_OK, _DUPLICATE) if once.outcome == _OK else (once.outcome,)
            assert twice.outcome in allowed, f"{once} and then {twice}"
    elif isinstance(first, list | type(None)):  # submit, publish_version and the like
        assert again == first
