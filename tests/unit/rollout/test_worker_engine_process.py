"""The engine as a child: started, watched, started again, and never left behind."""

from __future__ import annotations

import asyncio
import os
import sys
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from polyhead.v1 import buffer_pb2 as pb
from services.common.config import Config, load
from services.common.errors import ConfigError
from services.common.versions import Version
from services.rollout.engines.engine import Engine
from services.rollout.engines.keeper import EngineKeeper
from services.rollout.engines.launch import Launch, engine_command, torch_engine_command
from services.rollout.engines.messages import EngineUnavailableError
from services.rollout.engines.process import EngineProcess
from services.rollout.engines.torch_engine.options import ADMIN_KEY_VARIABLE
from tests.kit.rollout_rig import until

ENGINE = """
import asyncio, sys
from aiohttp import web
port, key, hang = int(sys.argv[1]), sys.argv[2], len(sys.argv) > 3
async def answer(request):
    if hang and request.path == "/server_info" and answer.seen:
        await asyncio.sleep(60)
    answer.seen = answer.seen or request.path == "/server_info"
    return web.json_response({"kind": "stub", "version": "0", "context_length": 8})
answer.seen = False
app = web.Application()
app.router.add_get("/{path}", answer)
web.run_app(app, host="127.0.0.1", port=port, print=None)
"""


def test_the_in_house_engines_admin_key_is_in_its_environment_only():
    launch = torch_engine_command(load(None))(1234, "secret")
    assert launch.environment == {ADMIN_KEY_VARIABLE: "secret"}
    assert "secret" not in launch.command


def stub(*arguments: str):
    return lambda port, key: Launch([sys.executable, "-c", ENGINE, str(port), key, *arguments])


async def test_an_engine_that_ends_at_once_shows_its_last_words(tmp_path):
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    engine = EngineProcess(lambda port, key: Launch(command), tmp_path / "logs" / "engine-0.log")
    with pytest.raises(EngineUnavailableError, match=r"ended with status 3; .*engine-0.log ends: no such model"):
        await engine.ready(20)
    await engine.close()


async def test_a_flag_the_engine_does_not_know_is_named(tmp_path):
    script = "import argparse; argparse.ArgumentParser(prog='x').parse_args(['--no-such-flag'])"
    engine = EngineProcess(lambda port, key: Launch([sys.executable, "-c", script]), tmp_path / "engine-0.log")
    with pytest.raises(ConfigError, match=r"^rollout.engine.args: unrecognized arguments: --no-such-flag$"):
        await engine.ready(20)
    await engine.close()


async def test_an_engine_that_is_too_old_is_named(tmp_path):
    old = ENGINE.replace('"kind": "stub", "version": "0"', '"version": "0.5.9.post2"')
    engine = EngineProcess(lambda port, key: Launch([sys.executable, "-c", old, str(port), key]), tmp_path / "log")
    with pytest.raises(ConfigError, match=r"SGLang 0\.5\.9\.post2 is too old: 0\.5\.10 or newer is needed"):
        await engine.ready(20)
    await engine.close()


async def test_an_engine_that_never_becomes_ready_is_given_up(tmp_path):
    engine = EngineProcess(lambda port, key: Launch(["sleep", "60"]), tmp_path / "engine-0.log")
    with pytest.raises(EngineUnavailableError, match=r"not ready after 0\.1 s"):
        await engine.ready(0.1)
    await engine.close()
    assert not psutil.pid_exists(engine.pid)


def place(lost: list[int | None] | None = None) -> Engine:
    """An engine's place in no replica; `lost` gets the pid of each engine that ended."""
    return Engine(0, lambda: None, lambda engine: None if lost is None else lost.append(engine.pid))


async def test_a_first_start_that_fails_is_an_error(tmp_path):
    keeper = EngineKeeper(place(), lambda port, key: Launch(["false"]), tmp_path / "log", start_timeout_s=5)
    with pytest.raises(EngineUnavailableError, match="ended with status 1"):
        await keeper.run()


