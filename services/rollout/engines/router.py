"""Keeps sglang-router running in front of the engines of one replica, and its workers equal to those in rotation."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Set
from pathlib import Path

import structlog

from services.common.errors import ConfigError
from services.common.process import free_port
from services.rollout.engines.child import ChildProcess, NeverReadyError
from services.rollout.engines.lives import keep_alive
from services.rollout.engines.messages import EngineUnavailableError
from services.rollout.engines.routed import RoutedClient
from services.rollout.engines.router_launch import RouterCommand

log = structlog.get_logger()

_POLL_S = 0.05
_TERM_GRACE_S = 2.0
# Between two looks at the router's list: when all is as wanted, and while something was asked for.
_SETTLED_S = 0.5
_UNSETTLED_S = 0.02
# An engine that is not listed is announced again after this time; until then its announcement may still be under way.
_ANNOUNCED_S = 10.0
# For this long after its start, the router is given time to find every engine; then those that it has are enough.
_COMPLETE_S = 3.0
# Taking an engine out must not wait for a router that hangs: without the router, no request reaches it either.
_REMOVE_TIMEOUT_S = 5.0
# Failures in a row after which the router is taken to hang.
_MAX_FAILURES = 3

# Address -> API key of the engines that requests may go to
Workers = Mapping[str, str]


class RouterProcess:
    """One life of the router: a child process, its key, its client."""

    def __init__(self, command: RouterCommand, log_path: Path) -> None:
        port, key = free_port(), secrets.token_hex(24)
        launch = command(port, free_port(), key)
        self.process = ChildProcess(launch.command, launch.environment, log_path, [key])
        self.client = RoutedClient(f"http://127.0.0.1:{port}", key)
        self.announced: dict[str, tuple[str, float]] = {}
        """Address -> (the key that the router was given for it, when)."""
        self.ready_at = 0.0

    async def ready(self, timeout_s: float) -> None:
        """Raises ConfigError when it does not take its flags, EngineUnavailableError when it ends, NeverReadyError."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not await self.client.healthy(timeout_s):
            if not self.process.running:
                if (reason := self.process.usage_error()) is not None:
                    raise ConfigError(reason, field="rollout.router.args")
                raise EngineUnavailableError(
                    self.process.last_words(f"ended with status {self.process.status}"), field="router"
                )
            if asyncio.get_running_loop().time() > deadline:
                raise NeverReadyError(self.process.last_words(f"not ready after {timeout_s:g} s"), field="router")
            await asyncio.sleep(_POLL_S)
        self.ready_at = asyncio.get_running_loop().time()

    async def close(self) -> None:
        await self.process.end(_TERM_GRACE_S)
        await self.client.close()


