"""A push whose weights arrive ahead of the pause: harmless until the first byte is in the model."""

from __future__ import annotations

import asyncio

import pytest
import torch

from polyhead.v1 import buffer_pb2 as pb
from services.common.errors import InvalidArgumentError, PolyheadError, UnavailableError
from services.common.versions import Version
from services.rollout.layout import ModelLayout
from tests.kit.rollout_rig import FIRST, until
from tests.kit.rollout_staging import SHAPES, SIZE, Staging, plugin, staged_manifest

V1, V2 = Version(1, 1), Version(1, 2)


@pytest.fixture
async def staging(make_rig, tmp_path):
    """One that serves, with requests that go on for as long as it does."""
    rig = await make_rig(sampling={"max_response_len": 40})
    rig.engine.chunk_tokens, rig.engine.delay_s = 1, 0.02
    made = Staging(rig, tmp_path)
    yield made
    made.close()


def pauses(staging):
    return staging.rig.engine.names().count("pause_generation")


def unharmed(staging):
    life = staging.rig.life
    return (life.state, life.version, pauses(staging)) == (pb.REPLICA_STATE_SERVING, FIRST, 0)


@pytest.mark.parametrize("slots", [2, 8])
async def test_what_was_sent_is_what_serves(staging, slots):
    rig = staging.rig
    rig.first.receiver.memory_bytes = slots * SIZE
    for version in (V1, V2):  # copies are recorded by the first, and repeated by the second
        await staging.push(version)
        assert staging.model.bytes_of() == b"".join(staging.sent)
        assert (rig.life.state, rig.life.version) == (pb.REPLICA_STATE_SERVING, version)
        assert rig.engine.version == str(version)
    once = ["pause_generation", "begin_weight_update", "update_weights_from_tensor"]
    assert rig.engine.names() == 2 * [*once, "end_weight_update", "continue_generation"]


async def test_generation_goes_on_until_all_that_is_staged_has_come(staging):
    rig = staging.rig
    await staging.join()
    assert await staging.stage(V1) == 2
    held = rig.buffer.add_group("3+4=", 4)
    begin = asyncio.create_task(staging.begin(V1))
    await until(lambda: rig.replica.stats.tokens_generated >= 8)
    assert not begin.done()
    assert unharmed(staging)
    await staging.send(2)
    await begin
    await asyncio.gather(staging.load(V1), staging.send(2))
    done = await rig.commit(V1)
    assert (done.aborted, pauses(staging)) == (0, 1)
    await until(lambda: all(sample.sample is not None for sample in held))
    assert staging.model.bytes_of() == b"".join(staging.sent)


@pytest.mark.parametrize("asked", [False, True])
async def test_an_abort_ahead_of_the_pause_costs_nothing(staging, asked):
    """Also when the replica waits for the bytes that are staged."""
    await staging.join()
    await staging.stage(V1)
    begin = asyncio.create_task(staging.begin(V1)) if asked else None
    await asyncio.sleep(0)
    abort = asyncio.ensure_future(staging.rig.abort(V1))
    await staging.lose_trainer()  # it gives up
    assert await abort == pb.REPLICA_STATE_SERVING
    if begin is not None:
        with pytest.raises(PolyheadError):
            await begin
    assert unharmed(staging)
    assert staging.rig.engine.calls == []
    await staging.push(V1)
    assert staging.rig.life.version == V1


async def test_a_trainer_that_dies_ahead_of_the_pause_costs_nothing(staging):
    await staging.join()
    await staging.stage(V1)
    await staging.send(1)
    await staging.lose_trainer()
    with pytest.raises(UnavailableError, match="receive"):
        await staging.begin(V1)
    assert unharmed(staging)
    assert staging.rig.engine.calls == []
    await staging.push(V2)
    assert staging.rig.life.version == V2


async def test_silence_after_staging_is_an_abort(staging):
    await staging.join()
    staging.rig.receiver._timeout_s = 0.5
    await staging.stage(V1)
    await until(lambda: staging.rig.receiver._staged is None)
    staging.rig.receiver._timeout_s = 30.0
    assert unharmed(staging)
    await staging.push(V1)
    assert staging.rig.life.version == V1


async def test_a_load_that_breaks_quarantines_until_a_complete_push(staging):
    rig = staging.rig
    rig.first.receiver.memory_bytes = 8 * SIZE  # for all of them
    await staging.join()
    await staging.send(await staging.stage(V1))
    await staging.begin(V1)
    staging.model.fails_at = "w1"
    with pytest.raises(UnavailableError, match="no parameter w1"):
        await staging.load(V1)
    assert (rig.life.state, rig.life.version) == (pb.REPLICA_STATE_QUARANTINED, None)
    assert await rig.abort(V1) == pb.REPLICA_STATE_QUARANTINED
    staging.model.fails_at = None
    await staging.push(V2)
    assert (rig.life.state, rig.life.version) == (pb.REPLICA_STATE_SERVING, V2)
    assert staging.model.bytes_of() == b"".join(staging.sent)


async def test_a_trainer_that_dies_after_the_first_byte_quarantines(staging):
    """Two of four buckets were staged; the others never come."""
    rig = staging.rig
    await staging.join()
    await staging.send(await staging.stage(V1))
    await staging.begin(V1)
    await staging.lose_trainer()
    with pytest.raises(UnavailableError):
        await staging.load(V1)
    assert (rig.life.state, rig.life.version) == (pb.REPLICA_STATE_QUARANTINED, None)
    await staging.push(V2)
    assert (rig.life.state, rig.life.version) == (pb.REPLICA_STATE_SERVING, V2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shapes": SHAPES | {"w1": (7,)}}, r"w1: shape \[7\], the engine's is \[64\]"),
        ({"shapes": {f"layers.{number}": (64,) for number in range(4)}}, "no such parameter"),
        ({"dtype": "float16"}, "w0: dtype float16, the engine's is float32"),
    ],
)
async def test_weights_of_another_model_are_refused_before_anything_is_sent(staging, changes, reason):
    staging.rig.receiver._layout = ModelLayout(SHAPES, "float32")
    await staging.join()
    with pytest.raises(InvalidArgumentError, match=reason):
        await staging.stage(V1, staged_manifest(**changes))
    assert unharmed(staging)
    assert staging.rig.engine.calls == []
    await staging.push(V1)  # over the same layout: the good one is accepted
    assert staging.rig.life.version == V1


@pytest.mark.parametrize("field", ["nccl_version", "nccl_cumem"])
async def test_nccl_that_differs_is_found_before_the_first_collective(staging, monkeypatch, field):
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "0")
    monkeypatch.setattr(plugin.weight_group, "nccl_version", lambda: "2.28.9")
    ours = {"nccl_version": "2.28.9", "nccl_cumem": "0"} | {field: "2.21.5" if field == "nccl_version" else "1"}
    joins = []
    monkeypatch.setattr(staging.inside, "_join", joins.append)
    with pytest.raises(InvalidArgumentError, match=rf"{field}: the trainer has '{ours[field]}', the engine '"):
        await staging.join(backend="nccl", **ours)
    assert joins == []
    assert unharmed(staging)


async def test_without_room_for_two_buckets_a_push_is_refused(staging, monkeypatch):
    await staging.join()
    monkeypatch.setattr(staging.inside, "_device", torch.device("cuda"))
    for name in ("set_device", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: ((1 << 30) + SIZE, 1 << 40))
    with pytest.raises(UnavailableError, match="two buckets of 256 bytes have no room in 256"):
        await staging.stage(V1)
    assert unharmed(staging)
