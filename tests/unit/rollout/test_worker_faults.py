"""Engines that break, buffers that go away, leases that end: nothing is lost, nothing is done twice."""

from __future__ import annotations

import asyncio
import time

import pytest

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.errors import LimitError, PolyheadError
from services.common.versions import Version
from services.rollout.prompting import sampling_seed
from tests.kit.rollout_fake_buffer import Held
from tests.kit.rollout_fake_engine import token_at
from tests.kit.rollout_rig import until

PROMPT = "3+4="


def expected_tokens(held: Held, length: int) -> list[int]:
    seed = sampling_seed(0, int(held.group[1:]), held.index)
    return [token_at(seed, len(PROMPT) + position) for position in range(length)]


def done(*held: Held) -> bool:
    return all(sample.sample is not None for sample in held)


def released(*held: Held) -> bool:
    return all(sample.released is not None for sample in held)


async def test_an_engine_that_dies_in_mid_stream_costs_nothing_that_streamed(make_rig):
    rig = await make_rig(save_interval_s=60.0)
    rig.buffer.releasing = False
    rig.engine.limit_tokens = 6
    held = rig.buffer.add_group(PROMPT, 4)
    await until(lambda: rig.replica.stats.tokens_generated == 24)
    rig.engine.cut()
    await until(lambda: released(*held))
    assert {sample.released.reason for sample in held} == {pb.RELEASE_REASON_UNAVAILABLE}
    assert {sample.released.tokens_discarded for sample in held} == {0}
    assert all(sample.saved_tokens == expected_tokens(sample, 6) for sample in held)
    assert rig.buffer.count("Extend") == 1
    assert rig.first.suspect.is_set()
    assert rig.replica.stats.tokens_discarded == 0
    assert rig.replica.stats.busy.running == 0


async def test_an_engine_that_ends_gives_everything_back_at_once(make_rig):
    rig = await make_rig(save_interval_s=60.0)
    rig.buffer.releasing = False
    rig.engine.limit_tokens = 4
    held = rig.buffer.add_group(PROMPT, 4)
    await until(lambda: rig.replica.stats.tokens_generated == 16)
    rig.first.detach()
    assert rig.worker.holding == 0
    await until(lambda: released(*held))
    assert all(sample.saved_tokens == expected_tokens(sample, 4) for sample in held)
    assert rig.life.state == pb.REPLICA_STATE_SUSPECT


async def test_an_engine_process_that_dies_is_blamed_on_what_had_no_token_yet(make_rig):
    rig = await make_rig(save_interval_s=60.0)
    rig.buffer.releasing = False
    rig.engine.limit_tokens = 4
    streaming = rig.buffer.add_group(PROMPT, 4)
    await until(lambda: rig.replica.stats.tokens_generated == 16)
    rig.engine.limit_tokens = 0
    barren = rig.buffer.add_group("5+5=", 4)
    await until(lambda: len(rig.engine.requests) == 2)
    rig.engine.cut()  # the broken streams are noticed first
    await asyncio.sleep(0.05)
    assert not released(*barren)
    rig.first.detach(died=True)
    await until(lambda: released(*streaming, *barren))
    assert {held.released.reason for held in streaming} == {pb.RELEASE_REASON_UNAVAILABLE}
    assert {held.released.reason for held in barren} == {pb.RELEASE_REASON_SAMPLE_ERROR}
    assert barren[0].released.error == "the engine ended while generating this sample"


async def test_an_engine_that_is_ended_by_us_is_blamed_on_nothing(make_rig):
    rig = await make_rig()
    rig.buffer.releasing = False
    rig.engine.limit_tokens = 0
    held = rig.buffer.add_group(PROMPT, 4)
    await until(lambda: len(rig.engine.requests) == 1)
    rig.first.detach()
    await until(lambda: released(*held))
    assert {sample.released.reason for sample in held} == {pb.RELEASE_REASON_UNAVAILABLE}