class RouterKeeper:
    """`wanted` says which engines are in rotation; set `changed` when it would say something else.

    `on_change` is called when `up`, `registered` or `announced` have changed, `on_missing` with the address of an
    engine that the router cannot find.
    """

    def __init__(
        self,
        command: RouterCommand,
        log_path: Path,
        wanted: Callable[[], Workers],
        *,
        start_timeout_s: float,
        on_change: Callable[[], object] = lambda: None,
        on_missing: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.changed = asyncio.Event()
        self.up = False
        """Whether the router answers and has had, in this life, every engine that is wanted, or had the time for it and
        has some.
        """
        self.registered: frozenset[str] = frozenset()
        """Addresses that the router sends requests to, as of the last look."""
        self._command = command
        self._log_path = log_path
        self._wanted = wanted
        self._start_timeout_s = start_timeout_s
        self._on_change = on_change
        self._on_missing = on_missing
        self._reported: tuple[bool, frozenset[str], frozenset[str]] = (False, frozenset(), frozenset())
        # A list read before something was taken out must not be reported after it.
        self._looking = asyncio.Lock()
        self._router: RouterProcess | None = None

    @property
    def client(self) -> RoutedClient:
        """Of the present life. Raises EngineUnavailableError while there is none."""
        if self._router is None:
            raise EngineUnavailableError("not running", field="router")
        return self._router.client

    @property
    def announced(self) -> frozenset[str]:
        """Addresses that the router was told of and not told to forget: it may have them, or have them soon."""
        return frozenset(self._router.announced) if self._router is not None else frozenset()

    @property
    def pid(self) -> int | None:
        return self._router.process.pid if self._router is not None else None

    async def run(self) -> None:
        """Until cancelled. Raises NeverReadyError when it cannot be started, ConfigError when it shows that no start
        can succeed.
        """
        await keep_alive("router", self._one_life)

    async def remove(self, url: str) -> None:
        """Takes an engine out; returns when no further request goes to it. `wanted` must not name it any more.

        An addition that is under way is waited for. A router that does not do so in time is killed: the streams
        through it break, and are resumed elsewhere.
        """
        router = self._router
        if router is None:
            return
        try:
            async with asyncio.timeout(_REMOVE_TIMEOUT_S):
                while not await self._gone(router, url):
                    await asyncio.sleep(_UNSETTLED_S / 4)
            if router is self._router:
                self._report(self.up, self.registered - {url})
        except (EngineUnavailableError, TimeoutError) as error:
            log.error("router_stuck", url=url, reason=str(error))
            router.process.kill()
        self.changed.set()

    async def _gone(self, router: RouterProcess, url: str) -> bool:
        """Whether the router neither has the engine nor will have it; asks for that, if it has it."""
        async with self._looking:
            worker_id = (await router.client.workers()).get(url)
            if worker_id is None:
                return url not in router.announced
            router.announced.pop(url, None)
            await router.client.remove_worker(worker_id)
            return False

    def drop_idle(self, seconds: float) -> None:
        """Ends the streams that have been silent for that long, as LOST."""
        if self._router is not None:
            self._router.client.drop_idle(seconds)

    async def _one_life(self) -> None:
        router = RouterProcess(self._command, self._log_path)
        try:
            await router.ready(self._start_timeout_s)
            log.info("router_ready", pid=router.process.pid)
            self._router = router
            try:
                await self._look_after(router)
                log.error("router_ended", status=router.process.status, log=str(self._log_path))
            finally:
                self._router = None
                self._report(False, frozenset())
        finally:
            await router.close()

    async def _look_after(self, router: RouterProcess) -> None:
        """Returns when the router has ended."""
        ended = asyncio.create_task(router.process.ended())
        failures = 0
        try:
            while not ended.done():
                self.changed.clear()
                try:
                    async with self._looking:
                        settled = await self._reconcile(router)
                    failures = 0
                except EngineUnavailableError as error:
                    log.warning("router_failed", reason=str(error))
                    settled, failures = True, failures + 1
                    if failures == _MAX_FAILURES:
                        router.process.kill()
                changed = asyncio.create_task(self.changed.wait())
                await asyncio.wait(
                    [ended, changed],
                    timeout=_SETTLED_S if settled else _UNSETTLED_S,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                changed.cancel()
        finally:
            ended.cancel()

    async def _reconcile(self, router: RouterProcess) -> bool:
        """One round. Returns whether the router's list is as wanted, with nothing under way."""
        listed = await router.client.workers()
        known = {url: key for url, (key, _) in router.announced.items()}
        right = {url for url, key in self._wanted().items() if url in listed and known.get(url) == key}
        for url in listed.keys() - right:
            router.announced.pop(url, None)
            await router.client.remove_worker(listed[url])
        for url in self._wanted().keys() - listed.keys():
            await self._announce(router, url)
        wanted = self._wanted()
        # What is not wanted any more may still come of an announcement.
        overdue = asyncio.get_running_loop().time() - _ANNOUNCED_S
        for url in router.announced.keys() - wanted.keys():
            if router.announced[url][1] < overdue:
                del router.announced[url]
        self._report(self.up or self._complete(router, right), frozenset(listed))
        return listed.keys() == right == wanted.keys() == router.announced.keys()

    def _complete(self, router: RouterProcess, right: Set[str]) -> bool:
        """Whether `right`, the engines that the router has as wanted, are all that can be waited for."""
        missing = self._wanted().keys() - right
        if not missing:
            return True
        if not right or asyncio.get_running_loop().time() < router.ready_at + _COMPLETE_S:
            return False
        log.warning("router_incomplete", missing=sorted(missing))
        for url in missing:
            self._on_missing(url)
        return True

    async def _announce(self, router: RouterProcess, url: str) -> None:
        """Tells the router of an engine, unless that is under way, or it has left the rotation meanwhile."""
        key, now = self._wanted().get(url), asyncio.get_running_loop().time()
        told, since = router.announced.get(url, (None, now))
        if key is not None and (key != told or now - since >= _ANNOUNCED_S):
            if key == told:
                self._on_missing(url)
            router.announced[url] = (key, now)
            await router.client.add_worker(url, key)

    def _report(self, up: bool, registered: frozenset[str]) -> None:
        self.up, self.registered = up, registered
        if self._reported != (reported := (up, registered, self.announced)):
            self._reported = reported
            self._on_change()
