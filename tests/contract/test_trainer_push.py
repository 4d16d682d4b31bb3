"""Publication: every engine gets the weights, whatever happens to another one."""

import asyncio
import gc
import subprocess
import sys
from contextlib import asynccontextmanager

import pytest
import torch

from polyhead.v1 import buffer_pb2 as pb
from services.common.errors import FencedError, UnavailableError
from services.common.versions import Version
from services.trainer.weights import publisher as publisher_module
from services.trainer.weights.publisher import Publisher
from tests.kit.trainer_rig import make_config, running_rig, until


def make_weights(value):
    generator = torch.Generator().manual_seed(value)
    # Two buckets of 1 MiB.
    return {name: torch.randn(200_000, generator=generator) for name in ("a", "b")}


def as_bytes(weights):
    return b"".join(tensor.numpy().tobytes() for tensor in weights.values())


def refuse(reason):
    raise UnavailableError(reason, field="engine receiver")


class Push:
    """A publisher in epoch 1 of a buffer with no trainer loop around it."""

    def __init__(self, rig, timeout_s=10.0):
        self.rig = rig
        self.lines = []
        rig.config.trainer.weights.timeout_s = timeout_s
        self.publisher = Publisher(rig.buffer, rig.config, 1, self.lines.append)
        self.failures = []

    async def start(self):
        await self.rig.buffer.acquire_epoch("test")
        await self.rig.buffer.recover(1, 0)
        await self.publisher.start(lambda task: task.cancelled() or self.failures.append(task.exception()))

    async def offer(self, weights):
        """Version e1.s0 each time: the buffer knows no later one without a committed step."""
        snapshot = await self.publisher.take_snapshot(weights)
        snapshot.fill(weights.items())
        await self.publisher.offer(Version(1, 0), snapshot)


@asynccontextmanager
async def pushing(tmp_path, replicas, engines=1, **options):
    config = make_config(tmp_path, tmp_path / "run")
    async with running_rig(config, tmp_path, replicas=replicas, engines=engines, feed=False) as rig:
        push = Push(rig, **options)
        await push.start()
        try:
            yield push
        finally:
            await push.publisher.close()


async def until_listed(rig):
    """Returns when the registry knows every replica."""
    while len(await rig.buffer.list_replicas(pb.ROLE_ROLLOUT)) < len(rig.replicas):
        await asyncio.sleep(0.01)


async def published(rig):
    return (await rig.buffer.get_ledger()).published


async def test_all_replicas_get_the_same_bytes_in_buckets(tmp_path):
    weights = make_weights(0)
    async with pushing(tmp_path, 3) as push:
        await push.offer(weights)
        await push.publisher.wait_published(Version(1, 0))
        assert Version.from_proto(await published(push.rig)) == Version(1, 0)
        await until(lambda: len(push.lines) == 3)
        for engine in push.rig.engines:
            assert engine.received[Version(1, 0)] == as_bytes(weights)
            assert engine.calls.count("LoadBucket") == 2
    assert sorted(line["replica_id"] for line in push.lines) == ["rollout-0", "rollout-1", "rollout-2"]
    assert all(line["bytes"] == 1_600_000 and line["requests_continued"] == 3 for line in push.lines)
    assert all(line["engine"] == 0 for line in push.lines)
    assert all(engine.calls[-1] == "LeaveWeightGroup" for engine in push.rig.engines)


async def test_an_engine_that_stages_gets_its_first_buckets_ahead_of_the_pause(tmp_path):
    weights = make_weights(0)
    async with pushing(tmp_path, 1) as push:
        (engine,) = push.rig.engines
        engine.stages = True
        # Refused once, as when there is no room: nothing has begun, and it is tried again over a new group.
        engine.before["StageUpdate"] = lambda: (engine.before.clear(), refuse("two buckets have no room"))
        await push.offer(weights)
        await asyncio.wait_for(push.publisher.wait_published(Version(1, 0)), 20.0)
        await until(lambda: len(push.lines) == 2)
    assert engine.received[Version(1, 0)] == as_bytes(weights)
    refused, done = push.lines
    assert "two buckets have no room" in refused["error"]
    assert done["ok"]
    assert {"stage_s", "ahead_s", "begin_s", "send_s", "commit_s"} <= done["phases"].keys()
    staged = ["JoinWeightGroup", "StageUpdate"]
    failed = [*staged, "AbortUpdate", "LeaveWeightGroup"]
    assert engine.calls == [*failed, *staged, "BeginUpdate", "LoadStaged", "CommitUpdate", "LeaveWeightGroup"]


async def test_a_replica_that_joins_later_gets_the_present_version(tmp_path):
    async with pushing(tmp_path, 1) as push:
        await push.offer(make_weights(0))
        await push.publisher.wait_published(Version(1, 0))
        await push.rig.add_replica()
        first, late = push.rig.engines
        await until(lambda: late.state == pb.REPLICA_STATE_SERVING)
        assert late.received == first.received
        assert first.calls.count("BeginUpdate") == 1


