"""The real router in front of two engines: who is registered, what a broken stream costs, and how it comes back."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import pytest

from services.common.config import load
from services.common.errors import ConfigError
from services.common.process import free_port
from services.rollout.engines.launch import Launch
from services.rollout.engines.messages import EngineUnavailableError, Finish, GenerateRequest
from services.rollout.engines.router import RouterKeeper
from services.rollout.engines.router_launch import router_command
from tests.kit.rollout_fake_engine import FakeEngine, token_at
from tests.kit.rollout_rig import until

ROUND_ROBIN = {"rollout.router.policy": "round_robin"}


class Routed:
    """A router, the engines it may use, and how often it told of a change."""

    def __init__(self, directory: Path) -> None:
        self.engines = [FakeEngine(), FakeEngine()]
        self.wanted: dict[str, str] = {}
        self.changes = 0
        self.missing: list[str] = []
        self.keeper = RouterKeeper(
            router_command(load(None, ROUND_ROBIN)),
            directory / "router.log",
            lambda: self.wanted,
            start_timeout_s=30.0,
            on_change=self._count,
            on_missing=self.missing.append,
        )

    def _count(self) -> None:
        self.changes += 1

    def want(self, *engines: FakeEngine, key: str = "engine-key") -> None:
        self.wanted = {engine.url: key for engine in engines}
        self.keeper.changed.set()

    async def registered(self, *engines: FakeEngine) -> None:
        await until(lambda: self.keeper.registered == {engine.url for engine in engines}, 20.0)

    async def gather(self, requests: list[GenerateRequest]) -> tuple[dict[int, list[int]], dict[int, Finish]]:
        tokens: dict[int, list[int]] = {index: [] for index in range(len(requests))}
        finished: dict[int, Finish] = {}
        async with aclosing(self.keeper.client.generate(requests, "e1.s1")) as stream:
            async for index, chunk in stream:
                tokens[index] += chunk.token_ids
                assert chunk.total == len(tokens[index])
                if chunk.finish:
                    finished[index] = chunk.finish
        return tokens, finished


@pytest.fixture
async def routed(tmp_path):
    made = Routed(tmp_path)
    async with AsyncExitStack() as stack:
        for engine in made.engines:
            await engine.start()
            stack.push_async_callback(engine.stop)
        running = asyncio.create_task(made.keeper.run())
        try:
            await until(lambda: made.keeper.up or running.done(), 30.0)
            yield made
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


def requests(count: int, **changes) -> list[GenerateRequest]:
    fields = {
        "input_ids": [5, 6],
        "max_new_tokens": 6,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "stop": [],
        "stop_token_ids": [],
        "sampling_seed": 9,
    }
    return [GenerateRequest(rid=f"r{number}", **(fields | changes)) for number in range(count)]


async def test_samples_of_one_group_are_spread_and_come_back_by_index(routed):
    routed.want(*routed.engines)
    await routed.registered(*routed.engines)
    tokens, finished = await routed.gather(requests(8))
    assert tokens == {index: [token_at(9, 2 + at) for at in range(6)] for index in range(8)}
    assert set(finished.values()) == {Finish.LENGTH}
    for engine in routed.engines:
        assert len(engine.requests) == 4
        assert set(engine.keys) == {"Bearer engine-key"}, "the engine's own key, not the router's"
        assert engine.requests[0]["extra_key"] == "e1.s1"


async def test_an_engine_that_breaks_off_loses_its_own_streams_only(routed):
    first, second = routed.engines
    routed.want(first, second)
    await routed.registered(first, second)
    first.limit_tokens = 2
    second.go.clear()
    tokens: dict[int, int] = dict.fromkeys(range(4), 0)
    finished: dict[int, Finish] = {}
    async with aclosing(routed.keeper.client.generate(requests(4), "")) as stream:
        async for index, chunk in stream:
            tokens[index] += len(chunk.token_ids)
            if chunk.finish:
                finished[index] = chunk.finish
            elif sum(tokens.values()) == 4:
                first.cut()
            if len(finished) == 2:
                second.go.set()
    assert sorted(finished.values(), key=str) == [Finish.LENGTH] * 2 + [Finish.LOST] * 2
    assert all(tokens[index] == (2 if finish is Finish.LOST else 6) for index, finish in finished.items())


async def test_a_refused_request_is_an_error_of_its_own(routed):
    routed.engines[0].refuse_containing = 7
    routed.want(routed.engines[0])
    await routed.registered(routed.engines[0])
    _, finished = await routed.gather([*requests(1), *requests(1, input_ids=[7])])
    assert finished == {0: Finish.LENGTH, 1: Finish.ERROR}


@pytest.mark.parametrize("status", [500, 503])
async def test_an_engine_that_fails_loses_the_request_and_gets_the_next_one(routed, status):
    (engine, _) = routed.engines
    routed.want(engine)
    await routed.registered(engine)
    engine.fail_generate = status
    for _ in range(3):
        assert set((await routed.gather(requests(8)))[1].values()) == {Finish.LOST}
    engine.fail_generate = None
    assert set((await routed.gather(requests(8)))[1].values()) == {Finish.LENGTH}, "no circuit has opened"


async def test_a_defect_is_raised_and_waits_for_nothing(routed):
    (engine, _) = routed.engines
    routed.want(engine)
    await routed.registered(engine)
    engine.limit_tokens = 0
    with pytest.raises(TypeError, match="not JSON serializable"):
        await routed.gather([*requests(2), *requests(1, temperature=object())])


async def test_without_engines_everything_is_lost_at_once(routed):
    assert routed.keeper.up
    _, finished = await routed.gather(requests(2))
    assert set(finished.values()) == {Finish.LOST}


async def test_closing_the_stream_ends_it_at_the_engine(routed):
    (engine, _) = routed.engines
    engine.limit_tokens = 2
    routed.want(engine)
    await routed.registered(engine)
    async with aclosing(routed.keeper.client.generate(requests(3, max_new_tokens=1_000_000), "")) as stream:
        await anext(stream)
        await until(lambda: len(engine.running) == 3)
    engine.limit_tokens = None
    await until(lambda: not engine.running)


async def test_a_removed_engine_gets_nothing_more_and_its_streams_go_on(routed):
    first, second = routed.engines
    routed.want(first, second)
    await routed.registered(first, second)
    first.go.clear()
    running = asyncio.create_task(routed.gather(requests(2)))
    await until(lambda: len(first.running) == 1)
    routed.wanted = {second.url: "engine-key"}
    await routed.keeper.remove(first.url)
    assert routed.keeper.registered == {second.url}
    sent = len(first.requests)
    assert set((await routed.gather(requests(6)))[1].values()) == {Finish.LENGTH}
    assert len(first.requests) == sent
    first.go.set()
    assert set((await running)[1].values()) == {Finish.LENGTH}


async def test_an_engine_is_registered_until_the_router_has_let_it_go(routed):
    first, second = routed.engines
    routed.want(first, second)
    await routed.registered(first, second)
    client, looks, let_go = routed.keeper.client, [], asyncio.Event()
    before, look = await client.workers(), client.workers

    async def workers() -> Mapping[str, str]:
        looks.append(1)
        return await look() if let_go.is_set() else before

    client.workers = workers
    routed.want(second)
    await until(lambda: len(looks) > 2)
    assert routed.keeper.registered == {first.url, second.url}
    let_go.set()
    await routed.registered(second)


async def test_a_removal_waits_for_the_addition_that_is_under_way(routed):
    (engine, other) = routed.engines
    routed.want(other)
    await routed.registered(other)
    routed.want(engine, other)
    await until(lambda: engine.url in routed.keeper.announced)
    routed.wanted = {other.url: "engine-key"}
    await routed.keeper.remove(engine.url)
    assert engine.url not in routed.keeper.announced
    assert await routed.keeper.client.workers() == {other.url: (await routed.keeper.client.workers())[other.url]}


async def test_a_router_is_up_without_an_engine_that_it_cannot_find(routed, monkeypatch):
    monkeypatch.setattr("services.rollout.engines.router._COMPLETE_S", 0.2)
    (engine, _) = routed.engines
    gone = f"http://127.0.0.1:{free_port()}"
    routed.wanted = {gone: "k", engine.url: "k"}
    pid = routed.keeper.pid
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not routed.keeper.up)
    await until(lambda: routed.keeper.up, 20.0)
    assert routed.keeper.registered == {engine.url}
    assert routed.missing == [gone]


async def test_streams_that_are_silent_are_lost_when_told_so_and_others_go_on(routed):
    first, second = routed.engines
    routed.want(first, second)
    await routed.registered(first, second)
    first.limit_tokens = 2
    finished: list[Finish] = []
    async with aclosing(routed.keeper.client.generate(requests(2), "")) as stream:
        async for _, chunk in stream:
            if chunk.finish is Finish.LENGTH:
                routed.keeper.drop_idle(3600.0)
                assert len(first.running) == 1
                routed.keeper.drop_idle(0.0)
                routed.keeper.drop_idle(0.0)
            finished += [chunk.finish] if chunk.finish else []
    assert finished == [Finish.LENGTH, Finish.LOST]


async def test_an_engine_with_a_new_key_is_registered_anew(routed):
    (engine, _) = routed.engines
    routed.want(engine)
    await routed.registered(engine)
    routed.want(engine, key="another")
    await until(lambda: not routed.keeper.registered)
    await routed.registered(engine)
    await routed.gather(requests(1))
    assert engine.keys[-1] == "Bearer another"


async def test_an_engine_that_is_not_there_holds_up_nobody_else(routed):
    (engine, _) = routed.engines
    routed.wanted = {f"http://127.0.0.1:{free_port()}": "k", engine.url: "k"}
    routed.keeper.changed.set()
    await routed.registered(engine)
    routed.want(engine)
    assert set((await routed.gather(requests(2)))[1].values()) == {Finish.LENGTH}


async def test_a_router_that_dies_comes_back_with_its_engines(routed):
    (engine, _) = routed.engines
    routed.want(engine)
    await routed.registered(engine)
    engine.limit_tokens = 2
    stream = routed.keeper.client.generate(requests(2), "")
    before, changes = routed.keeper.pid, routed.changes
    async with aclosing(stream):
        await anext(stream)
        os.kill(before, signal.SIGKILL)
        finished = [chunk.finish async for _, chunk in stream if chunk.finish]
    assert finished == [Finish.LOST] * 2
    await until(lambda: routed.changes > changes)
    engine.limit_tokens = None
    await until(lambda: routed.keeper.up and routed.keeper.pid not in (before, None), 20.0)
    await routed.registered(engine)
    assert set((await routed.gather(requests(2)))[1].values()) == {Finish.LENGTH}


async def test_a_flag_the_router_does_not_know_ends_the_run_with_its_own_words(tmp_path):
    command = router_command(load(None, {"rollout.engines": 2, "rollout.router.args": {"no-such-flag": 1}}))
    keeper = RouterKeeper(command, tmp_path / "log", dict, start_timeout_s=30.0)
    with pytest.raises(ConfigError, match=r"rollout\.router\.args: unrecognized arguments: --no-such-flag 1"):
        await keeper.run()


async def test_a_router_that_does_not_start_says_how_its_log_ends(tmp_path):
    def command(port: int, metrics_port: int, key: str) -> Launch:
        return Launch(["sh", "-c", "echo no room; exit 7"])

    keeper = RouterKeeper(command, tmp_path / "log", dict, start_timeout_s=30.0)
    with pytest.raises(EngineUnavailableError, match=r"router: ended with status 7; .* ends: no room"):
        await keeper.run()
    with pytest.raises(EngineUnavailableError, match="not running"):
        _ = keeper.client


async def test_a_router_that_never_answers_ends_the_run(tmp_path):
    def command(port: int, metrics_port: int, key: str) -> Launch:
        return Launch(["sleep", "600"])

    keeper = RouterKeeper(command, tmp_path / "log", dict, start_timeout_s=0.1)
    with pytest.raises(EngineUnavailableError, match=r"router: not ready after 0\.1 s") as caught:
        await keeper.run()
    assert caught.value.exit_code == 2, "the launcher does not start it again for ever"


def test_keys_are_not_among_the_arguments():
    launch = router_command(load(None))(1, 2, "the-key")
    assert "the-key" not in " ".join(launch.command)
    assert "the-key" in " ".join(launch.environment.values())
