"""The push as the replica sees it: in order, fenced, and harmless when it breaks."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import rollout_pb2, sample_pb2
from services.common.errors import FencedError, InvalidArgumentError, PreconditionError, UnavailableError
from services.common.versions import Version
from services.rollout.layout import ModelLayout
from tests.kit.rollout_rig import GROUP, until

PROMPT = "3+4="
V1, V2 = Version(1, 1), Version(1, 2)


async def generating(rig, tokens: int = 4, samples: int = 4):
    """Samples that have `tokens` tokens and wait for more."""
    rig.engine.limit_tokens = tokens
    held = rig.buffer.add_group(PROMPT, samples)
    await until(lambda: rig.replica.stats.tokens_generated == tokens * samples)
    return held


def done(*held) -> bool:
    return all(sample.sample is not None for sample in held)


def spans_of(held):
    return [(Version.from_proto(span.version), span.start, span.end, span.kv) for span in held.sample.segments[0].spans]


async def test_a_joining_replica_serves_after_its_first_complete_push(make_rig):
    rig = await make_rig(serving=False)
    held = rig.buffer.add_group(PROMPT, 4)
    await rig.begin(V1)
    assert rig.life.state == pb.REPLICA_STATE_SYNCING
    await rig.load(V1, 0)
    await rig.load(V1, 1)
    assert rig.life.state == pb.REPLICA_STATE_SYNCING
    assert not rig.engine.requests
    await rig.commit(V1)
    assert (rig.life.state, rig.life.version) == (pb.REPLICA_STATE_SERVING, V1)
    await until(lambda: done(*held))
    assert rig.engine.requests[0]["extra_key"] == "e1.s1"
    order = [name for name in rig.engine.names() if name != "abort_request"]
    assert order == [
        "init_weights_update_group",
        "pause_generation",
        "begin_weight_update",
        "update_weights_from_distributed",
        "update_weights_from_distributed",
        "end_weight_update",
        "continue_generation",
    ]
    updates = [body for name, body in rig.engine.calls if name == "update_weights_from_distributed"]
    assert [body["weight_version"] for body in updates] == [None, "e1.s1"]
    assert [body["names"] for body in updates] == [["w0"], ["w1"]]
    assert all(body["load_format"] == "flattened_bucket" and not body["flush_cache"] for body in updates)


@pytest.mark.parametrize(
    ("mode", "kv"), [("IN_PLACE", sample_pb2.KV_ORIGIN_CARRIED), ("RETRACT", sample_pb2.KV_ORIGIN_FRESH)]
)
async def test_requests_continue_over_a_push_with_two_spans(make_rig, mode, kv):
    rig = await make_rig()
    held = await generating(rig)
    assert await rig.begin(V1, mode=mode) == 4
    await rig.load(V1, 0)
    await rig.load(V1, 1)
    done_push = await rig.commit(V1)
    assert (done_push.continued, done_push.aborted) == (4, 0)
    assert done_push.pause_s > 0
    rig.engine.limit_tokens = None
    await until(lambda: done(*held))
    fresh = sample_pb2.KV_ORIGIN_FRESH
    assert all(spans_of(sample) == [(Version(1, 0), 0, 4, fresh), (V1, 4, 10, kv)] for sample in held)
    # Fresh means that the prompt's KV of the old version is not found in the cache either.
    flushed = [body["flush_cache"] for name, body in rig.engine.calls if name == "update_weights_from_distributed"]
    assert flushed == [False, mode == "RETRACT"]
    assert len(rig.engine.requests) == 1
    await until(lambda: rig.replica.stats.multi_span_samples == 4)
    assert rig.replica.stats.requests_aborted == 0
    assert rig.replica.stats.pushes == 1


@pytest.mark.parametrize(
    ("prefix_cache", "kv"), [(True, sample_pb2.KV_ORIGIN_CARRIED), (False, sample_pb2.KV_ORIGIN_FRESH)]
)
async def test_an_engine_that_would_die_of_a_flush_is_asked_for_none(make_rig, prefix_cache, kv):
    """SGLang 0.5.16 ends when it is to flush while retracted requests wait: their prompts' KV is the old version's."""
    rig = await make_rig()
    rig.first.info = replace(rig.first.info, name="sglang/0.5.16", prefix_cache=prefix_cache)
    held = await generating(rig)
    await rig.begin(V1, mode="RETRACT")
    await rig.load(V1, 0)
    await rig.load(V1, 1)
    await rig.commit(V1)
    rig.engine.limit_tokens = None
    await until(lambda: done(*held))
    assert [spans_of(sample)[1] for sample in held] == [(V1, 4, 10, kv)] * 4
    updates = [body for name, body in rig.engine.calls if name == "update_weights_from_distributed"]
    assert not any(body["flush_cache"] for body in updates)


async def test_requests_ended_by_a_push_are_resumed_from_the_record(make_rig):
    rig = await make_rig()
    held = await generating(rig)
    await rig.begin(V1, mode="ABORT")
    await rig.load(V1, 0)
    await rig.load(V1, 1)
    done_push = await rig.commit(V1)
    assert (done_push.continued, done_push.aborted) == (0, 4)
    rig.engine.limit_tokens = None
    await until(lambda: done(*held))
    fresh = sample_pb2.KV_ORIGIN_FRESH
    assert [spans_of(sample) for sample in held] == [[(Version(1, 0), 0, 4, fresh), (V1, 4, 10, fresh)]] * 4
    assert [request["extra_key"] for request in rig.engine.requests] == ["e1.s0", "e1.s1"]


async def test_new_requests_are_held_back_during_a_push(make_rig):
    rig = await make_rig()
    await until(lambda: rig.buffer.count("Lease") == 1)  # the poll that is under way may still bring samples
    await rig.begin(V1)
    held = rig.buffer.add_group(PROMPT, 4)
    await until(lambda: rig.worker.holding == 4)
    await asyncio.sleep(0.05)
    assert not rig.engine.requests
    await rig.load(V1, 0)
    await rig.load(V1, 1)
    await rig.commit(V1)
    await until(lambda: done(*held))
    assert rig.engine.requests[0]["extra_key"] == "e1.s1"


async def test_aborted_before_the_first_byte_the_old_version_serves_on(make_rig):
    rig = await make_rig()
    held = await generating(rig)
    await rig.begin(V1)
    assert await rig.abort(V1) == pb.REPLICA_STATE_SERVING
    assert rig.life.version == Version(1, 0)
    rig.engine.limit_tokens = None
    await until(lambda: done(*held))
    assert spans_of(held[0]) == [(Version(1, 0), 0, 10, sample_pb2.KV_ORIGIN_FRESH)]
    assert rig.engine.paused is None
    await rig.push(V1)  # the next attempt goes through
    assert rig.life.version == V1


async def test_aborted_after_the_first_byte_the_replica_is_quarantined(make_rig):
    rig = await make_rig(save_interval_s=60.0)
    rig.buffer.releasing = False
    held = await generating(rig)
    await rig.begin(V1)
    await rig.load(V1, 0)
    assert await rig.abort(V1) == pb.REPLICA_STATE_QUARANTINED
    assert rig.life.version is None
    await until(lambda: all(sample.released is not None for sample in held))
    assert {sample.released.reason for sample in held} == {pb.RELEASE_REASON_UNAVAILABLE}
    assert [sample.saved for sample in held] == [4] * 4
    assert rig.engine.paused == "in_place"

    rig.engine.limit_tokens = None
    rig.buffer.releasing = True
    with pytest.raises(PreconditionError, match="group_name"):
        await rig.receiver.begin(
            rollout_pb2.BeginUpdateRequest(epoch=1, version=V2.to_proto(), group_name=GROUP, pause_mode=1)
        )
    await rig.push(V2)  # repaired by a complete push, after joining anew
    assert (rig.life.state, rig.life.version) == (pb.REPLICA_STATE_SERVING, V2)
    await until(lambda: rig.replica.stats.samples_completed == 4)


async def test_a_bucket_that_fails_quarantines_without_an_abort(make_rig):
    rig = await make_rig()
    await rig.begin(V1)
    await rig.load(V1, 0)
    rig.engine.fail_update = "connection reset"
    with pytest.raises(UnavailableError, match=r"bucket 1: was not loaded: .*connection reset"):
        await rig.load(V1, 1)
    assert rig.life.state == pb.REPLICA_STATE_QUARANTINED
    assert await rig.abort(V1) == pb.REPLICA_STATE_QUARANTINED


async def test_a_first_bucket_refused_before_any_byte_does_no_harm(make_rig):
    rig = await make_rig()
    await rig.begin(V1)
    rig.engine.fail_update, rig.engine.fail_update_touched = "unknown tensor", False
    with pytest.raises(UnavailableError):
        await rig.load(V1, 0)
    assert await rig.abort(V1) == pb.REPLICA_STATE_SERVING
    assert rig.life.version == Version(1, 0)


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ({"w0": (2,), "w1": (3,)}, r"w1: shape \[2\], the engine's is \[3\]"),
        ({"embed": (2,), "head": (2,)}, "w0: the engine's model has no such parameter"),
        ({"w0": (2,), "w1": (2,), "w2": (2,)}, "w2: not sent"),
        ("bfloat16", "w0: dtype float32, the engine's is bfloat16"),
    ],
)
async def test_weights_of_another_model_are_refused_before_the_pause(make_rig, layout, reason):
    rig = await make_rig()
    named = layout if isinstance(layout, dict) else {"w0": (2,), "w1": (2,)}
    rig.receiver._layout = ModelLayout(named, layout if isinstance(layout, str) else "float32")
    with pytest.raises(InvalidArgumentError, match=reason):
        await rig.begin(V1)
    assert (rig.life.state, rig.life.version) == (pb.REPLICA_STATE_SERVING, Version(1, 0))
    assert rig.engine.names().count("pause_generation") == 0


async def test_an_abort_interrupts_a_bucket_on_its_way(make_rig):
    rig = await make_rig()
    await rig.begin(V1)
    rig.engine.hang_update = True
    load = asyncio.create_task(rig.load(V1, 0))
    await until(lambda: "update_weights_from_distributed" in rig.engine.names())
    assert await rig.abort(V1) == pb.REPLICA_STATE_QUARANTINED
    with pytest.raises(UnavailableError):
        await load
    assert rig.first.suspect.is_set()


async def test_silence_ends_an_update(make_rig):
    rig = await make_rig()
    await rig.begin(V1)
    await until(lambda: rig.life.may_generate)
    assert rig.life.version == Version(1, 0)
    with pytest.raises(PreconditionError, match="no update is running"):
        await rig.load(V1, 0)
    await rig.begin(V1)
    await rig.load(V1, 0)
    await until(lambda: rig.life.state == pb.REPLICA_STATE_QUARANTINED)


async def test_an_older_epoch_is_fenced_and_a_newer_one_takes_over(make_rig):
    rig = await make_rig()
    await rig.begin(V1)
    newer = Version(2, 1)
    await rig.begin(newer)
    with pytest.raises(FencedError):
        await rig.load(V1, 0)
    with pytest.raises(FencedError):
        await rig.commit(V1)
    with pytest.raises(FencedError):
        await rig.abort(V1)
    with pytest.raises(FencedError):
        await rig.join(1)
    await rig.load(newer, 0)
    await rig.load(newer, 1)
    await rig.commit(newer)
    assert rig.life.version == newer


async def test_calls_out_of_order_are_refused(make_rig):
    rig = await make_rig()
    with pytest.raises(PreconditionError, match="not joined"):
        await rig.receiver.begin(
            rollout_pb2.BeginUpdateRequest(epoch=1, version=V1.to_proto(), group_name="other", pause_mode=1)
        )
    with pytest.raises(PreconditionError, match=r"e1\.s0 is not newer"):
        await rig.begin(Version(1, 0))
    with pytest.raises(InvalidArgumentError, match="later epoch"):
        await rig.receiver.begin(rollout_pb2.BeginUpdateRequest(epoch=1, version=Version(2, 1).to_proto()))
    await rig.begin(V1)
    with pytest.raises(PreconditionError, match="bucket 0 is next, not 1"):
        await rig.load(V1, 1)
    with pytest.raises(PreconditionError, match="2 buckets were not loaded"):
        await rig.commit(V1)
    with pytest.raises(PreconditionError, match=r"e1\.s1 is running"):
        await rig.load(V2, 0)
    await rig.load(V1, 0)
    await rig.load(V1, 1)
    first = await rig.commit(V1)
    assert await rig.commit(V1) == first


async def test_an_engine_that_does_not_pause_serves_on(make_rig):
    rig = await make_rig()
    rig.engine.fail_pause = True
    with pytest.raises(UnavailableError, match="did not become quiet"):
        await rig.begin(V1)
    assert rig.life.may_generate


async def test_an_engine_lost_in_mid_push_leaves_nothing_behind(make_rig):
    rig = await make_rig()
    await rig.begin(V1)
    client, info = rig.first.client, rig.first.info
    rig.first.detach()
    with pytest.raises(PreconditionError, match="no update is running"):
        await rig.load(V1, 0)
    rig.first.attach(client, info)
    assert rig.life.state == pb.REPLICA_STATE_JOINING
    await rig.push(V1)
    assert rig.life.version == V1


async def test_a_version_is_loaded_from_a_directory(make_rig, tiny_model, tmp_path):
    rig = await make_rig(serving=False)
    held = rig.buffer.add_group(PROMPT, 2)
    request = rollout_pb2.LoadVersionRequest(epoch=1, version=V1.to_proto(), directory=str(tmp_path))
    with pytest.raises(InvalidArgumentError, match="no safetensors"):
        await rig.receiver.load_version(request)
    assert rig.life.state == pb.REPLICA_STATE_JOINING
    request.directory = str(tiny_model)
    await rig.receiver.load_version(request)
    await until(lambda: done(*held))
    assert rig.engine.version == "e1.s1"
    rig.engine.fail_update = "disk"
    request.version.step = 2
    with pytest.raises(UnavailableError, match="disk"):
        await rig.receiver.load_version(request)
    assert rig.life.state == pb.REPLICA_STATE_QUARANTINED
