"""An engine that somebody else runs: attached while it answers and holds what it was given."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from polyhead.v1 import buffer_pb2 as pb
from services.common.config import load
from services.common.errors import ConfigError
from services.common.process import free_port
from services.common.versions import Version
from services.rollout.engines.engine import Engine
from services.rollout.engines.external import ExternalKeeper, external_addresses
from tests.kit.rollout_fake_engine import FakeEngine
from tests.kit.rollout_rig import until

V1 = Version(1, 1)


class Place:
    """An engine's place in no replica, its keeper, and the server that is to fill it."""

    def __init__(self, directory) -> None:
        self.port = free_port()
        self.lost: list[bool] = []
        self.engine = Engine(0, lambda: None, lambda engine: self.lost.append(engine.died))
        self.fake = FakeEngine()
        self.keeper = ExternalKeeper(self.engine, f"http://127.0.0.1:{self.port}", "key", directory)

    async def until_state(self, state: pb.ReplicaState) -> None:
        await until(lambda: self.engine.life.state == state)

    def serve(self) -> None:
        """As after a complete push."""
        self.engine.life.begin_update(V1)
        self.fake.version = str(V1)
        self.engine.life.commit_update()


@pytest.fixture
async def place(tmp_path, monkeypatch):
    monkeypatch.setattr("services.rollout.engines.external._POLL_S", 0.02)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 64}))
    made = Place(tmp_path)
    running = asyncio.create_task(made.keeper.run())
    yield made
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await made.fake.stop()


async def test_it_is_waited_for_attached_lost_and_attached_again(place):
    assert place.engine.life.state == pb.REPLICA_STATE_SUSPECT
    await place.fake.start(place.port)
    await place.until_state(pb.REPLICA_STATE_JOINING)
    assert (place.engine.info.name, place.engine.pid) == ("fake_engine/1", None)
    assert not place.engine.kill()
    place.serve()
    await place.fake.stop()
    place.engine.suspect.set()
    await place.until_state(pb.REPLICA_STATE_SUSPECT)
    assert place.lost == [True]
    place.fake = FakeEngine()
    await place.fake.start(place.port)
    await place.until_state(pb.REPLICA_STATE_JOINING)


async def test_one_that_lost_its_weights_joins_anew(place):
    """It was restarted between two looks."""
    await place.fake.start(place.port)
    await place.until_state(pb.REPLICA_STATE_JOINING)
    place.serve()
    place.fake.version = "default"
    await until(lambda: place.lost == [True])
    await place.until_state(pb.REPLICA_STATE_JOINING)


async def test_one_that_is_being_updated_is_left_alone(place):
    await place.fake.start(place.port)
    await place.until_state(pb.REPLICA_STATE_JOINING)
    place.serve()
    place.engine.life.begin_update(Version(1, 2))
    place.fake.version = "e1.s2"
    place.engine.suspect.set()
    await until(lambda: not place.engine.suspect.is_set())
    place.engine.life.commit_update()
    place.engine.suspect.set()
    await until(lambda: not place.engine.suspect.is_set())
    assert place.lost == []


async def test_what_an_earlier_replica_left_in_it_is_cleared(place):
    place.fake.paused = "in_place"
    await place.fake.start(place.port)
    await place.until_state(pb.REPLICA_STATE_JOINING)
    assert place.fake.names()[:2] == ["abort_request", "continue_generation"]
    assert place.fake.paused is None


async def test_one_with_another_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    place = Place(tmp_path)
    place.fake.info = {"model_type": "llama"}
    await place.fake.start(place.port)
    with pytest.raises(ConfigError, match=r"^rollout.engine.external: .* has model_type = llama, but .* has qwen3$"):
        await asyncio.wait_for(place.keeper.run(), 10)
    await place.fake.stop()


async def test_a_key_that_is_refused_is_said_with_the_place_it_is_from(tmp_path):
    async def refuse(request: web.Request) -> web.Response:
        return web.json_response({"error": "Unauthorized"}, status=401)

    place = Place(tmp_path)
    app = web.Application()
    app.router.add_route("*", "/{path}", refuse)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", place.port).start()
    with capture_logs() as logs:
        running = asyncio.create_task(place.keeper.run())
        await until(lambda: bool(logs))
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await runner.cleanup()
    reason = "the admin key was refused: HTTP 401 (it is taken from POLYHEAD_ROLLOUT__ENGINE__ADMIN_KEY)"
    assert logs[0]["reason"] == f"engine /server_info: {reason}"


def test_external_engines_are_shared_out():
    every = ["http://a:1", "http://b:1", "http://c:1"]
    config = load(None, {"rollout.engine.external": every, "rollout.replicas": 2})
    assert [external_addresses(config, replica) for replica in range(2)] == [
        ["http://a:1", "http://c:1"],
        ["http://b:1"],
    ]
    config = load(None, {"rollout.engine.external": every[:1], "rollout.replicas": 2})
    with pytest.raises(ConfigError, match=r"rollout\.engine\.external"):
        external_addresses(config, 1)
    assert external_addresses(load(None), 0) == []
