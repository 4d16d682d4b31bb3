"""What the parts of one replica share: its engines, the way to them, its gate, its figures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.versions import Version
from services.rollout.engines.engine import Engine
from services.rollout.engines.messages import Chunk, GenerateRequest
from services.rollout.engines.router import RouterKeeper
from services.rollout.fleet import Fence
from services.rollout.records import Arrival
from services.rollout.stats import Stats

# Versions whose arrival is remembered; no request runs across more pushes than this.
_REMEMBERED_ARRIVALS = 4096
# Of an engine that fell silent: what streams from the others shows itself within this time, or is asked for again.
_SILENT_S = 3.0
_FRESH = Arrival(sample_pb2.KV_ORIGIN_FRESH, late=False)
_ADVANCED = (
    pb.REPLICA_STATE_YIELDED,
    pb.REPLICA_STATE_SYNCING,
    pb.REPLICA_STATE_JOINING,
    pb.REPLICA_STATE_QUARANTINED,
    pb.REPLICA_STATE_SUSPECT,
)


class Replica:
    """Call `turned` after every change of an engine's life: it opens or shuts the gate and tells the heartbeat."""

    def __init__(self, replica_id: str, engines: int = 1) -> None:
        self.replica_id = replica_id
        self.stats = Stats()
        self.fence = Fence()
        self.engines = [Engine(index, self.turned, self._engine_lost) for index in range(engines)]
        self.router: RouterKeeper | None = None
        """In front of several engines."""
        self.leaving = False
        self.yielded_to = 0
        """The epoch of the trainer that has its GPUs; 0 while they are the engines'."""
        self.deaths = 0
        """Engines that ended by themselves."""
        self.floor: Version | None = None
        """The newest version that samples were leased for: they get no tokens of older weights."""
        self.unstarted = 0
        """Requests that were sent and have neither a token yet nor an end."""
        self.gate = asyncio.Event()
        """Set while requests may go to the engines, and when nobody should wait for that any more."""
        self.changed = asyncio.Event()
        """Set at each change of state; whoever reports it clears it."""
        self.listeners: list[Callable[[], None]] = []
        """Called at each turn."""
        self.on_lost: list[Callable[[Engine], object]] = []
        """Called when an engine has ended, before it stops being what it was."""
        self._dead = False
        self._arrivals: dict[Version, Arrival] = {}
        self._reported: list[pb.ReplicaState] = []

    @property
    def letting_go(self) -> bool:
        """Whether it finishes nothing of what it holds: it leaves, or the trainer needs its GPUs."""
        return self.leaving or bool(self.yielded_to)

    @property
    def trouble(self) -> str:
        """Why it cannot serve, where its state alone does not say."""
        epoch = self.yielded_to
        return f"yielded to epoch {epoch}: waits for that trainer, or a later one, to resume it" if epoch else ""

    @property
    def state(self) -> pb.ReplicaState:
        if self.leaving:
            return pb.REPLICA_STATE_DEAD if self._dead else pb.REPLICA_STATE_DRAINING
        if self.yielded_to:
            return pb.REPLICA_STATE_YIELDED
        if any(self.in_rotation(engine) for engine in self.engines):
            return pb.REPLICA_STATE_SERVING
        states = {engine.life.state for engine in self.engines}
        if pb.REPLICA_STATE_SERVING in states:
            return pb.REPLICA_STATE_SYNCING  # the router does not have it yet
        return next(state for state in _ADVANCED if state in states)

    @property
    def version(self) -> Version | None:
        """The oldest version in rotation: what samples are leased for, and what a request counts as sent under, so that
        none counts as sent under a newer one than its engine had. None when no engine is in rotation.
        """
        return min(self._versions_in_rotation(), default=None)

    @property
    def newest(self) -> Version | None:
        """The newest version in rotation."""
        return max(self._versions_in_rotation(), default=None)

    @property
    def oldest(self) -> Version | None:
        """Of all engines, in rotation or not: no token that comes now is of an older version."""
        return min((engine.life.version for engine in self.engines if engine.life.version is not None), default=None)

    @property
    def salt(self) -> str:
        """Sets the prefix cache of a new request apart, so that no KV is shared across versions, whichever engine it
        goes to.
        """
        return ",".join(str(engine.life.version or "-") for engine in self.engines)

    @property
    def may_generate(self) -> bool:
        """Whether every engine that a request sent now can reach may generate, and there is one."""
        reachable = [engine for engine in self.engines if self._reachable(engine)]
        return (
            not self.letting_go
            and (self.router is None or (self.router.up and not self._outgoing(self.router)))
            and any(self.in_rotation(engine) for engine in reachable)
            and all(engine.life.may_generate for engine in reachable)
        )

    def in_rotation(self, engine: Engine) -> bool:
        """Whether it gets new requests, now or after the update that runs."""
        return self.serves(engine) and not engine.lagging and self._reachable(engine)

    def serves(self, engine: Engine) -> bool:
        """Whether it holds a whole version that is not too old for what was leased."""
        version = engine.life.version
        return engine.serving and version is not None and (self.floor is None or version >= self.floor)

    def leased(self, version: Version) -> None:
        """Samples were leased for `version`: engines with older weights wait for a push, out of rotation."""
        if self.floor is None or version > self.floor:
            self.floor = version
            self.turned()

    def wanted(self) -> Mapping[str, str]:
        """The router's workers to be: address → API key."""
        return {
            engine.client.url: engine.client.admin_key
            for engine in self.engines
            if engine.attached and self.serves(engine) and not engine.lagging and not self.letting_go
        }

    def serving_without(self, engine: Engine) -> bool:
        """Whether requests can go on when `engine` is taken out."""
        return any(self.serves(other) for other in self.engines if other is not engine)

    def suspect(self, url: str) -> None:
        """The router cannot reach the engine at `url`."""
        for engine in self.engines:
            if engine.attached and engine.client.url == url:
                engine.suspect.set()

    def generate(self, batch: Sequence[GenerateRequest], salt: str) -> AsyncGenerator[tuple[int, Chunk], None]:
        """As the engine's client does, or the router's. Raises EngineUnavailableError when there is none."""
        route = self.engines[0].client if self.router is None else self.router.client
        return route.generate(batch, salt)

    async def abort(self, rid: str) -> None:
        """Ends one request, wherever it runs. Raises the error of an engine that does not answer, after the others."""
        await _all(engine.client.abort(rid) for engine in self.engines if engine.attached)

    async def abort_all(self, timeout_s: float) -> None:
        """As `abort`, for everything that runs."""
        await _all(engine.client.abort_all(timeout_s) for engine in self.engines if engine.attached)

    async def expel(self, engine: Engine) -> None:
        """Returns when no new request goes to `engine`, which is not serving any more."""
        if self.router is not None and engine.attached:
            await self.router.remove(engine.client.url)

    def pause(self, engine: Engine, *, paused: bool) -> None:
        """Time is idle while every engine is paused."""
        engine.paused = paused
        self.stats.busy.paused(all(other.paused for other in self.engines if other.attached))

    def drain(self) -> None:
        """For good. Running requests may still send tokens of what is served."""
        self.leaving = True
        self.turned()

    def end(self) -> None:
        self.leaving = self._dead = True
        self.turned()

    def turned(self) -> None:
        if self.may_generate or self.letting_go:
            self.gate.set()
        else:
            self.gate.clear()
        states = [self.state, *(engine.life.state for engine in self.engines)]
        if states != self._reported:
            self._reported = states
            self.changed.set()
        if self.router is not None:
            self.router.changed.set()
        for listener in self.listeners:
            listener()

    def remember_arrival(self, version: Version, arrival: Arrival) -> None:
        """How requests that were running when `version` arrived came over. What is true of one engine holds for all."""
        known = self._arrivals.get(version, _FRESH)
        carried = sample_pb2.KV_ORIGIN_CARRIED in (known.kv, arrival.kv)
        self._arrivals[version] = Arrival(
            sample_pb2.KV_ORIGIN_CARRIED if carried else sample_pb2.KV_ORIGIN_FRESH, known.late or arrival.late
        )
        if len(self._arrivals) > _REMEMBERED_ARRIVALS:
            del self._arrivals[next(iter(self._arrivals))]

    def arrival_of(self, version: Version) -> Arrival:
        return self._arrivals.get(version, _FRESH)

    def _engine_lost(self, engine: Engine) -> None:
        self.deaths += engine.died
        for forget in self.on_lost:
            forget(engine)
        if not any(other.attached for other in self.engines if other is not engine):
            self.floor = None  # nothing is held any more
        if self.router is not None and engine.pid is None and not engine.died:
            # Its host may have gone without a word: connections to it do not break by themselves.
            asyncio.get_running_loop().call_later(_SILENT_S, self.router.drop_idle, _SILENT_S)

    def _reachable(self, engine: Engine) -> bool:
        """Whether the router may pick it; without one, requests have nowhere else to go."""
        return self.router is None or (engine.attached and engine.client.url in self.router.registered)

    def _outgoing(self, router: RouterKeeper) -> bool:
        """Whether the router may still pick an engine that is to get no requests."""
        wanted = self.wanted().keys()
        unwanted = {engine.client.url for engine in self.engines if engine.attached} - wanted
        return bool(router.registered - wanted or router.announced & unwanted)

    def _versions_in_rotation(self) -> list[Version]:
        return [engine.life.version for engine in self.engines if self.in_rotation(engine) and engine.life.version]


async def _all(calls: Iterable[Awaitable[None]]) -> None:
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
