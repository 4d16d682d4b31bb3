"""A replica of several engines, with the real router in front of them: what one engine loses, the others finish."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.errors import FencedError
from services.common.versions import Version
from services.rollout.engines.client import EngineClient
from services.rollout.engines.messages import EngineLoad, EngineUnavailableError
from services.rollout.laggards import Laggards
from services.rollout.prompting import sampling_seed
from services.rollout.records import Arrival
from services.rollout.registration import describe
from tests.kit.rollout_fake_buffer import Held
from tests.kit.rollout_fake_engine import token_at
from tests.kit.rollout_rig import FIRST, Rig, until

PROMPT = "3+4="
V1 = Version(1, 1)


@pytest.fixture
def make_pair(make_rig):
    async def make(**settings) -> Rig:
        return await make_rig(engines=2, router={"policy": "round_robin"}, **settings)

    return make


def completion(held: Held) -> list[int]:
    assert held.sample is not None
    segment = held.sample.segments[0]
    return list(memoryview(segment.token_ids).cast("i"))[segment.prompt_length :]


def expected_tokens(held: Held) -> list[int]:
    seed = sampling_seed(0, int(held.group[1:]), held.index)
    return [token_at(seed, len(PROMPT) + position) for position in range(10)]


def done(*held: Held) -> bool:
    return all(sample.sample is not None for sample in held)


def released(*held: Held) -> bool:
    return all(sample.released is not None for sample in held)


async def generating(rig: Rig, tokens: int = 4) -> list[Held]:
    """Four samples, two on each engine, that have `tokens` tokens and wait for more."""
    for engine in rig.engines:
        engine.limit_tokens = tokens
    held = rig.buffer.add_group(PROMPT, 4)
    await until(lambda: [len(engine.running) for engine in rig.engines] == [2, 2])
    await until(lambda: rig.replica.stats.tokens_generated == 4 * tokens)
    return held


def go_on(rig: Rig) -> None:
    for engine in rig.engines:
        engine.limit_tokens = None


async def finished(rig: Rig, held: list[Held]) -> None:
    """Every token was made once, and none is missing."""
    go_on(rig)
    await until(lambda: done(*held))
    assert [completion(sample) for sample in held] == [expected_tokens(sample) for sample in held]
    assert rig.replica.stats.tokens_generated == 10 * len(held)
    assert rig.replica.stats.tokens_discarded == 0
    assert not any(sample.released for sample in held)


async def test_what_a_lost_engine_had_is_finished_by_the_other_from_where_it_stood(make_pair):
    rig = await make_pair(save_interval_s=60.0)
    held = await generating(rig)
    before = len(rig.engine.requests)
    await rig.lose(1)
    await until(lambda: len(rig.engine.requests) == before + 2)
    assert [len(body["input_ids"][0]) for body in rig.engine.requests[before:]] == [len(PROMPT) + 4] * 2
    await finished(rig, held)
    assert rig.replica.state == pb.REPLICA_STATE_SERVING


async def test_only_what_had_no_token_of_an_engine_that_died_is_blamed(make_pair):
    rig = await make_pair()
    rig.buffer.releasing = False
    held = await generating(rig, tokens=0)
    theirs = {rid.split(".")[0] for rid in rig.engines[1].running}
    await rig.lose(1)
    await until(lambda: sum(sample.released is not None for sample in held) == 2)
    blamed = [sample for sample in held if sample.released is not None]
    assert {sample.sample_id for sample in blamed} == theirs
    assert {sample.released.reason for sample in blamed} == {pb.RELEASE_REASON_SAMPLE_ERROR}
    go_on(rig)
    await until(lambda: done(*(sample for sample in held if sample not in blamed)))


async def test_an_engine_that_we_ended_is_blamed_on_nothing(make_pair):
    rig = await make_pair()
    held = await generating(rig, tokens=0)
    await rig.lose(1, died=False)
    await finished(rig, held)


async def test_without_any_engine_everything_is_given_back(make_pair):
    rig = await make_pair(save_interval_s=60.0)
    rig.buffer.releasing = False
    held = await generating(rig)
    rig.engine.go.clear()
    await rig.lose(1)
    await rig.lose(0)
    assert rig.worker.holding == 0
    await until(lambda: released(*held))
    assert {sample.released.reason for sample in held} == {pb.RELEASE_REASON_UNAVAILABLE}
    assert [sample.saved for sample in held] == [4] * 4
    assert rig.replica.state == pb.REPLICA_STATE_SUSPECT
    assert not rig.replica.gate.is_set()


async def test_a_router_that_dies_costs_nothing(make_pair):
    rig = await make_pair()
    held = await generating(rig)
    pid = rig.replica.router.pid
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not rig.replica.gate.is_set())
    await until(lambda: rig.replica.may_generate, 20.0)
    assert rig.replica.router.pid != pid
    await finished(rig, held)


async def test_an_update_of_one_engine_holds_new_requests_back_and_lets_the_others_run(make_pair):
    rig = await make_pair()
    held = await generating(rig)
    await rig.begin(V1, engine=1)
    assert not rig.replica.gate.is_set()
    assert rig.replica.state == pb.REPLICA_STATE_SERVING
    rig.engine.limit_tokens = None
    await until(lambda: sum(sample.sample is not None for sample in held) == 2)
    await rig.load(V1, 0, engine=1)
    await rig.load(V1, 1, engine=1)
    await rig.commit(V1, engine=1)
    assert rig.replica.gate.is_set()
    assert (rig.replica.version, rig.replica.newest) == (FIRST, V1)
    await finished(rig, held)
    more = rig.buffer.add_group(PROMPT, 4)
    await until(lambda: done(*more))
    keys = {body["extra_key"] for engine in rig.engines for body in engine.requests[2:]}
    assert keys == {"e1.s0,e1.s1"}
    assert {span.version.step for sample in more for span in sample.sample.segments[0].spans} == {0, 1}
    leases = [request for name, request in rig.buffer.requests if name == "Lease"]
    assert Version.from_proto(leases[-1].weight_version) == FIRST


async def test_an_engine_that_joins_stops_nobody(make_pair):
    rig = await make_pair()
    await rig.lose(1)
    await rig.engines[1].start()
    await rig.attach(1)
    await until(rig.replica.gate.is_set)  # the router has forgotten the engine that was lost
    await rig.begin(V1, engine=1)
    assert rig.replica.gate.is_set()
    held = rig.buffer.add_group(PROMPT, 4)
    await until(lambda: done(*held))
    assert len(rig.replica.router.registered) == 1
    await rig.load(V1, 0, engine=1)
    await rig.load(V1, 1, engine=1)
    await rig.commit(V1, engine=1)
    await until(lambda: len(rig.replica.router.registered) == 2)
    states = [(engine.state, engine.weight_version.step) for engine in describe(rig.replica, "").engines]
    assert states == [(pb.REPLICA_STATE_SERVING, 0), (pb.REPLICA_STATE_SERVING, 1)]


async def test_a_torn_engine_of_ours_is_ended_and_what_it_had_goes_on_elsewhere(make_pair):
    rig = await make_pair(save_interval_s=60.0)
    held = await generating(rig)
    url = rig.engines[1].url
    await rig.begin(V1, engine=1)
    await rig.load(V1, 0, engine=1)
    await rig.abort(V1, engine=1)
    assert rig.killed == [1]
    assert url not in rig.replica.router.registered
    await finished(rig, held)
    assert all([span.version.step for span in sample.sample.segments[0].spans] == [0] for sample in held)


async def test_nothing_is_taken_from_torn_weights_of_an_engine_that_is_not_ours_to_end(make_pair):
    rig = await make_pair(save_interval_s=60.0)
    rig.replica.engines[1].detach()
    await until(lambda: len(rig.replica.router.registered) == 1)
    await rig.attach(1, external=True)
    rig.serve(engine=1)
    await until(lambda: len(rig.replica.router.registered) == 2)
    held = await generating(rig)
    await rig.begin(V1, engine=1)
    await rig.load(V1, 0, engine=1)
    rig.engines[1].token_at_abort = 7
    assert await rig.abort(V1, engine=1) == pb.REPLICA_STATE_QUARANTINED
    assert rig.engines[1].paused is None
    go_on(rig)
    await until(lambda: done(*held))
    assert [completion(sample) for sample in held] == [expected_tokens(sample) for sample in held]
    assert rig.replica.stats.discarded == {"quarantined": 2}
    await rig.push(V1, engine=1)
    await until(lambda: len(rig.replica.router.registered) == 2)


async def test_a_torn_engine_without_others_gives_everything_back(make_pair):
    rig = await make_pair(save_interval_s=60.0)
    rig.buffer.releasing = False
    held = await generating(rig)
    await rig.lose(0)
    await until(lambda: len(rig.engines[1].running) == 4)
    await rig.begin(V1, engine=1)
    await rig.load(V1, 0, engine=1)
    await rig.abort(V1, engine=1)
    await until(lambda: released(*held))
    assert {sample.released.reason for sample in held} == {pb.RELEASE_REASON_UNAVAILABLE}


async def test_requests_end_before_an_aborting_push_and_are_resumed(make_pair):
    rig = await make_pair()
    held = await generating(rig)
    await rig.push(V1, mode="ABORT", engine=1)
    assert [body["mode"] for name, body in rig.engines[1].calls if name == "pause_generation"] == ["in_place"]
    await until(lambda: rig.replica.stats.requests_aborted == 2)
    await finished(rig, held)


async def test_an_epoch_seen_by_one_engine_fences_the_others(make_pair):
    rig = await make_pair(serving=False)
    await rig.join(2, engine=0)
    with pytest.raises(FencedError):
        await rig.join(1, engine=1)


async def test_an_engine_left_behind_gets_nothing_new_until_it_is_pushed_to(make_pair):
    rig = await make_pair()
    laggards = Laggards(rig.replica)
    await rig.push(V1, engine=0)
    laggards.look(0.0)
    laggards.look(4.9)
    assert rig.replica.version == FIRST
    laggards.look(5.0)
    assert rig.replica.version == V1
    await until(lambda: rig.replica.router.registered == {rig.engine.url})
    held = rig.buffer.add_group(PROMPT, 4)
    await until(lambda: done(*held))
    assert not rig.engines[1].requests
    await rig.begin(V1, engine=1)
    laggards.look(6.0)
    assert rig.replica.gate.is_set()
    await rig.load(V1, 0, engine=1)
    await rig.load(V1, 1, engine=1)
    await rig.commit(V1, engine=1)
    laggards.look(7.0)
    await until(lambda: len(rig.replica.router.registered) == 2)


async def leasing_for(rig: Rig, version: Version) -> None:
    """What is leased from here on is leased for it."""

    def asked() -> bool:
        leases = [request for name, request in rig.buffer.requests if name == "Lease"]
        return bool(leases) and Version.from_proto(leases[-1].weight_version) == version

    await until(asked)


async def left_behind(rig: Rig) -> Laggards:
    """The second engine lags."""
    laggards = Laggards(rig.replica)
    await rig.push(V1, engine=0)
    laggards.look(0.0)
    laggards.look(5.0)
    await until(lambda: rig.replica.router.registered == {rig.engine.url})
    return laggards


async def test_an_engine_that_is_left_alone_does_not_lag(make_pair):
    rig = await make_pair()
    laggards = await left_behind(rig)
    await rig.lose(0)
    assert not rig.replica.gate.is_set()
    laggards.look(6.0)
    await until(lambda: rig.replica.may_generate)
    assert rig.replica.version == FIRST


async def test_what_was_leased_for_a_version_gets_nothing_of_an_older_one_when_its_engine_is_lost(make_pair):
    rig = await make_pair(save_interval_s=60.0)
    rig.buffer.releasing = False
    laggards = await left_behind(rig)
    await leasing_for(rig, V1)
    rig.engine.limit_tokens = 4
    held = rig.buffer.add_group(PROMPT, 4)
    await until(lambda: rig.replica.stats.tokens_generated == 16)
    await rig.lose(0)
    await until(lambda: released(*held))
    assert {sample.released.reason for sample in held} == {pb.RELEASE_REASON_UNAVAILABLE}
    laggards.look(6.0)
    laggards.look(7.0)
    assert (rig.replica.state, rig.replica.version) == (pb.REPLICA_STATE_SYNCING, None)
    assert not rig.replica.wanted()
    rig.buffer.releasing = True
    await rig.push(V1, engine=1)
    more = rig.buffer.add_group(PROMPT, 4)
    await until(lambda: done(*more))
    assert {span.version.step for sample in more for span in sample.sample.segments[0].spans} == {1}


async def test_what_was_leased_for_a_version_waits_for_it_while_the_router_is_away(make_pair):
    rig = await make_pair(save_interval_s=60.0)
    laggards = await left_behind(rig)
    await leasing_for(rig, V1)
    rig.engine.limit_tokens = 4
    held = rig.buffer.add_group(PROMPT, 4)
    await until(lambda: rig.replica.stats.tokens_generated == 16)
    os.kill(rig.replica.router.pid, signal.SIGKILL)
    await until(lambda: not rig.replica.router.up)
    laggards.look(6.0)
    assert rig.replica.wanted().keys() == {rig.engine.url}
    await until(lambda: rig.replica.may_generate, 20.0)
    await finished(rig, held)
    assert not rig.engines[1].requests


async def test_a_slow_push_of_a_version_that_was_overtaken_brings_no_engine_back(make_pair):
    rig = await make_pair()
    await rig.lose(1)
    await rig.engines[1].start()
    await rig.attach(1)
    await rig.push(Version(1, 2), engine=0)
    await leasing_for(rig, Version(1, 2))
    held = rig.buffer.add_group(PROMPT, 4)
    await until(lambda: done(*held))
    await rig.push(V1, engine=1)
    assert rig.replica.wanted().keys() == {rig.engine.url}
    assert rig.replica.version == Version(1, 2)
    await rig.push(Version(1, 2), engine=1)
    await until(lambda: len(rig.replica.router.registered) == 2)


async def test_no_request_is_sent_while_the_router_may_pick_an_engine_that_is_to_go(make_pair):
    rig = await make_pair()
    assert rig.replica.may_generate
    rig.replica.engines[1].lagging = True
    rig.replica.turned()
    assert len(rig.replica.router.registered) == 2
    assert not rig.replica.gate.is_set()
    await until(rig.replica.gate.is_set)
    assert rig.replica.router.registered == {rig.engine.url}


async def test_streams_of_an_external_engine_that_fell_silent_are_resumed_elsewhere(make_pair, monkeypatch):
    monkeypatch.setattr("services.rollout.replica._SILENT_S", 0.1)
    rig = await make_pair(save_interval_s=60.0)
    rig.replica.engines[1].detach()
    await until(lambda: len(rig.replica.router.registered) == 1)
    await rig.attach(1, external=True)
    rig.serve(engine=1)
    await until(lambda: len(rig.replica.router.registered) == 2)
    held = await generating(rig)
    rig.engine.limit_tokens = None
    await until(lambda: sum(sample.sample is not None for sample in held) == 2)
    rig.replica.engines[1].detach()
    await until(lambda: done(*held))
    assert [completion(sample) for sample in held] == [expected_tokens(sample) for sample in held]
    assert rig.replica.stats.tokens_generated == 40


async def test_a_pushs_figures_are_those_of_its_engine(make_pair, monkeypatch):
    async def load(client: EngineClient) -> EngineLoad:
        running = {engine.url: len(engine.running) for engine in rig.engines}[client.url]
        return EngineLoad(running, waiting=0, used_tokens=0, max_tokens=1000)

    rig = await make_pair()
    await generating(rig)
    monkeypatch.setattr(EngineClient, "load", load)
    assert await rig.begin(V1, engine=1) == 2
    await rig.load(V1, 0, engine=1)
    await rig.load(V1, 1, engine=1)
    committed = await rig.commit(V1, engine=1)
    assert (committed.continued, committed.aborted) == (2, 0)
    await rig.begin(V1, mode="ABORT", engine=0)
    await rig.load(V1, 0, engine=0)
    await rig.load(V1, 1, engine=0)
    committed = await rig.commit(V1, engine=0)
    assert (committed.continued, committed.aborted) == (0, 2)


async def test_an_engine_that_answers_no_more_is_suspected(make_rig, monkeypatch):
    async def load(client: EngineClient) -> EngineLoad:
        looks.append(client.url)
        raise EngineUnavailableError("TimeoutError", field="engine /v1/loads")

    looks: list[str] = []
    monkeypatch.setattr("services.rollout.room._LOOK_S", 0.01)
    monkeypatch.setattr(EngineClient, "load", load)
    rig = await make_rig()
    await until(rig.first.suspect.is_set)
    assert len(looks) >= 3


async def test_as_much_is_held_as_the_engines_in_rotation_have_slots_for(make_pair):
    rig = await make_pair(max_inflight=None, engine={"max_running_requests": 4})
    rig.engine.go.clear()
    rig.engines[1].go.clear()
    held = [rig.buffer.add_group(PROMPT, 4) for _ in range(4)]
    await until(lambda: rig.worker.holding == 8)
    await rig.lose(1, died=False)
    rig.engine.go.set()
    await until(lambda: done(*(sample for group in held for sample in group)))
    leases = [request.max_samples for name, request in rig.buffer.requests if name == "Lease"]
    assert leases[0] == 8
    assert leases[-1] <= 4


async def test_a_drain_empties_all_engines(make_pair):
    rig = await make_pair(save_interval_s=60.0)
    rig.buffer.releasing = False
    held = await generating(rig)
    assert await rig.worker.drain() == 4
    assert released(*held)
    assert [sample.saved for sample in held] == [4] * 4
    assert all("abort_request" in engine.names() for engine in rig.engines)


async def test_a_pause_in_place_waits_for_first_tokens_where_passes_overlap(make_rig, monkeypatch):
    monkeypatch.setattr("services.rollout.update._FIRST_TOKENS_S", 30.0)
    rig = await make_rig(serving=False)
    rig.engine.info = {"kind": "sglang", "version": "0.5.23"}
    await rig.attach()
    rig.serve()
    rig.engine.go.clear()
    held = rig.buffer.add_group(PROMPT, 2)
    await until(lambda: rig.replica.unstarted == 2)
    await rig.join(1)
    beginning = asyncio.create_task(rig.begin(V1))
    await until(lambda: not rig.replica.gate.is_set())
    assert "pause_generation" not in rig.engine.names()
    rig.engine.limit_tokens = 2
    rig.engine.go.set()
    await beginning
    assert rig.replica.unstarted == 0
    await rig.load(V1, 0)
    await rig.load(V1, 1)
    await rig.commit(V1)
    assert rig.replica.arrival_of(V1) == Arrival(sample_pb2.KV_ORIGIN_CARRIED, late=True)
    rig.engine.limit_tokens = None
    await until(lambda: done(*held))
    await rig.push(Version(1, 2), mode="RETRACT")
    assert rig.replica.arrival_of(Version(1, 2)) == Arrival(sample_pb2.KV_ORIGIN_FRESH, late=False)
