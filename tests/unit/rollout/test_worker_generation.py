"""What a completed sample holds, and how partial ones come and go."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common import wire
from services.common.versions import Version
from services.rollout.prompting import sampling_seed
from tests.kit.rollout_fake_buffer import Held
from tests.kit.rollout_fake_engine import EOS, logprob_of, token_at
from tests.kit.rollout_rig import FIRST, until

PROMPT = "3+4="


def expected_tokens(held: Held, length: int, prompt_length: int = len(PROMPT)) -> list[int]:
    seed = sampling_seed(0, int(held.group[1:]), held.index)
    return [token_at(seed, prompt_length + position) for position in range(length)]


def completion(sample: sample_pb2.Sample) -> list[int]:
    segment = sample.segments[0]
    return wire.decode_tokens(segment.token_ids)[segment.prompt_length :].tolist()


def done(*held: Held) -> bool:
    return all(sample.sample is not None for sample in held)


@pytest.mark.parametrize("incremental", [True, False])
async def test_a_group_is_one_request_and_its_samples_are_exact(make_rig, prompter, incremental):
    rig = await make_rig()
    rig.engine.incremental = incremental
    held = rig.buffer.add_group(PROMPT, 8, label="7")
    await until(lambda: done(*held))
    assert len(rig.engine.requests) == 1
    assert len(rig.engine.requests[0]["input_ids"]) == 8
    assert rig.engine.requests[0]["extra_key"] == "e1.s0"
    for sample in held:
        got = sample.sample
        segment = got.segments[0]
        tokens = expected_tokens(sample, 10)
        assert completion(got) == tokens
        assert segment.prompt_length == len(PROMPT)
        assert wire.decode_tokens(segment.token_ids)[: len(PROMPT)].tolist() == prompter.encode(got.prompt, None)
        np.testing.assert_array_equal(
            wire.decode_logprobs(segment.rollout_logprobs), np.float32([logprob_of(token) for token in tokens])
        )
        assert wire.decode_mask(segment.loss_mask).tolist() == [1] * 10
        assert [(span.start, span.end, span.kv) for span in segment.spans] == [(0, 10, sample_pb2.KV_ORIGIN_FRESH)]
        assert Version.from_proto(segment.spans[0].version) == FIRST
        assert 0 < segment.first_token_unix_us <= segment.last_token_unix_us
        assert (got.sample_id, got.group_id, got.index) == (sample.sample_id, sample.group, sample.index)
        assert got.prompt == rig.buffer.prompts[sample.group]
        assert got.finish_reason == sample_pb2.FINISH_REASON_LENGTH
        assert got.completion == prompter.decode([tokens])[0]
        assert got.behaviour_exact
        assert all(segment.digest == wire.segment_digest(segment) for segment in got.segments)
        assert got.engine == "fake_engine/1"
        assert got.sampling.max_new_tokens == 10
    assert rig.replica.stats.tokens_generated == 80
    await until(lambda: rig.replica.stats.samples_completed == 8)


async def test_special_tokens_stay_in_the_tokens_and_leave_the_text(make_rig):
    rig = await make_rig()
    rig.engine.stop_after = 3
    (held,) = rig.buffer.add_group(PROMPT, 1)
    await until(lambda: done(held))
    assert completion(held.sample) == [*expected_tokens(held, 2), EOS]
    assert len(held.sample.completion) == 2
    assert held.sample.finish_reason == sample_pb2.FINISH_REASON_STOP


async def test_truncated_sampling_is_not_exact(make_rig):
    rig = await make_rig(sampling={"top_p": 0.9, "max_response_len": 4})
    (held,) = rig.buffer.add_group(PROMPT, 1)
    await until(lambda: done(held))
    assert not held.sample.behaviour_exact


async def test_finished_samples_share_calls(make_rig):
    rig = await make_rig()
    groups = [rig.buffer.add_group(PROMPT, 4) for _ in range(4)]
    await until(lambda: all(done(*group) for group in groups))
    assert len(rig.engine.requests) == 4
    assert rig.buffer.count("Complete") <= 4


async def test_no_more_than_max_inflight_is_leased(make_rig):
    rig = await make_rig()
    rig.engine.go.clear()
    for _ in range(10):
        rig.buffer.add_group(PROMPT, 4)
    await until(lambda: rig.worker.holding == 16)
    await asyncio.sleep(0.05)
    assert rig.worker.holding == 16
    rig.engine.go.set()
    await until(lambda: done(*rig.buffer.samples.values()))


async def test_partials_are_saved_while_generating_and_resumed_exactly(make_rig):
    rig = await make_rig()
    rig.engine.limit_tokens = 4
    held = rig.buffer.add_group(PROMPT, 4)
    await until(lambda: all(sample.saved == 4 for sample in held))
    assert all(sample.saved_tokens == expected_tokens(sample, 4) for sample in held)
    assert held[0].deltas[0].first_token_unix_us > 0
    beats = rig.buffer.count("Extend")
    await until(lambda: rig.buffer.count("Extend") > beats + 1)  # heartbeats go on without new tokens
    assert all(len(sample.deltas) <= 2 for sample in held)

    rig.buffer.releasing = False
    assert await rig.worker.drain() == 4
    assert {sample.released.reason for sample in held} == {pb.RELEASE_REASON_DRAIN}

    other = await make_rig()
    other.engine.version = "e1.s3"
    other.life.begin_update(Version(1, 3))
    other.life.commit_update()
    other.replica.turned()
    moved = other.buffer.add_group(PROMPT, 4)
    for sample, earlier in zip(moved, held, strict=True):
        sample.deltas = list(earlier.deltas)
    await until(lambda: done(*moved))
    request = other.engine.requests[0]
    assert [ids[len(PROMPT) :] for ids in request["input_ids"]] == [expected_tokens(sample, 4) for sample in held]
    assert {params["max_new_tokens"] for params in request["sampling_params"]} == {6}
    for sample in moved:
        assert completion(sample.sample) == expected_tokens(sample, 10)
        spans = sample.sample.segments[0].spans
        assert [(span.version.step, span.start, span.end, span.kv) for span in spans] == [
            (0, 0, 4, sample_pb2.KV_ORIGIN_FRESH),
            (3, 4, 10, sample_pb2.KV_ORIGIN_FRESH),
        ]
        assert sample.sample.segments[0].first_token_unix_us == sample.deltas[0].first_token_unix_us
    await until(lambda: other.replica.stats.multi_span_samples == 4)


async def test_a_partial_that_had_ended_completes_at_once(make_rig):
    rig = await make_rig(serving=False)
    held = rig.buffer.add_group(PROMPT, 2)
    for sample, tokens in zip(held, ([5, EOS], [5] * 10), strict=True):
        span = sample_pb2.WeightVersionSpan(version=FIRST.to_proto(), start=0, end=len(tokens), kv=1)
        sample.deltas.append(
            sample_pb2.TokenDelta(
                token_ids=wire.encode_tokens(tokens),
                rollout_logprobs=wire.encode_logprobs([-1.0] * len(tokens)),
                spans=[span],
                first_token_unix_us=1,
            )
        )
    rig.serve()
    await until(lambda: done(*held))
    assert rig.engine.requests == []
    assert held[0].sample.finish_reason == sample_pb2.FINISH_REASON_STOP
    assert held[1].sample.finish_reason == sample_pb2.FINISH_REASON_LENGTH
    assert completion(held[0].sample) == [5, EOS]


async def test_a_stop_string_is_found_across_the_seam(make_rig, prompter):
    text = prompter.decode([expected_tokens(Held("", 0, "g0"), 10)])[0]
    rig = await make_rig(serving=False, sampling={"stop": [text[2:5]], "max_response_len": 10})
    (held,) = rig.buffer.add_group(PROMPT, 1)
    tokens = expected_tokens(held, 3)
    span = sample_pb2.WeightVersionSpan(version=FIRST.to_proto(), start=0, end=3, kv=1)
    held.deltas.append(
        sample_pb2.TokenDelta(
            token_ids=wire.encode_tokens(tokens),
            rollout_logprobs=wire.encode_logprobs([-1.0] * 3),
            spans=[span],
            first_token_unix_us=1,
        )
    )
    rig.serve()
    await until(lambda: done(held))
    assert completion(held.sample) == expected_tokens(held, 5)
    assert held.sample.finish_reason == sample_pb2.FINISH_REASON_STOP
    assert held.sample.segments[0].spans[-1].end == 5
    await until(lambda: "abort_request" in rig.engine.names())


async def test_a_stop_string_is_found_where_the_engine_does_not_look_for_it(make_rig, prompter):
    text = prompter.decode([expected_tokens(Held("", 0, "g0"), 10)])[0]
    rig = await make_rig(sampling={"stop": [text[2:5]], "max_response_len": 10})
    (held,) = rig.buffer.add_group(PROMPT, 1)
    await until(lambda: done(held))
    assert len(rig.engine.requests) == 1
    assert completion(held.sample) == expected_tokens(held, 5)
    assert held.sample.finish_reason == sample_pb2.FINISH_REASON_STOP


async def test_a_request_that_the_engine_ended_is_resumed(make_rig):
    rig = await make_rig()
    rig.engine.abort_all_after = 4
    held = rig.buffer.add_group(PROMPT, 4)
    await until(lambda: done(*held))
    budgets = [{params["max_new_tokens"] for params in request["sampling_params"]} for request in rig.engine.requests]
    assert budgets == [{10}, {6}, {2}]
    assert all(completion(sample.sample) == expected_tokens(sample, 10) for sample in held)
    assert rig.replica.stats.requests_aborted == 8
    assert len({rid for request in rig.engine.requests for rid in request["rid"]}) == 12


async def test_in_a_deterministic_run_nothing_is_resumed(make_rig):
    rig = await make_rig(deterministic=True)
    rig.engine.abort_all_after = 4
    held = rig.buffer.add_group(PROMPT, 4)
    await until(lambda: len(rig.engine.requests) > 1)
    rig.engine.abort_all_after = None
    await until(lambda: done(*held))
    assert all(completion(sample.sample) == expected_tokens(sample, 10) for sample in held)
    assert {params["max_new_tokens"] for each in rig.engine.requests for params in each["sampling_params"]} == {10}
    assert {sample.saved for sample in held} == {0}
    assert rig.replica.stats.discarded["begun_again"] == 16 * (len(rig.engine.requests) - 1)


async def test_spans_may_come_with_the_last_event_only(make_rig):
    rig = await make_rig()
    rig.engine.spans_in_every_event = False
    rig.engine.limit_tokens = 4
    (held,) = rig.buffer.add_group(PROMPT, 1)
    await until(lambda: held.saved == 4)
    await rig.push(Version(1, 1))
    rig.engine.limit_tokens = None
    await until(lambda: done(held))
    spans = held.sample.segments[0].spans
    assert [(span.version.step, span.start, span.end, span.kv) for span in spans] == [
        (0, 0, 4, sample_pb2.KV_ORIGIN_FRESH),
        (1, 4, 10, sample_pb2.KV_ORIGIN_CARRIED),
    ]


async def test_tokens_of_a_dead_engine_are_kept_and_never_stamped_newer_than_they_are(make_rig):
    rig = await make_rig()
    rig.engine.spans_in_every_event = False
    rig.engine.limit_tokens = 4
    (held,) = rig.buffer.add_group(PROMPT, 1)
    await until(lambda: held.saved == 4)
    await rig.push(Version(1, 1))
    rig.engine.limit_tokens = 8
    await until(lambda: rig.replica.stats.tokens_generated == 8)
    rig.buffer.releasing = False
    rig.first.detach()
    await until(lambda: held.released)
    assert held.saved == 8
    assert rig.replica.stats.tokens_discarded == 0
    # Of the first event after the push, which holds two tokens, only the last is sure to be of the new version.
    spans = [(span.version.step, span.start, span.end) for delta in held.deltas for span in delta.spans]
    assert spans[0] == (0, 0, 4)
    assert {step for step, start, end in spans if end <= 5} == {0}
    assert {step for step, start, end in spans if start >= 5} == {1}


async def test_an_engine_without_spans_is_stamped_by_arrival(make_rig):
    rig = await make_rig()
    rig.engine.report_versions = False
    rig.engine.limit_tokens = 4
    (held,) = rig.buffer.add_group(PROMPT, 1)
    await until(lambda: held.saved == 4)
    await rig.push(Version(1, 1), mode="RETRACT")
    rig.engine.limit_tokens = None
    await until(lambda: done(held))
    spans = held.sample.segments[0].spans
    assert [(span.version.step, span.start, span.end, span.kv) for span in spans] == [
        (0, 0, 5, sample_pb2.KV_ORIGIN_FRESH),  # an event may hold what was kept back before the push, but for its last
        (1, 5, 10, sample_pb2.KV_ORIGIN_FRESH),
    ]
