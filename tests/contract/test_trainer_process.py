"""`python -m services.trainer`: its RPCs, its registration, its exit statuses."""

import asyncio
import os
from functools import partial

import pytest

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import trainer_pb2 as tpb
from polyhead.v1 import trainer_pb2_grpc
from services.common import rpc
from services.common.config import dump
from services.common.lifecycle import STOPPED_EARLY
from services.trainer.checkpoint import CheckpointStore
from tests.kit.tiny_model import build_tiny_qwen3
from tests.kit.trainer_rig import make_config, running_rig, until
from tests.kit.warm import warm


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_qwen3(tmp_path_factory.mktemp("model") / "m", hidden=32)


async def start(config, directory):
    path = directory / "run.toml"
    path.write_text(dump(config))
    start = partial(warm().start, environment=os.environ, log=directory / "trainer.log")
    return await asyncio.to_thread(start, "services.trainer", "-c", str(path))


async def registered(rig):
    """The trainer in the registry, once it is there."""
    async with asyncio.timeout(30):
        while not (listed := await rig.buffer.list_replicas(pb.ROLE_TRAINER)):
            await asyncio.sleep(0.05)
    return listed[0]


async def test_it_answers_registers_and_stops_with_a_checkpoint(model, tmp_path):
    config = make_config(model, tmp_path / "run", steps=100_000)
    config.trainer.checkpoint.save_interval = 100_000
    async with running_rig(config, tmp_path) as rig:
        config.buffer.address = rig.address
        config.buffer.replica_ttl_s = 1.0
        process = await start(config, tmp_path)
        replica = await registered(rig)
        assert replica.pid == process.pid
        async with rpc.channel(replica.address) as channel:
            stub = trainer_pb2_grpc.TrainerServiceStub(channel)
            await until(lambda: len(rig.lines("metrics")) > 2, within_s=60)
            status = await stub.GetStatus(tpb.TrainerServiceGetStatusRequest(), timeout=5)
            assert status.version.step > 0
            assert status.phase in ("waiting", "training", "committing", "publishing", "saving")
            assert status.metrics["samples"] == 8.0
            await asyncio.sleep(0.5)
            stats = (await registered(rig)).stats
            assert 0 < stats["busy_seconds"] < stats["uptime_seconds"]
            assert stats["wait_seconds"] > 0
            assert stats["steps"] > 0
            await stub.Stop(tpb.StopRequest(), timeout=5)
        assert await process.ended(30) == STOPPED_EARLY
        steps = [line["step"] for line in rig.lines("metrics")]
        assert CheckpointStore(config.run.dir, 2).steps() == [steps[-1]]
        assert (await rig.buffer.get_ledger()).step == steps[-1]


async def test_sigterm_is_an_orderly_end_and_being_superseded_is_status_3(model, tmp_path):
    config = make_config(model, tmp_path / "run", steps=100_000)
    async with running_rig(config, tmp_path) as rig:
        config.buffer.address = rig.address
        process = await start(config, tmp_path)
        await until(lambda: len(rig.lines("metrics")) > 2, within_s=60)
        process.terminate()
        assert await process.ended(30) == STOPPED_EARLY
        last = rig.lines("metrics")[-1]["step"]
        assert CheckpointStore(config.run.dir, 2).steps()[-1] == last

        process = await start(config, tmp_path)
        await until(lambda: rig.lines("metrics")[-1]["step"] > last + 2, within_s=60)
        await rig.buffer.acquire_epoch("another trainer")
        assert await process.ended(30) == 3
        # One line names the reason; no stack trace.
        log = (tmp_path / "trainer.log").read_text()
        assert log.splitlines()[-1].startswith("polyhead trainer: ")
        assert "Traceback" not in log


async def test_only_a_complete_run_is_status_0(model, tmp_path):
    config = make_config(model, tmp_path / "run", steps=2)
    async with running_rig(config, tmp_path) as rig:
        config.buffer.address = rig.address
        process = await start(config, tmp_path)
        assert await process.ended(60) == 0
        assert (await rig.buffer.get_ledger()).step == 2
    assert (config.run.dir / "hf" / "model.safetensors").exists()


async def test_a_missing_model_is_one_line_and_nothing_is_written(model, tmp_path):
    config = make_config(tmp_path / "nowhere", tmp_path / "run")
    process = await start(config, tmp_path)
    assert await process.ended(30) == 2
    last = (tmp_path / "trainer.log").read_text().splitlines()[-1]
    assert last == f"polyhead trainer: model.hf_checkpoint: {tmp_path / 'nowhere'} is not a directory"
    assert not (tmp_path / "run").exists()