async def test_without_a_replica_nothing_is_published_until_one_comes(tmp_path):
    async with pushing(tmp_path, 0) as push:
        await push.offer(make_weights(0))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(push.publisher.wait_published(Version(1, 0)), 1.0)
        assert not (await published(push.rig)).epoch
        # Training is not held up by it.
        await asyncio.wait_for(push.offer(make_weights(1)), 20.0)
        replica = await push.rig.add_replica()
        await asyncio.wait_for(push.publisher.wait_published(Version(1, 0)), 20.0)
        assert replica.engines[0].received[Version(1, 0)] == as_bytes(make_weights(1))


@pytest.mark.parametrize(("replicas", "engines"), [(2, 1), (1, 2)])
async def test_an_engine_that_dies_mid_push_delays_nobody_and_is_repaired(tmp_path, replicas, engines):
    async with pushing(tmp_path, replicas, engines) as push:
        victim, other = push.rig.engines
        victim.before["LoadBucket"] = lambda: (victim.kill(), victim.before.clear())
        await push.offer(make_weights(0))
        await asyncio.wait_for(push.publisher.wait_published(Version(1, 0)), 20.0)
        assert other.received[Version(1, 0)] == as_bytes(make_weights(0))
        assert victim.version != Version(1, 0)
        await until(lambda: "AbortUpdate" in victim.calls)
        await victim.start()
        await until(lambda: victim.state == pb.REPLICA_STATE_SERVING)
        assert victim.received == other.received
        assert other.calls.count("BeginUpdate") == 1
    failed = [line for line in push.lines if not line["ok"]]
    assert failed
    assert {(line["replica_id"], line["engine"]) for line in failed} == {("rollout-0", 0)}
    assert "LoadBucket" in failed[0]["error"] or "collective" in failed[0]["error"]


async def test_a_push_refused_before_its_first_byte_is_tried_again(tmp_path):
    async with pushing(tmp_path, 1) as push:
        (engine,) = push.rig.engines

        def refuse():
            engine.before.clear()
            raise UnavailableError("did not become quiet", field="engine")

        engine.before["BeginUpdate"] = refuse
        await push.offer(make_weights(0))
        await asyncio.wait_for(push.publisher.wait_published(Version(1, 0)), 20.0)
    assert [line["ok"] for line in push.lines] == [False, True]
    assert "did not become quiet" in push.lines[0]["error"]
    # A new group: the old one is forgotten at both ends.
    assert engine.calls.count("JoinWeightGroup") == 2


async def test_of_several_refusals_as_superseded_one_ends_the_trainer_and_the_others_are_no_news(tmp_path):
    unheard = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(str(context)))

    async def refused():
        async with pushing(tmp_path, 3) as push:
            await until_listed(push.rig)
            for replica in push.rig.replicas:
                replica.fence = 7
            await push.offer(make_weights(0))
            await until(lambda: push.failures)
        return push.failures

    assert isinstance((await refused())[0], FencedError)
    gc.collect()
    await asyncio.sleep(0)
    assert not unheard


async def test_a_commit_whose_answer_is_lost_is_found_out_and_not_pushed_again(tmp_path):
    async with pushing(tmp_path, 1) as push:
        (replica,), (engine,) = push.rig.replicas, push.rig.engines
        replica.beats = False  # nor does the registry tell

        def lose():
            engine.after.clear()
            raise UnavailableError("the answer is lost")

        engine.after["CommitUpdate"] = lose
        await push.offer(make_weights(0))
        await asyncio.wait_for(push.publisher.wait_published(Version(1, 0)), 20.0)
        assert engine.calls.count("BeginUpdate") == 1
    assert [line["ok"] for line in push.lines] == [False]


async def test_a_replica_that_hangs_holds_up_publication_only_for_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(publisher_module, "STRAGGLER_S", 0.5)
    async with pushing(tmp_path, 2, timeout_s=60.0) as push:
        hung, other = push.rig.engines
        hung.state = pb.REPLICA_STATE_QUARANTINED
        go_on = asyncio.Event()
        hung.before["LoadBucket"] = go_on.wait
        await push.offer(make_weights(0))
        await asyncio.wait_for(push.publisher.wait_published(Version(1, 0)), 20.0)
        assert other.received[Version(1, 0)] == as_bytes(make_weights(0))
        # The next weights are copied into a second snapshot: the first is still being read from.
        await until(lambda: "LoadBucket" in hung.calls)
        await asyncio.wait_for(push.offer(make_weights(1)), 20.0)
        go_on.set()
        await until(lambda: hung.state == pb.REPLICA_STATE_SERVING)
        assert hung.received[Version(1, 0)] == as_bytes(make_weights(0))


