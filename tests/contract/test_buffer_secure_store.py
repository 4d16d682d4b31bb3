"""A store behind TLS, under the user that docs/buffer.md says is enough."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from polyhead.v1 import buffer_pb2 as pb
from services.buffer.durability import Durability
from services.buffer.redis_scripts import _PARTS
from services.buffer.redis_store import RedisStore
from services.common.config import load
from services.common.errors import ConfigError
from tests.contract.conftest import SERVERS
from tests.contract.test_buffer_operator import imported
from tests.kit import tls_proxy, valkey
from tests.kit.buffer_driver import Driver, params, released

PAGE = Path(__file__).parents[2] / "docs" / "buffer.md"
PASSWORD = "throw-away"


@pytest.fixture(params=list(SERVERS))
def place(request: pytest.FixtureRequest) -> valkey.Valkey:
    started: valkey.Valkey = request.getfixturevalue(SERVERS[request.param])
    return started


@pytest.fixture
async def url(place: valkey.Valkey, tmp_path: Path) -> AsyncIterator[str]:
    certificate, key = tls_proxy.make_certificate(tmp_path)
    async with tls_proxy.serving(place.socket_path, certificate, key) as port:
        yield f"rediss://polyhead@localhost:{port}/0?ssl_ca_certs={certificate}"


@pytest.fixture
async def admin(place: valkey.Valkey) -> AsyncIterator[Redis]:
    (line,) = re.findall(r"^ACL SETUSER .*$", PAGE.read_text().replace("\\\n", " "), re.MULTILINE)
    client = Redis.from_url(place.url)
    if (await client.info("server"))["redis_version"].startswith("7.0."):
        line = line.replace("+client|setinfo", "")  # as the page says
    await client.execute_command(*line.replace("PASSWORD", PASSWORD).replace("RUN", "secure").split())
    yield client
    await client.aclose()


async def use_everything(store: RedisStore) -> set[str]:
    """Every script once at least. Returns the names of those that were run."""
    driver = Driver(store)
    await store.open(params(group_size=3, min_group_size=2, drop_zero_variance=True))
    await driver.start()
    await store.submit("s", [b"submitted"])
    dead = await driver.generate_lease(1)
    await store.release(1, released(dead, pb.RELEASE_REASON_FATAL, error="x"))
    page = await store.list_samples(11, 0, 10)
    await store.requeue([each.ref for each in page.samples])
    await store.fetch([each.ref for each in page.samples], prompts=True)
    await store.import_groups("i", [imported(driver, 0.0, 1.0, 0.5)])
    await driver.step(1)
    await store.watermark(driver.epoch, 1)
    await store.confirm_checkpoint(driver.epoch, 1)
    await store.register_replica("r", b"replica", 1000)
    await store.list_replicas()
    await store.referenced_blobs(["a"])
    await driver.counts()
    await store.used_memory()
    await driver.start(1)
    return set(store._scripts._digests)


async def test_tls_and_a_small_user_are_enough(admin: Redis, url: str) -> None:
    store = RedisStore(load(None, {"store.url": url}).store.url, password=PASSWORD, run_name="secure")
    used = await use_everything(store)
    assert _PARTS.keys() - used == {"extend", "heartbeat", "lost", "partials", "prefer"}
    assert await store._scripts.durability() == Durability(256 << 20, "noeviction", True, "everysec")
    await store.close()
    other = RedisStore(url, password=PASSWORD, run_name="other")
    with pytest.raises(ConfigError, match="refused: "):
        await other.open(params())
    await other.close()


def test_the_documented_user_has_each_command_of_the_scripts_and_no_other() -> None:
    (line,) = re.findall(r"^ACL SETUSER .*$", PAGE.read_text().replace("\\\n", " "), re.MULTILINE)
    allowed = {word[1:] for word in line.split() if word.startswith("+")}
    scripts = Path(__file__).parents[2] / "services" / "buffer" / "scripts"
    called = {name.lower() for each in scripts.glob("*.lua") for name in re.findall(r"call\('(\w+)'", each.read_text())}
    ours = {"evalsha", "script|load", "info", "config|get", "client|setinfo"}
    assert allowed == called | ours


async def test_a_wrong_password_and_an_unknown_certificate_are_refused_at_once(
    admin: Redis, url: str, tmp_path: Path
) -> None:
    other, _ = tls_proxy.make_certificate(tmp_path / "other")
    for where, password, words in [
        (url, "wrong", "refused: "),
        (f"{url.partition('?')[0]}?ssl_ca_certs={other}", PASSWORD, "its certificate is not trusted"),
        (url.replace("localhost", "127.0.0.1"), PASSWORD, "its certificate is not trusted"),
    ]:
        store = RedisStore(where, password=password, run_name="secure")
        with pytest.raises(ConfigError, match=words) as refused:
            await store.open(params())
        assert PASSWORD not in str(refused.value)
        await store.close()
