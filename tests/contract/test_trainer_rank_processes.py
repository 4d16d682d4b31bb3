"""`python -m services.trainer` for each of two ranks, without a launcher: they end together."""

import asyncio
import os
from contextlib import asynccontextmanager
from functools import partial

import pytest

from services.common.config import dump
from services.common.lifecycle import STOPPED_EARLY
from services.trainer.checkpoint import CheckpointStore
from tests.kit.in_process import free_port
from tests.kit.tiny_model import build_tiny_qwen3
from tests.kit.trainer_rig import make_config, running_rig, steps_of, until
from tests.kit.warm import warm


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_qwen3(tmp_path_factory.mktemp("model") / "m", hidden=32)


@asynccontextmanager
async def ranks(config, directory):
    """Both of them; their logs are in `directory`."""
    path = directory / "run.toml"
    config.trainer.rendezvous = f"127.0.0.1:{free_port()}"
    path.write_text(dump(config))
    processes = []
    for rank in range(2):
        start = partial(warm().start, environment=os.environ, log=directory / f"rank-{rank}.log")
        arguments = ("-c", str(path), "--index", str(rank))
        processes.append(await asyncio.to_thread(start, "services.trainer", *arguments))
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


@pytest.mark.timeout(600)
async def test_they_stop_together_resume_and_fail_together(model, tmp_path):
    config = make_config(model, tmp_path / "run", steps=100_000, trainer={"ranks": 2})
    config.trainer.checkpoint.save_interval = 100_000
    async with running_rig(config, tmp_path) as rig:
        config.buffer.address = rig.address
        async with ranks(config, tmp_path) as (leader, other):
            await until(lambda: len(rig.lines("metrics")) > 2, within_s=240)
            # Alone it is no reason to end.
            other.terminate()
            seen = len(rig.lines("metrics"))
            await until(lambda: len(rig.lines("metrics")) > seen + 2, within_s=60)
            leader.terminate()
            assert await leader.ended(60) == STOPPED_EARLY
            assert await other.ended(30) == 0
        stopped_at = steps_of(rig.lines("metrics"))[-1]
        assert CheckpointStore(config.run.dir, 2).steps() == [stopped_at]

        async with ranks(config, tmp_path) as (leader, other):
            await until(lambda: steps_of(rig.lines("metrics"))[-1] > stopped_at + 2, within_s=240)
            other.kill()
            assert await leader.ended(30) == 1
        ledger = await rig.buffer.get_ledger()
    assert steps_of(rig.lines("metrics"))[: stopped_at + 3] == list(range(1, stopped_at + 4))
    assert ledger.imbalance == 0
    assert "polyhead trainer: trainer.ranks: rank 0 of 2 lost another one: " in (tmp_path / "rank-0.log").read_text()


@pytest.mark.timeout(400)
async def test_the_others_end_when_the_first_is_gone_or_never_comes(model, tmp_path):
    config = make_config(model, tmp_path / "run", steps=100_000, trainer={"ranks": 2, "rank_timeout_s": 60.0})
    async with running_rig(config, tmp_path, feed=False) as rig:
        config.buffer.address = rig.address
        async with ranks(config, tmp_path) as (leader, other):
            await until(lambda: rig.lines("pushes"), within_s=240)
            # It waits for a batch, and the other one for a command.
            leader.kill()
            assert await other.ended(30) == 1
    assert "rank 1 of 2 lost another one: " in (tmp_path / "rank-1.log").read_text()
