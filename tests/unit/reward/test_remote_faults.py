"""Servers that fail in every way: who is blamed, what waits, what goes on, and how it ends."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from polyhead.v1 import reward_pb2
from services.common.process import free_port
from services.reward.jobs import FailureKind, Result
from services.reward.remote.station import RemoteStation
from tests.kit.reward_items import item
from tests.kit.reward_servers import HANG_UP, GrpcServer, HttpServer, grpc_server, http_server, remote

ERROR = web.HTTPInternalServerError


async def score(station: RemoteStation, *completions: str) -> list[Result]:
    return await station.score([item(word, sample_id=f"s{at}") for at, word in enumerate(completions)])


async def score_until_good(station: RemoteStation, count: int = 1) -> list[Result]:
    """As the puller does: only what it may, and again what comes back."""
    done: list[Result] = []
    async with asyncio.timeout(20):
        while len(done) < count:
            await station.available.wait()
            results = await score(station, *["ok"] * min(station.room or count, count - len(done)))
            assert {result.failure for result in results} <= {None, FailureKind.UNAVAILABLE}
            done += [result for result in results if result.verdict is not None]
    return done


async def hang(body: Any) -> Any:
    await asyncio.sleep(30)


FAULTS: dict[str, Callable[[Any], Any]] = {
    "every call is an error": lambda body: web.Response(status=500),
    "slow": hang,
    "hangs up": lambda body: HANG_UP,
    "redirects": lambda body: web.Response(status=302, headers={"Location": "http://169.254.169.254/"}),
    "overloaded": lambda body: web.Response(status=503),
    "route removed": lambda body: web.Response(status=404),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_server_that_fails_for_all_loses_nothing_and_recovers(fault):
    async with http_server(lambda body: 1) as server, remote("http", server.url, timeout_s=0.2) as station:
        assert (await score(station, *["ok"] * 20))[19].verdict == (1.0, {}, ())
        server.answer = FAULTS[fault]
        results = await score(station, *["ok"] * 20)
        assert {result.failure for result in results} == {FailureKind.UNAVAILABLE}
        assert not station.available.is_set() or station.room == 1
        assert "breaker" in station.trouble
        server.answer = lambda body: 1
        await score_until_good(station, 20)
        assert (station.room, station.trouble) == (None, "")


@pytest.mark.parametrize("kind", ["http", "grpc"])
async def test_an_outage_is_waited_out(kind):
    server: Any = HttpServer(lambda body: 1) if kind == "http" else GrpcServer(lambda asked: 1.0)
    async with remote(kind, server.url) as station:
        first = await score(station, *["ok"] * 10)
        assert {result.failure for result in first} == {FailureKind.UNAVAILABLE}
        for _ in range(2):
            await server.start()
            await score_until_good(station, 10)
            await server.stop()
            down = await score(station, *["ok"] * 10)
            assert {result.failure for result in down} == {FailureKind.UNAVAILABLE}


async def test_while_the_breaker_is_open_nobody_is_called():
    async with (
        http_server(FAULTS["overloaded"]) as server,
        remote("http", server.url, breaker_reset_s=30, breaker_max_reset_s=30) as station,
    ):
        await score(station, *["ok"] * 10)
        assert not station.available.is_set()
        calls = len(server.calls)
        [result] = await score(station, "ok")
        assert result.failure is FailureKind.UNAVAILABLE
        assert "HTTP 503" in result.reason
        assert len(server.calls) == calls


async def test_one_call_finds_out_whether_a_server_is_back():
    async with http_server(FAULTS["overloaded"]) as server, remote("http", server.url) as station:
        await score(station, *["ok"] * 10)
        await station.available.wait()
        before = len(server.calls)
        results = await score(station, *["ok"] * 10)
        assert {result.failure for result in results} == {FailureKind.UNAVAILABLE}
        assert len(server.calls) == before + 1


@pytest.mark.parametrize("fault", ["every call is an error", "slow", "hangs up"])
async def test_a_sample_that_breaks_the_server_is_told_from_a_broken_server(fault):
    def answer(body: dict[str, Any]) -> Any:
        return FAULTS[fault](body) if body["response"] == "poison" else 1

    async with http_server(answer) as server, remote("http", server.url, timeout_s=0.3) as station:
        results = await score(station, "ok", "poison", "ok")
        alone = (await score(station, "poison"))[0]
    assert [result.verdict for result in results] == [(1.0, {}, ()), None, (1.0, {}, ())]
    kind = FailureKind.TIMED_OUT if fault == "slow" else FailureKind.RAISED
    assert {results[1].failure, alone.failure} == {kind}
    assert "and the server scores others" in alone.reason


@pytest.mark.parametrize("poison", [{"text": "?"}, {"status": 500}], ids=["nonsense", "error"])
async def test_the_only_sample_there_is_may_be_to_blame(poison):
    """Its label is what the server is asked about instead."""
    async with (
        http_server(lambda body: 1 if body["response"] == "42" else web.Response(**poison)) as server,
        remote("http", server.url) as station,
    ):
        [result] = await score(station, "poison")
        assert result.failure is FailureKind.RAISED
        assert server.calls[-1]["response"] == "42"


async def test_a_sample_that_breaks_its_batch_is_found():
    def answer(asked: reward_pb2.ScoreItem) -> float:
        if asked.completion == "poison":
            raise ValueError("cannot")
        return 1.0

    words = ["ok"] * 5 + ["poison"] + ["ok"] * 5
    async with grpc_server(answer) as server, remote("grpc", server.url) as station:
        results = await score(station, *words)
    assert [result.verdict is not None for result in results] == [word == "ok" for word in words]
    assert results[5].failure is FailureKind.RAISED
    assert len(server.batches[0]) == 11


@pytest.mark.parametrize("answer", ['"text"', "NaN", "null", "<html>"])
async def test_a_server_that_answers_nonsense_costs_no_sample_an_attempt(answer):
    async with (
        http_server(lambda body: web.Response(text=answer)) as server,
        remote("http", server.url, concurrency=1) as station,
    ):
        for _ in range(2):
            results = await score(station, *["ok"] * 50)
            assert {result.failure for result in results} == {FailureKind.UNAVAILABLE}
            assert not station.available.is_set()
            server.answer = lambda body: 1
            await score_until_good(station, 20)
            server.answer = lambda body: web.Response(text=answer)


async def test_refusals_by_the_contract_of_samples_leave_the_server_in_service():
    failed = reward_pb2.ScoreError(kind=reward_pb2.SCORE_ERROR_KIND_FAILED, message="no")
    async with grpc_server(lambda asked: failed) as server, remote("grpc", server.url) as station:
        results = await score(station, *["ok"] * 100)
        assert {result.failure for result in results} == {FailureKind.RAISED}
        assert (station.available.is_set(), station.room) == (True, None)


async def test_errors_now_and_then_are_repeated_and_give_the_right_scores():
    dice = random.Random(0)
    settings = {"attempts": 10, "concurrency": 16, "breaker_failures": 10}

    async def answer(body: dict[str, Any]) -> Any:
        await asyncio.sleep(0.01)
        return float(body["response"]) if dice.random() > 0.2 else web.Response(status=dice.choice((500, 503, 429)))

    async with http_server(answer) as server, remote("http", server.url, **settings) as station:
        results = await score(station, *(str(number) for number in range(300)))
    assert [result.verdict and result.verdict.reward for result in results] == [float(number) for number in range(300)]


async def test_a_half_closed_connection_ends_at_the_deadline():
    async def half_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        await writer.drain()
        writer.write_eof()
        await asyncio.sleep(30)

    server = await asyncio.start_server(half_close, "127.0.0.1", port := free_port())
    async with remote("http", f"http://127.0.0.1:{port}/", timeout_s=0.3) as station:
        [result] = await score(station, "ok")
    server.close()
    assert (result.verdict, result.failure) == (None, FailureKind.UNAVAILABLE)


async def test_an_answer_that_drips_ends_at_the_deadline():
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while True:
            writer.write(b"1")
            await asyncio.sleep(0.02)

    server = await asyncio.start_server(drip, "127.0.0.1", port := free_port())
    async with (
        remote("http", f"http://127.0.0.1:{port}/", timeout_s=0.3) as station,
        asyncio.timeout(10),
    ):
        [result] = await score(station, "ok")
    server.close()
    assert (result.verdict, result.failure) == (None, FailureKind.UNAVAILABLE)


async def test_an_endless_answer_is_cut_off():
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(100_000):
            writer.write(b"1000\r\n" + b" " * 4096 + b"\r\n")
            await writer.drain()

    server = await asyncio.start_server(endless, "127.0.0.1", port := free_port())
    async with remote("http", f"http://127.0.0.1:{port}/", timeout_s=5) as station:
        [result] = await score(station, "ok")
    server.close()
    assert "longer than 64 KiB" in result.reason


async def test_a_slow_server_does_not_hold_up_the_other():
    async def slow(body: Any) -> float:
        await asyncio.sleep(2)
        return 2.0

    async with (
        http_server(slow) as one,
        http_server(lambda body: 1) as other,
        remote("http", [one.url, other.url], concurrency=2, timeout_s=5) as station,
    ):
        results = await score(station, *["ok"] * 100)
    rewards = [result.verdict.reward for result in results if result.verdict]
    assert (rewards.count(2.0), rewards.count(1.0)) == (2, 98)


async def test_what_one_server_cannot_do_another_does():
    async with (
        http_server(lambda body: 1) as other,
        remote("http", [f"http://127.0.0.1:{free_port()}/", other.url], attempts=10) as station,
    ):
        results = await score(station, *["ok"] * 50)
        assert all(result.verdict == (1.0, {}, ()) for result in results)
        assert station.available.is_set()
        assert "cannot be connected to" in station.trouble


async def test_samples_that_fail_do_not_take_up_the_places_of_others():
    def answer(body: dict[str, Any]) -> Any:
        return web.Response(status=503) if body["response"] == "later" else 1

    settings = {"concurrency": 1, "attempts": 5, "backoff_s": 0.3, "max_backoff_s": 1.0, "breaker_failures": 100}
    async with http_server(answer) as server, remote("http", server.url, **settings) as station:
        words = ["later", *["ok"] * 30, "later"]
        results = await score(station, *words)
        answered = [call["response"] for call in server.calls]
    assert [result.verdict is not None for result in results] == [word == "ok" for word in words]
    assert answered.index("ok") <= 2
    # The repetitions come while the others are done, or after.
    assert max(len(list(group)) for word, group in itertools.groupby(answered) if word == "ok") >= 10


async def test_closing_ends_calls_under_way_and_reports_nothing():
    async with http_server(hang) as server:
        async with remote("http", server.url, timeout_s=30) as station:
            scoring = asyncio.create_task(score(station, "ok"))
            while not server.calls:
                await asyncio.sleep(0.01)
        assert not scoring.done()
        scoring.cancel()