async def test_an_engine_that_cannot_be_started_is_an_error_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("services.rollout.engines.lives._BACKOFF_FIRST_S", 0.01)
    starts = []

    def command(port: int, key: str) -> Launch:
        starts.append(port)
        raise PermissionError(13, "Permission denied", "/scratch")

    keeper = EngineKeeper(place(), command, tmp_path / "log", start_timeout_s=5)
    with pytest.raises(EngineUnavailableError, match=r"engine 0: could not be started: .*Permission denied"):
        await keeper.run()
    assert len(starts) == 3


async def test_an_engine_that_is_being_updated_is_not_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("services.rollout.engines.keeper._PROBE_TIMEOUT_S", 0.3)
    engine = place()
    keeper = EngineKeeper(engine, stub("hang"), tmp_path / "log", start_timeout_s=20)
    task = asyncio.create_task(keeper.run())
    await until(lambda: engine.pid is not None)
    pid = engine.pid
    engine.life.begin_update(Version(1, 1))
    engine.suspect.set()
    await until(lambda: not engine.suspect.is_set())
    engine.life.abort_update(torn=False)
    engine.suspect.set()
    await until(lambda: not engine.suspect.is_set())
    engine.life.begin_update(Version(1, 1))  # while it is probed
    engine.suspect.set()
    await until(lambda: not engine.suspect.is_set())
    assert engine.pid == pid
    assert psutil.pid_exists(pid)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_an_engine_that_dies_is_started_again_and_joins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("services.rollout.engines.lives._BACKOFF_FIRST_S", 0.01)
    lost = []
    engine = place(lost)
    task = asyncio.create_task(EngineKeeper(engine, stub(), tmp_path / "log", start_timeout_s=20).run())
    await until(lambda: engine.life.state == pb.REPLICA_STATE_JOINING)
    first = engine.pid
    os.kill(first, 9)
    engine.suspect.set()  # whoever sees the stream break says so, before the kernel does
    await until(lambda: engine.life.state == pb.REPLICA_STATE_SUSPECT)
    assert (lost, engine.died) == ([first], True)
    with pytest.raises(EngineUnavailableError, match="not running"):
        _ = engine.client
    await until(lambda: engine.life.state == pb.REPLICA_STATE_JOINING)
    second = engine.pid
    assert second != first
    assert engine.kill()
    await until(lambda: lost == [first, second])
    assert not engine.died
    await until(lambda: engine.life.state == pb.REPLICA_STATE_JOINING)
    third = engine.pid
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not psutil.pid_exists(third)


async def test_a_suspect_engine_is_kept_if_it_answers_and_killed_if_not(tmp_path, monkeypatch):
    monkeypatch.setattr("services.rollout.engines.lives._BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr("services.rollout.engines.keeper._PROBE_TIMEOUT_S", 0.3)
    for arguments, survives in (((), True), (("hang",), False)):
        engine = place()
        keeper = EngineKeeper(engine, stub(*arguments), tmp_path / "log", start_timeout_s=20)
        task = asyncio.create_task(keeper.run())
        await until(lambda engine=engine: engine.pid is not None)
        pid = engine.pid
        engine.suspect.set()
        await until(lambda engine=engine: not engine.suspect.is_set())
        if survives:
            await engine.client.server_info()
            assert engine.pid == pid
        else:
            await until(lambda engine=engine, pid=pid: engine.pid not in (None, pid))
            assert not psutil.pid_exists(pid)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_the_command_line_carries_the_settings(base_config: Config):
    config = base_config.model_copy(deep=True)
    config.rollout.engine.context_length = 77
    config.rollout.sampling.stop = ["x"]
    command = list(engine_command(config)(123, "secret").command)
    assert command[:3] == [sys.executable, "-m", "services.rollout.engines.torch_engine"]
    options = dict(pairwise(command))
    assert Path(options["--model-path"]) == config.model.hf_checkpoint
    assert options["--port"] == "123"
    assert "secret" not in " ".join(command)
    assert options["--context-length"] == "77"
    assert options["--dtype"] == "float32"
    assert "--skip-tokenizer-init" not in command
    assert "--enable-deterministic-inference" not in command
    config.staleness.max_staleness, config.run.deterministic = 0, True
    assert "--enable-deterministic-inference" in engine_command(config)(1, "").command