async def test_what_has_failed_before_runs_one_group_at_a_time(make_rig):
    """So only one of them can be blamed when the engine ends again."""
    rig = await make_rig()
    rig.buffer.releasing = False
    rig.engine.limit_tokens = 0
    failed = [rig.buffer.add_group(f"{number}+0=", 2) for number in range(2)]
    for group in failed:
        for sample in group:
            sample.attempts = 1
    fresh = rig.buffer.add_group(PROMPT, 2)
    await until(lambda: rig.worker.holding == 6 and len(rig.engine.requests) == 2)
    await asyncio.sleep(0.05)
    assert len(rig.engine.requests) == 2
    rig.first.detach(died=True)
    everything = [*failed[0], *failed[1], *fresh]
    await until(lambda: released(*everything))
    assert [sample.attempts for sample in everything] == [2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("failed_index", [0, 2])
async def test_a_log_prob_that_is_none_fails_its_sample_only(make_rig, failed_index):
    rig = await make_rig()
    rig.buffer.releasing = False
    rig.engine.nan_at = (failed_index, 5)
    held = rig.buffer.add_group(PROMPT, 4)
    good = [sample for sample in held if sample.index != failed_index]
    await until(lambda: done(*good) and released(held[failed_index]))
    failed = held[failed_index].released
    assert failed.reason == pb.RELEASE_REASON_SAMPLE_ERROR
    assert "nan is not a log-probability" in failed.error
    assert held[failed_index].saved <= 4


async def test_a_refused_request_fails_alone(make_rig):
    rig = await make_rig()
    rig.buffer.releasing = False
    held = rig.buffer.add_group(PROMPT, 3)
    bad_tokens = [59]
    span = sample_pb2.WeightVersionSpan(version=Version(1, 0).to_proto(), start=0, end=1, kv=1)
    held[1].deltas.append(
        sample_pb2.TokenDelta(token_ids=bad_tokens[0].to_bytes(4, "little"), rollout_logprobs=b"\0\0\0\0", spans=[span])
    )
    rig.engine.refuse_containing = 59
    await until(lambda: done(held[0], held[2]) and released(held[1]))
    assert held[1].released.reason == pb.RELEASE_REASON_SAMPLE_ERROR
    assert "bad token" in held[1].released.error


async def test_an_engine_that_ends_every_request_does_not_go_on_for_ever(make_rig):
    rig = await make_rig()
    rig.buffer.releasing = False
    rig.engine.abort_all_after = 0
    (held,) = rig.buffer.add_group(PROMPT, 1)
    await until(lambda: released(held))
    assert held.released.reason == pb.RELEASE_REASON_SAMPLE_ERROR
    assert len(rig.engine.requests) == 5


async def test_a_lost_lease_ends_the_request_and_is_forgotten(make_rig):
    rig = await make_rig()
    rig.engine.limit_tokens = 4
    held = rig.buffer.add_group(PROMPT, 4)
    await until(lambda: all(sample.saved == 4 for sample in held))
    rig.engine.limit_tokens = 6
    rig.buffer.lose_lease(held[1])
    await until(lambda: rig.worker.holding == 3)
    await until(lambda: "abort_request" in rig.engine.names())
    assert rig.replica.stats.tokens_discarded <= 2
    rig.engine.limit_tokens = None
    others = [held[0], held[2], held[3]]
    await until(lambda: done(*others))
    assert held[1].sample is None


async def test_an_extend_whose_answer_is_lost_is_resynchronised(make_rig):
    rig = await make_rig()
    rig.buffer.apply_extend_then_fail = 1
    rig.engine.limit_tokens = 4
    held = rig.buffer.add_group(PROMPT, 2)
    await until(lambda: all(sample.saved == 4 for sample in held))
    rig.engine.limit_tokens = None
    await until(lambda: done(*held))
    assert all(sample.saved_tokens == expected_tokens(sample, sample.saved) for sample in held)
    assert rig.replica.stats.tokens_discarded == 0


async def test_a_buffer_that_goes_away_is_waited_for(make_rig):
    rig = await make_rig()
    rig.engine.limit_tokens = 4
    held = rig.buffer.add_group(PROMPT, 4)
    await until(lambda: len(rig.engine.requests) == 1)
    rig.buffer.down = True
    rig.engine.limit_tokens = None
    await until(lambda: rig.worker.holding == 0)
    await asyncio.sleep(0.5)
    assert not done(*held)
    rig.buffer.down = False
    await until(lambda: done(*held))
    more = rig.buffer.add_group(PROMPT, 4)
    await until(lambda: done(*more))


async def test_a_sample_the_buffer_refuses_does_not_hold_up_the_others(make_rig):
    rig = await make_rig()
    rig.buffer.releasing = False
    rig.buffer.refuse_samples_with_finish = sample_pb2.FINISH_REASON_STOP
    held = rig.buffer.add_group(PROMPT, 2)
    span = sample_pb2.WeightVersionSpan(version=Version(1, 0).to_proto(), start=0, end=1, kv=1)
    held[0].deltas.append(
        sample_pb2.TokenDelta(token_ids=(2).to_bytes(4, "little"), rollout_logprobs=b"\0\0\0\0", spans=[span])
    )
    await until(lambda: released(held[0]) and done(held[1]))
    assert held[0].released.reason == pb.RELEASE_REASON_SAMPLE_ERROR
    assert "not this one" in held[0].released.error


async def test_partial_tokens_the_buffer_refuses_fail_their_sample_only(make_rig):
    rig = await make_rig(save_interval_s=0.05)
    rig.buffer.releasing = False
    rig.engine.limit_tokens = 4
    held = rig.buffer.add_group(PROMPT, 3)
    rig.buffer.refuse_extending = {
        held[1].sample_id: LimitError("this message is too big"),
        # Nothing is known of this one: it is tried again, and does not stand in the way of others.
        held[2].sample_id: PolyheadError("INTERNAL"),
    }
    await until(lambda: held[0].saved == 4 and released(held[1]))
    assert held[1].released.reason == pb.RELEASE_REASON_SAMPLE_ERROR
    assert "too big" in held[1].released.error
    assert held[2].released is None
    del rig.buffer.refuse_extending[held[2].sample_id]
    await until(lambda: held[2].saved == 4)


async def test_a_release_whose_tokens_are_refused_still_happens(make_rig):
    rig = await make_rig(save_interval_s=60.0)
    rig.buffer.releasing = False
    rig.engine.limit_tokens = 4
    held = rig.buffer.add_group(PROMPT, 2)
    rig.buffer.refuse_extending = {held[0].sample_id: LimitError("this message is too big")}
    await until(lambda: rig.replica.stats.tokens_generated == 8)
    await rig.worker.drain()
    await until(lambda: released(*held))
    assert [sample.saved for sample in held] == [0, 4]
    assert held[0].released.tokens_discarded == 4


async def test_unknown_errors_are_not_the_head_of_the_line_for_ever(make_rig):
    rig = await make_rig()
    rig.buffer.releasing = False
    first = rig.buffer.add_group(PROMPT, 4)
    rig.buffer.refuse_complete = {sample.sample_id: PolyheadError("INTERNAL") for sample in first[:3]}
    rig.buffer.refuse_complete[first[0].sample_id] = LimitError("this message is too big")
    await until(lambda: released(*first[:3]) and done(first[3]))
    assert {sample.released.reason for sample in first[:3]} == {pb.RELEASE_REASON_SAMPLE_ERROR}
    second = rig.buffer.add_group(PROMPT, 4)
    await until(lambda: done(*second))


async def test_oversize_prompts_drop_their_group(make_rig):
    rig = await make_rig(sampling={"max_prompt_len": 8, "max_response_len": 10})
    long = rig.buffer.add_group("1+1+1+1+1=", 4)
    short = rig.buffer.add_group("1+1=", 4)
    await until(lambda: released(*long) and done(*short))
    assert {(item.released.reason, item.released.drop_reason) for item in long} == {
        (pb.RELEASE_REASON_DROP, sample_pb2.DROP_REASON_OVERSIZE)
    }
    assert "10 tokens, at most 8" in long[0].released.error


async def test_a_completion_stays_within_the_context(make_rig):
    rig = await make_rig(serving=False)
    rig.engine.context_length = 12
    await rig.attach()
    rig.serve()
    (held,) = rig.buffer.add_group(PROMPT, 1)
    too_long = rig.buffer.add_group("1" * 12, 1)
    await until(lambda: done(held) and released(*too_long))
    assert rig.engine.requests[0]["sampling_params"][0]["max_new_tokens"] == 8
    assert too_long[0].released.drop_reason == sample_pb2.DROP_REASON_OVERSIZE


async def test_a_prompt_that_cannot_be_rendered_is_fatal(make_rig):
    rig = await make_rig()
    held = rig.buffer.add_group("", 2, messages_json="[]")
    await until(lambda: released(*held))
    assert {item.released.reason for item in held} == {pb.RELEASE_REASON_FATAL}
    assert "apply_chat_template" in held[0].released.error


async def test_drain_returns_everything_in_few_calls(make_rig):
    rig = await make_rig(max_inflight=256, save_interval_s=60.0, engine={"max_running_requests": 256})
    rig.buffer.releasing = False
    rig.engine.limit_tokens = 4
    groups = [rig.buffer.add_group(PROMPT, 8) for _ in range(32)]
    held = [sample for group in groups for sample in group]
    await until(lambda: rig.replica.stats.tokens_generated == 4 * 256)
    began = time.monotonic()
    assert await rig.worker.drain() == 256
    assert time.monotonic() - began < 5
    assert rig.buffer.count("Extend") == 1
    assert rig.buffer.count("Release") == 1
    assert {sample.released.reason for sample in held} == {pb.RELEASE_REASON_DRAIN}
    assert all(sample.saved_tokens == expected_tokens(sample, 4) for sample in held)
    leases = rig.buffer.count("Lease")
    await asyncio.sleep(0.05)
    assert rig.buffer.count("Lease") == leases
    assert rig.replica.stats.requests_aborted == 0


async def test_a_joining_replica_leases_nothing(make_rig):
    rig = await make_rig(serving=False)
    rig.buffer.add_group(PROMPT, 4)
    await asyncio.sleep(0.1)
    assert rig.buffer.count("Lease") == 0
    assert rig.life.state == pb.REPLICA_STATE_JOINING
