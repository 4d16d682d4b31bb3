"""The buffer behind a network that fails: between it and its clients, and between it and its store (a real Valkey).

A little system goes round and round through fault proxies; what its clients were acknowledged is the judge.
"""

from __future__ import annotations

import asyncio
import gc
import resource
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from polyhead.v1 import buffer_pb2 as pb
from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.common.errors import UnavailableError
from services.common.versions import Version
from tests.kit import valkey
from tests.kit.buffer_face import GENERATE, SCORE, TRAIN, completed, scored, service_config, serving
from tests.kit.faults.links import FAULTS
from tests.kit.faults.proxy import Proxy

# Shorter than any cut.
LEASE_S = 1.0
# Steps before the fault and after it.
STEPS = 3
# A connection on which nothing arrives any more is given up within 30 s: then a call gets through.
PATIENCE_S = 45.0


@pytest.fixture(name="config")
def _config(tmp_path: Path) -> Config:
    return service_config(tmp_path)


@dataclass
class System:
    """One client of each role; each says what it was acknowledged."""

    roles: list[BufferClient]
    step: int = 0
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    fresh: Counter[str] = field(default_factory=Counter)
    """How often each sample was completed, by stage and id."""
    trained: list[str] = field(default_factory=list)

    async def start(self) -> None:
        trainer = self.roles[2]
        await trainer.recover((await trainer.acquire_epoch("t")).epoch, 0)
        await trainer.publish_version(Version(1, 0))

    async def generate(self) -> None:
        lease = await self.roles[0].lease(
            GENERATE, "r", max_samples=4, weight_version=Version(1, self.step), wait_s=0.5
        )
        await self._complete(0, GENERATE, completed(lease, Version(1, self.step)))

    async def score(self) -> None:
        await self._complete(1, SCORE, scored(await self.roles[1].lease(SCORE, "s", max_samples=4, wait_s=0.5)))

    async def train(self) -> None:
        trainer = self.roles[2]
        batch = await trainer.lease(TRAIN, "t", epoch=1, step=self.step + 1, wait_s=0.5)
        if not batch.groups:
            return
        await trainer.commit_step(1, self.step + 1, batch.batch_lease_id)
        self.trained += [sample.sample_id for group in batch.groups for sample in group.samples]
        await trainer.publish_version(Version(1, self.step + 1))
        self.step += 1
        self.moved.set()

    async def _complete(self, role: int, stage: int, rows: list[pb.CompletedSample]) -> None:
        if rows:
            results = (await self.roles[role].complete(stage, "x", rows)).results
            done = [row for row, result in zip(rows, results, strict=True) if result.outcome == pb.OUTCOME_OK]
            self.fresh.update(f"{stage} {row.sample_id}" for row in done)

    async def until(self, step: int) -> None:
        while self.step < step:
            self.moved.clear()
            await self.moved.wait()


async def keep(act: Callable[[], Awaitable[None]]) -> None:
    while True:
        await act()
        await asyncio.sleep(0.05)


@asynccontextmanager
async def proxied(upstream: str) -> AsyncIterator[Proxy]:
    proxy = await Proxy(lambda: upstream).start()
    try:
        yield proxy
    finally:
        await proxy.close()


async def strike(server: valkey.Valkey, base: Config, between: str, fault: str) -> None:
    config = base.model_copy(deep=True)
    config.run.name = f"{between}-{fault}"
    async with (
        proxied(str(server.socket_path)) as to_store,
        serving(f"redis://127.0.0.1:{to_store.port}", config) as address,
        proxied(address) as to_buffer,
        BufferClient(f"127.0.0.1:{to_buffer.port}", retry_for_s=PATIENCE_S) as rollout,
        BufferClient(f"127.0.0.1:{to_buffer.port}", retry_for_s=PATIENCE_S) as reward,
        BufferClient(f"127.0.0.1:{to_buffer.port}", retry_for_s=PATIENCE_S) as trainer,
        asyncio.TaskGroup() as tasks,
    ):
        system = System([rollout, reward, trainer])
        await system.start()
        working = [tasks.create_task(keep(act)) for act in (system.generate, system.score, system.train)]
        await system.until(STEPS)
        seconds, act = FAULTS[fault]
        proxy = to_store if between == "store" else to_buffer
        act(proxy)
        await asyncio.sleep(seconds)
        proxy.heal()
        await system.until(system.step + STEPS)
        for task in working:
            task.cancel()
        await asyncio.wait(working)
        ledger = await trainer.get_ledger()
    where = f"{fault} between the buffer and its {between}"
    assert not ledger.imbalance, where
    assert max(system.fresh.values()) == 1, where
    assert len(set(system.trained)) == len(system.trained) == 4 * system.step, where


@pytest.mark.timeout(120)
async def test_nothing_is_lost_or_doubled_whatever_the_network_does(config: Config, tmp_path: Path) -> None:
    """Rows 20 to 24 of the crash matrix. All at once: most of the time is waiting."""
    config.buffer.lease_ttl_s = LEASE_S
    unheard: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(str(context)))
    faults = [fault for fault in FAULTS if fault != "cut-long"]
    with valkey.running(appendfsync="always") as server:
        async with asyncio.TaskGroup() as tasks:
            for between in ("clients", "store"):
                for fault in faults:
                    tasks.create_task(strike(server, config, between, fault))
    gc.collect()
    await asyncio.sleep(0)
    assert not unheard


async def test_a_call_through_a_dead_network_ends_with_its_deadline(config: Config) -> None:
    """Nobody hangs up: an answer that never comes is an error that says so, and leaves no task behind."""
    with valkey.running() as server:
        async with (
            serving(server.url, config) as address,
            proxied(address) as proxy,
            BufferClient(f"127.0.0.1:{proxy.port}", retry_for_s=0.1) as client,
        ):
            await client.get_ledger()
            before = len(asyncio.all_tasks())
            proxy.lose()
            with pytest.raises(UnavailableError, match="Lease failed: DEADLINE_EXCEEDED"):
                await client._call("Lease", pb.LeaseRequest(stage=SCORE, replica_id="s"), timeout_s=0.3)
            assert len(asyncio.all_tasks()) == before


async def test_calls_go_on_while_one_of_several_buffers_is_up(config: Config) -> None:
    with valkey.running() as server:
        async with (
            serving(server.url, config) as one,
            serving(server.url, config) as two,
            proxied(one) as first,
            proxied(two) as second,
            BufferClient(f"127.0.0.1:{first.port},127.0.0.1:{second.port}") as client,
        ):
            for proxy in (first, second, first):
                await proxy.close()
                for _ in range(4):
                    await client.get_ledger()
                await proxy.start(proxy.port)


async def test_a_store_without_room_on_its_disk_keeps_what_it_acknowledged(
    config: Config,
) -> None:
    """With `appendfsync always` the server ends in the middle of a command; calls wait until it is there again."""
    with valkey.running(appendfsync="always") as server:
        async with serving(server.url, config) as address, BufferClient(address) as client:
            system = System([client] * 3)
            await system.start()
            acts = (system.generate, system.score, system.train)
            async with asyncio.TaskGroup() as tasks:
                working = [tasks.create_task(keep(act)) for act in acts]
                await system.until(STEPS)
                resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
                while server.runs():
                    await asyncio.sleep(0.05)
                server.start()
                await system.until(system.step + STEPS)
                for task in working:
                    task.cancel()
            assert not (await client.get_ledger()).imbalance
            assert max(system.fresh.values()) == 1