async def test_a_push_past_its_deadline_is_aborted_and_tried_again(tmp_path):
    async with pushing(tmp_path, 1, timeout_s=2.0) as push:
        (engine,) = push.rig.engines

        def hang():
            engine.before.clear()
            return asyncio.sleep(60)

        engine.before["LoadBucket"] = hang
        await push.offer(make_weights(0))
        await asyncio.wait_for(push.publisher.wait_published(Version(1, 0)), 30.0)
        assert engine.received[Version(1, 0)] == as_bytes(make_weights(0))
    assert engine.calls.count("AbortUpdate") == 1
    assert [line["ok"] for line in push.lines] == [False, True]
    assert "DEADLINE_EXCEEDED" in push.lines[0]["error"] or "collective" in push.lines[0]["error"]


async def test_a_quarantined_engine_is_repaired(tmp_path):
    async with pushing(tmp_path, 1) as push:
        (engine,) = push.rig.engines
        await push.offer(make_weights(0))
        await push.publisher.wait_published(Version(1, 0))
        engine.received.clear()
        engine.state = pb.REPLICA_STATE_QUARANTINED
        await until(lambda: engine.state == pb.REPLICA_STATE_SERVING)
        assert engine.received[Version(1, 0)] == as_bytes(make_weights(0))


async def test_a_registry_that_lags_behind_causes_no_second_push(tmp_path):
    async with pushing(tmp_path, 1) as push:
        (replica,), (engine,) = push.rig.replicas, push.rig.engines
        await until_listed(push.rig)
        replica.beats = False  # the registry goes on saying JOINING
        await push.offer(make_weights(0))
        await push.publisher.wait_published(Version(1, 0))
        await until(lambda: replica.asked >= 2)
        assert engine.calls.count("BeginUpdate") == 1


async def test_an_engine_that_joins_later_within_a_replica_stops_nobody(tmp_path):
    async with pushing(tmp_path, 1) as push:
        await push.offer(make_weights(0))
        await push.publisher.wait_published(Version(1, 0))
        (first,) = push.rig.engines
        late = await push.rig.replicas[0].add_engine()
        await until(lambda: late.state == pb.REPLICA_STATE_SERVING)
        assert late.received == first.received
        assert first.calls.count("BeginUpdate") == first.calls.count("JoinWeightGroup") == 1
    assert [(line["replica_id"], line["engine"]) for line in push.lines] == [("rollout-0", 0), ("rollout-0", 1)]


async def test_every_rank_of_an_engine_is_in_its_group(tmp_path):
    async with pushing(tmp_path, 0) as push:
        replica = await push.rig.add_replica(engines=2, ranks=2)
        await push.offer(make_weights(0))
        await push.publisher.wait_published(Version(1, 0))
        await until(lambda: all(engine.received for engine in replica.engines))
        assert {engine.received[Version(1, 0)] for engine in replica.engines} == {as_bytes(make_weights(0))}


async def test_a_replica_without_engines_or_on_its_way_out_is_owed_nothing(tmp_path):
    async with pushing(tmp_path, 1) as push:
        nobody = await push.rig.add_replica(engines=0)
        leaving = await push.rig.add_replica()
        leaving.leaving = True
        await until_listed(push.rig)
        await push.offer(make_weights(0))
        await asyncio.wait_for(push.publisher.wait_published(Version(1, 0)), 20.0)
        assert nobody.asked == 0
        assert leaving.engines[0].calls == []


CLIENT = """
import asyncio, sys, torch
from polyhead.v1 import buffer_pb2 as pb, rollout_pb2 as rpb
from services.common.config.models import WeightsConfig
from services.common.errors import UnavailableError
from services.common.versions import Version
from services.trainer.detached import leave
from services.trainer.weights.channel import Channel
from services.trainer.weights.snapshot import Snapshot, build_manifest

async def main():
    replica = pb.Replica(replica_id="r", address=sys.argv[1])
    channel = Channel(replica, 0, 1, WeightsConfig(timeout_s=120.0), rpb.PAUSE_MODE_IN_PLACE)
    try:
        await channel.join(1)
        manifest = build_manifest({"w": torch.zeros(16 << 20)}, 1 << 30)
        await channel.push(Version(1, 0), Snapshot(manifest, torch.device("cpu")))
    except UnavailableError as error:
        await channel.close()
        print("left behind", channel._collective.done())

asyncio.run(main())
leave(5)
"""


@pytest.mark.parametrize("verb", ["JoinWeightGroup", "LoadBucket"])
async def test_a_collective_left_behind_does_not_keep_the_process_from_ending(tmp_path, verb):
    async with pushing(tmp_path, 1) as push:
        (replica,), (engine,) = push.rig.replicas, push.rig.engines

        def refuse():
            raise UnavailableError("no", field="engine")

        engine.before[verb] = refuse
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CLIENT, replica.describe().address, stdout=subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(process.communicate(), 30)
        assert (process.returncode, output) == (5, b"left behind False\n")
