"""A store that comes back without what it had acknowledged is found out: its file is replaced by an older one."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from services.buffer import convert
from services.buffer.records import IssuedPrompt, LedgerRecord
from services.buffer.redis_store import RedisStore
from services.buffer.witness import Witness
from services.cli import progress
from services.common.errors import UnavailableError
from tests.kit import valkey
from tests.kit.buffer_driver import Driver, outcomes, params, refs


@pytest.fixture
def server() -> Iterator[valkey.Valkey]:
    with valkey.running(appendfsync="everysec") as started:
        yield started


def forget(server: valkey.Valkey, older: Path) -> None:
    """Kills the server and starts it with a file that lacks what was written since."""
    server.kill()
    shutil.rmtree(server.directory / "appendonlydir")
    shutil.copytree(older, server.directory / "appendonlydir")
    server.start()


def keep_file(server: valkey.Valkey, to: Path) -> Path:
    """The append-only file as it is now; the server stands still meanwhile."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        shutil.copytree(server.directory / "appendonlydir", to)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    return to


async def look(store: RedisStore) -> LedgerRecord:
    """The ledger. A connection to the killed server fails once before it is made anew."""
    async with asyncio.timeout(10):
        while True:
            try:
                return await store.ledger(admit=True)
            except UnavailableError:
                await asyncio.sleep(0)


def opened(server: valkey.Valkey) -> RedisStore:
    return RedisStore(server.url, run_name="run")


async def test_lost_writes_are_counted_and_logged_once(server: valkey.Valkey, tmp_path: Path) -> None:
    store, other = opened(server), opened(server)
    for each in (store, other):
        await each.open(params())
    driver = Driver(store)
    await driver.start()
    older = keep_file(server, tmp_path / "older")
    for ordinal in range(3):
        await store.issue(ordinal, [IssuedPrompt(ordinal, b"p")])
    await other.ledger(admit=True)
    forget(server, older)
    with capture_logs() as logs:
        first = await look(store)
        ledgers = [await look(each) for each in (store, other)]
    errors = [line for line in logs if line["event"] == "lost_after_restart"]
    assert [line["writes"] for line in errors] == [3]
    assert first.accepted == 0
    assert [each.counters["lost_after_restart"] for each in ledgers] == [3, 3]
    assert progress.lost(convert.ledger(ledgers[0])) == (
        "the store came back without 3 acknowledged writes (lost_after_restart)"
    )
    await driver.start()
    assert (await store.ledger(admit=True)).counters["lost_after_restart"] == 3
    for each in (store, other):
        await each.close()


async def test_a_buffer_that_went_down_too_knows_from_its_file(server: valkey.Valkey, tmp_path: Path) -> None:
    store = opened(server)
    await store.open(params())
    older = keep_file(server, tmp_path / "older")
    await store.issue(0, [IssuedPrompt(0, b"p")])
    Witness(tmp_path / "position", store).save()
    await store.close()
    forget(server, older)
    store = opened(server)
    Witness(tmp_path / "position", store).recall()
    with capture_logs() as logs:
        await store.open(params())
    assert [line["log_level"] for line in logs if line["event"] == "lost_after_restart"] == ["error"]
    assert (await store.ledger(admit=True)).counters["lost_after_restart"] == 1
    Witness(tmp_path / "position", store).save()
    await store.close()
    again = opened(server)
    Witness(tmp_path / "position", again).recall()
    await again.open(params())
    assert (await again.ledger(admit=True)).counters["lost_after_restart"] == 1
    await again.close()


async def test_a_restart_that_loses_nothing_is_no_loss(server: valkey.Valkey) -> None:
    store = opened(server)
    await store.open(params())
    driver = Driver(store)
    await driver.start()
    await driver.fill()
    server.kill()
    server.start()
    assert "lost_after_restart" not in (await look(store)).counters
    assert await driver.counts() == {"READY": 8}
    await store.close()


async def test_a_run_that_was_wiped_is_a_loss(server: valkey.Valkey) -> None:
    store = opened(server)
    await store.open(params())
    await store.issue(0, [IssuedPrompt(0, b"p")])
    await store._scripts._redis.flushall()
    assert (await store.ledger(admit=True)).accepted == 0
    assert (await store.ledger(admit=True)).counters["lost_after_restart"] >= 1
    await store.close()


async def test_everysec_says_at_the_start_what_it_can_lose(server: valkey.Valkey) -> None:
    store = opened(server)
    with capture_logs() as logs:
        await store.open(params())
    (warning,) = [line for line in logs if line["event"] == "store_not_durable"]
    assert "a crash of the server or its machine loses up to two seconds of acknowledged work" in warning["why"]
    await store.close()


def test_a_position_file_without_a_number_is_passed_over(server: valkey.Valkey, tmp_path: Path) -> None:
    (tmp_path / "position").write_text("torn\n")
    store = opened(server)
    store.acknowledged = 5
    witness = Witness(tmp_path / "position", store)
    witness.recall()
    witness.save()
    assert (tmp_path / "position").read_text() == "5\n"


async def test_a_worker_of_a_store_that_was_emptied_finds_its_lease_lost(server: valkey.Valkey) -> None:
    store = RedisStore(server.url, run_name="emptied")
    try:
        await store.open(params(leases_from_clock=True))
        driver = Driver(store)
        await driver.start()
        late = driver.generated(await driver.generate_lease(2))
        await store._scripts._redis.flushall()
        await driver.start()
        # The same samples are leased again, for whatever prompts come now.
        now = await driver.generate_lease(2)
        assert [ref for ref, _ in refs(now)] == [each.ref for each in late]
        assert outcomes(await store.complete_generate(late)) == ["LEASE_LOST", "LEASE_LOST"]
        assert outcomes(await store.complete_generate(driver.generated(now))) == ["OK", "OK"]
    finally:
        await store.close()
