"""The breaker's states, and a station that has filters beside a scorer elsewhere."""

from __future__ import annotations

import asyncio

import pytest

from services.common.config import Config
from services.reward.filters import GroupItem, ScoredItem
from services.reward.jobs import FailureKind, Job, Result
from services.reward.opening import running_station
from services.reward.remote.breaker import Breaker, State
from tests.kit.reward_items import KIT, item
from tests.kit.reward_servers import QUICK, http_server


@pytest.fixture
def breaker() -> Breaker:
    return Breaker(failures=3, reset_s=0.05, max_reset_s=0.1, on_change=lambda: None)


async def reaches(breaker: Breaker, state: State) -> float:
    """Seconds until then."""
    begun = asyncio.get_running_loop().time()
    async with asyncio.timeout(5):
        while breaker.state is not state:
            await asyncio.sleep(0.005)
    return asyncio.get_running_loop().time() - begun


async def test_it_opens_after_failures_in_a_row_only(breaker):
    for _ in range(5):
        breaker.bad("no")
        breaker.bad("no")
        assert breaker.on_the_brink
        breaker.good()
    assert (breaker.state, breaker.admits) == (State.CLOSED, True)
    for _ in range(3):
        breaker.bad("gone")
    assert (breaker.state, breaker.admits, breaker.reason) == (State.OPEN, False, "gone")


async def test_a_single_call_closes_it_or_opens_it_for_longer(breaker):
    for _ in range(3):
        breaker.bad("gone")
    assert await reaches(breaker, State.HALF_OPEN) >= 0.04
    for _ in range(3):
        breaker.begin()
        assert (breaker.state, breaker.admits, breaker.on_the_brink) == (State.PROBING, False, True)
        breaker.bad("still gone")
        assert breaker.state is State.OPEN
        assert await reaches(breaker, State.HALF_OPEN) >= 0.09
    breaker.begin()
    breaker.good()
    assert breaker.state is State.CLOSED
    for _ in range(3):
        breaker.bad("gone again")
    assert breaker.state is State.OPEN
    breaker.good()
    assert breaker.state is State.CLOSED, "an answer that was under way shows that it works"
    await asyncio.sleep(0.15)
    assert breaker.state is State.CLOSED


async def test_the_users_filters_run_here_whatever_the_server_does():
    def config(url: str) -> Config:
        return Config.model_validate(
            {
                "batch": {"dynamic_sampling_filter": "reward_functions:keeps_by_label"},
                "reward": {"scorer": "remote", "remote": {**QUICK, "urls": url}},
                "plugins": {"paths": [str(KIT)]},
            }
        )

    judged: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
    group = GroupItem("g1", [ScoredItem(item("spread"), reward, {}) for reward in (0.0, 1.0)])
    async with (
        http_server(lambda body: 1) as server,
        running_station(config(server.url)) as station,
    ):
        assert (station.judges, station.orders_partials, len(station.pids())) == (True, False, 1)
        [result] = await station.score([item("ok")])
        assert result.verdict == (1.0, {}, ())
        await server.stop()
        [result] = await station.score([item("ok")])
        assert result.failure is FailureKind.UNAVAILABLE
        station.submit([Job(group, judged.set_result)])
        assert (await judged).judgement == (True, "no_spread", False)
