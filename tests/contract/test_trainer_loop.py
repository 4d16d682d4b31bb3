"""The trainer against the real buffer: a whole run, stop and resume, fencing, skipped steps."""

import asyncio
import math
import shutil

import orjson
import pytest
import torch
from safetensors.torch import save_file
from structlog.testing import capture_logs
from transformers import AutoModelForCausalLM

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common.buffer_client import BufferClient
from services.common.errors import FencedError, LimitError, PolyheadError, TrainingDivergedError, UnavailableError
from services.common.versions import Version
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.checkpoint import CheckpointStore
from services.trainer.history import record_fork
from tests.kit.tiny_model import build_tiny_qwen3
from tests.kit.trainer_rig import make_config, running_rig, steps_of, until


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_qwen3(tmp_path_factory.mktemp("model") / "m", hidden=32)


def in_state(ledger, state):
    return sum(row.samples for row in ledger.counts if row.state == state)


async def test_a_run_trains_publishes_saves_and_exports(model, tmp_path):
    config = make_config(model, tmp_path / "run", steps=5)
    async with running_rig(config, tmp_path) as rig:
        await asyncio.wait_for(rig.train(), 60)
        ledger = await rig.buffer.get_ledger()
        engine = rig.engines[0]

    # The engine holds, byte for byte, what the run leaves behind.
    exported = AutoModelForCausalLM.from_pretrained(config.run.dir / "hf", dtype=torch.float32).state_dict()
    last = Version(1, 5)
    expected = b"".join(
        exported[spec.name].numpy().tobytes() for bucket in engine.manifests[last].buckets for spec in bucket.tensors
    )
    assert engine.received[last] == expected
    assert list(engine.received) == [Version(1, step) for step in range(6)]
    assert len(set(engine.received.values())) == 6
    assert engine.calls.count("JoinWeightGroup") == 1

    lines = rig.lines("metrics")
    assert steps_of(lines) == [1, 2, 3, 4, 5]
    assert all(line["samples"] == 8 and line["groups"] == 2 for line in lines)
    assert all(line["staleness_max"] <= 2 for line in lines)
    assert lines[0]["version"] == "e1.s1"
    assert len(rig.lines("samples")) == 10
    pushes = rig.lines("pushes")
    assert [push["version"] for push in pushes] == [f"e1.s{step}" for step in range(6)]
    assert all(push["ok"] and push["pause_s"] == 0.005 and push["requests_aborted"] == 0 for push in pushes)

    assert (ledger.step, ledger.imbalance) == (5, 0)
    assert Version.from_proto(ledger.published) == last
    assert CheckpointStore(config.run.dir, 2).steps() == [4, 5]
    # Checkpoint 4 is the oldest kept: what steps 1 to 4 consumed is retired, step 5 is not.
    assert in_state(ledger, sample_pb2.SAMPLE_STATE_RETIRED) == 32
    assert in_state(ledger, sample_pb2.SAMPLE_STATE_CONSUMED) == 8


async def test_a_stopped_run_goes_on_at_the_next_step(model, tmp_path):
    config = make_config(model, tmp_path / "run", steps=30)
    config.trainer.checkpoint.save_interval = 100
    async with running_rig(config, tmp_path) as rig:
        running = asyncio.create_task(rig.train())
        await until(lambda: rig.status.steps >= 3)
        rig.stop.set()
        assert await asyncio.wait_for(running, 20) is False
        stopped_at = steps_of(rig.lines("metrics"))[-1]
        assert CheckpointStore(config.run.dir, 2).steps() == [stopped_at]
        assert not (config.run.dir / "hf").exists()

        rig.stop.clear()
        assert await asyncio.wait_for(rig.train(), 60) is True
        ledger = await rig.buffer.get_ledger()
    assert steps_of(rig.lines("metrics")) == list(range(1, 31))
    assert (ledger.step, ledger.epoch, ledger.imbalance) == (30, 2, 0)
    # The resumed trainer pushed what it had before it took a batch.
    resumed = [push["version"] for push in rig.lines("pushes") if push["version"].startswith("e2.")]
    assert resumed[0] == f"e2.s{stopped_at}"
    assert (config.run.dir / "hf" / "model.safetensors").exists()


async def test_log_probs_far_from_the_trainers_own_are_warned_of(model, tmp_path):
    config = make_config(model, tmp_path / "run", steps=1)
    async with running_rig(config, tmp_path) as rig:
        with capture_logs() as logs:
            await asyncio.wait_for(rig.train(), 60)
    # Those of the rig's samples are made up.
    (line,) = rig.lines("metrics")
    (warning,) = [log for log in logs if log["event"] == "engines_disagree"]
    assert warning["kl"] == line["mismatch_kl_fresh"] > 0.2
    assert warning["step"] == 1


async def test_a_refused_commit_ends_the_trainer(model, tmp_path, monkeypatch):
    config = make_config(model, tmp_path / "run", steps=50)
    async with running_rig(config, tmp_path) as rig:
        running = asyncio.create_task(rig.train())
        await until(lambda: rig.status.steps >= 1)
        await rig.buffer.acquire_epoch("another trainer")
        with pytest.raises(FencedError) as caught:
            await asyncio.wait_for(running, 20)
        assert caught.value.exit_code == 3
        trained = rig.status.steps
        ledger = await rig.buffer.get_ledger()
    # What was not committed was neither published nor saved.
    assert ledger.step <= trained + 1
    assert max(CheckpointStore(config.run.dir, 2).steps(), default=0) <= ledger.step


async def test_a_replica_of_a_newer_trainer_ends_this_one(model, tmp_path):
    config = make_config(model, tmp_path / "run")
    async with running_rig(config, tmp_path) as rig:
        rig.replicas[0].fence = 7
        with pytest.raises(FencedError):
            await asyncio.wait_for(rig.train(), 20)


async def test_a_step_that_is_not_finite_is_skipped_with_the_weights_unchanged(model, tmp_path, monkeypatch):
    config = make_config(model, tmp_path / "run", steps=3)
    poisoned = poison(monkeypatch, {2})
    async with running_rig(config, tmp_path) as rig:
        await asyncio.wait_for(rig.train(), 60)
        ledger = await rig.buffer.get_ledger()
        received = rig.engines[0].received
    assert poisoned == [2, 2]  # tried once more
    assert received[Version(1, 2)] == received[Version(1, 1)] != received[Version(1, 3)]
    dropped = [row for row in ledger.counts if row.state == sample_pb2.SAMPLE_STATE_DROPPED]
    assert [(row.drop_reason, row.samples) for row in dropped] == [(sample_pb2.DROP_REASON_INVALID, 8)]
    assert (ledger.step, ledger.imbalance) == (3, 0)
    assert rig.lines("metrics")[1]["optimizer_steps_skipped"] == 1


async def test_three_such_steps_in_a_row_end_the_run(model, tmp_path, monkeypatch):
    config = make_config(model, tmp_path / "run", steps=20)
    poison(monkeypatch, {2, 3, 4})
    async with running_rig(config, tmp_path) as rig:
        with pytest.raises(TrainingDivergedError, match="the last is step 4"):
            await asyncio.wait_for(rig.train(), 60)
    assert steps_of(rig.lines("metrics")) == [1, 2, 3, 4]


async def test_samples_over_the_context_of_the_model_are_refused_by_name(tmp_path):
    model = build_tiny_qwen3(tmp_path / "m", hidden=32, max_position_embeddings=4)
    config = make_config(model, tmp_path / "run", steps=20)
    with capture_logs() as logs:
        async with running_rig(config, tmp_path) as rig:
            with pytest.raises(TrainingDivergedError, match="the last is step 3"):
                await asyncio.wait_for(rig.train(), 60)
    refused = [entry for entry in logs if entry["event"] == "batch_unusable"]
    assert len(refused) == 3
    assert all(entry["sample_id"].startswith("g0") for entry in refused)
    assert all("more than the model's context of 4" in entry["reason"] for entry in refused)


def poison(monkeypatch, steps):
    """Gives the batches of these steps an infinite advantage."""
    from services.trainer import loop as loop_module

    poisoned, seen = [], []
    train_batch, train = loop_module.train_batch, TorchBackend.train

    def noted(backend, samples, clock, config):
        seen.append(clock.trained.step + 1)
        return train_batch(backend, samples, clock, config)

    def spoiled(self, micro_batches):
        if seen[-1] in steps:
            poisoned.append(seen[-1])
            for batch in micro_batches:
                batch.advantages[:] = math.inf
        return train(self, micro_batches)

    monkeypatch.setattr(loop_module, "train_batch", noted)
    monkeypatch.setattr(TorchBackend, "train", spoiled)
    return poisoned


async def test_a_stop_is_heard_while_waiting_and_names_what_was_waited_for(model, tmp_path):
    config = make_config(model, tmp_path / "run")
    async with running_rig(config, tmp_path, feed=False) as rig:
        running = asyncio.create_task(rig.train())
        await until(lambda: rig.status.waiting_for is not None and rig.status.waiting_for.stage)
        assert rig.status.phase == "waiting"
        assert rig.status.waiting_for.reason
        rig.stop.set()
        await asyncio.wait_for(running, 5)
    assert CheckpointStore(config.run.dir, 2).steps() == []


async def test_a_finished_run_only_exports_what_is_missing(model, tmp_path):
    config = make_config(model, tmp_path / "run", steps=2)
    async with running_rig(config, tmp_path) as rig:
        await asyncio.wait_for(rig.train(), 60)
        before = (config.run.dir / "hf" / "model.safetensors").read_bytes()
        shutil.rmtree(config.run.dir / "hf")
        await asyncio.wait_for(rig.train(), 20)
    assert (config.run.dir / "hf" / "model.safetensors").read_bytes() == before
    assert steps_of(rig.lines("metrics")) == [1, 2]


async def test_a_finished_run_that_is_extended_exports_again(model, tmp_path):
    config = make_config(model, tmp_path / "run", steps=2)
    async with running_rig(config, tmp_path) as rig:
        await asyncio.wait_for(rig.train(), 60)
        before = (config.run.dir / "hf" / "model.safetensors").read_bytes()
        assert orjson.loads((config.run.dir / "hf" / "polyhead.json").read_bytes()) == {"step": 2, "version": "e1.s2"}
        config.run.num_rollout = 3
        await asyncio.wait_for(rig.train(), 60)
    assert orjson.loads((config.run.dir / "hf" / "polyhead.json").read_bytes()) == {"step": 3, "version": "e2.s3"}
    assert (config.run.dir / "hf" / "model.safetensors").read_bytes() != before


async def test_a_run_goes_on_from_the_checkpoint_of_another(model, tmp_path):
    first = make_config(model, tmp_path / "first", steps=2)
    async with running_rig(first, tmp_path / "a") as rig:
        await asyncio.wait_for(rig.train(), 60)
    saved = CheckpointStore(first.run.dir, 1).load_newest()
    second = make_config(model, tmp_path / "second", steps=3, trainer={"checkpoint": {"load": first.run.dir}})
    async with running_rig(second, tmp_path / "b") as rig:
        await asyncio.wait_for(rig.train(), 60)
        ledger = await rig.buffer.get_ledger()
        assert steps_of(rig.lines("metrics")) == [3]
        # With a checkpoint of its own, that is what it goes on from.
        second.run.num_rollout = 4
        await asyncio.wait_for(rig.train(), 60)
        assert steps_of(rig.lines("metrics")) == [3, 4]
    assert (ledger.epoch, ledger.step) == (saved.state.version.epoch + 1, 3)
    went_on = CheckpointStore(second.run.dir, 1).load_newest().state
    assert (went_on.step, went_on.optimizer_steps) == (4, saved.state.optimizer_steps // 2 * 4)
    assert CheckpointStore(first.run.dir, 1).steps()[-1] == 2


async def test_epochs_go_on_above_those_of_a_lost_store(model, tmp_path):
    config = make_config(model, tmp_path / "run", steps=2)
    async with running_rig(config, tmp_path / "a") as rig:
        await rig.buffer.acquire_epoch("an earlier trainer")
        await asyncio.wait_for(rig.train(), 60)
        assert (await rig.buffer.get_ledger()).epoch == 2
    config.run.num_rollout = 3
    async with running_rig(config, tmp_path / "b") as rig:
        await asyncio.wait_for(rig.train(), 60)
        ledger = await rig.buffer.get_ledger()
    assert (ledger.epoch, ledger.step) == (3, 3)
    # Also when there is no checkpoint yet, only the memory that an epoch began.
    shutil.rmtree(config.run.dir)
    record_fork(config.run.dir, 7, 0)
    async with running_rig(config, tmp_path / "c") as rig:
        await asyncio.wait_for(rig.train(), 60)
        assert (await rig.buffer.get_ledger()).epoch == 8


async def test_a_wanted_checkpoint_is_made_and_frees_what_it_covers(model, tmp_path, monkeypatch):
    config = make_config(model, tmp_path / "run", steps=8)
    config.trainer.checkpoint.save_interval = 100
    commit_step = BufferClient.commit_step

    async def wanting(self, *arguments):
        response = await commit_step(self, *arguments)
        response.checkpoint_wanted = True
        return response

    monkeypatch.setattr(BufferClient, "commit_step", wanting)
    confirmed = spy_on_confirmations(monkeypatch)
    async with running_rig(config, tmp_path) as rig:
        await asyncio.wait_for(rig.train(), 60)
    # Not at every step: the save and the relief of step 5, and the last save, which keeps two.
    assert confirmed == [5, 5, 5]
    assert CheckpointStore(config.run.dir, 2).steps() == [5, 8]


async def test_a_store_without_memory_gets_a_checkpoint_of_the_present_step(model, tmp_path, monkeypatch):
    config = make_config(model, tmp_path / "run", steps=3)
    lease, waits = BufferClient.lease, []

    async def full(self, *arguments, epoch=0, step=0, **settings):
        if step == 3 and len(waits) < 3:
            waits.append(step)
            return pb.LeaseResponse(waiting_for=pb.WaitingFor(reason="store memory"))
        return await lease(self, *arguments, epoch=epoch, step=step, **settings)

    monkeypatch.setattr(BufferClient, "lease", full)
    confirmed = spy_on_confirmations(monkeypatch)
    async with running_rig(config, tmp_path) as rig:
        await asyncio.wait_for(rig.train(), 60)
    assert confirmed == [2, 2, 2]
    assert CheckpointStore(config.run.dir, 2).steps() == [2, 3]


def spy_on_confirmations(monkeypatch):
    confirm, confirmed = BufferClient.confirm_checkpoint, []

    async def noted(self, epoch, oldest_kept_step):
        confirmed.append(oldest_kept_step)
        return await confirm(self, epoch, oldest_kept_step)

    monkeypatch.setattr(BufferClient, "confirm_checkpoint", noted)
    return confirmed


async def test_a_batch_too_big_for_one_message_is_fetched_in_parts(model, tmp_path, monkeypatch):
    config = make_config(model, tmp_path / "run", steps=2)
    lease, fetch, fetched = BufferClient.lease, BufferClient.fetch, []

    async def without_payloads(self, stage, *arguments, **settings):
        if stage == sample_pb2.STAGE_TRAIN:
            settings["include_payload"] = False
        return await lease(self, stage, *arguments, **settings)

    async def at_most_three(self, sample_ids):
        if len(sample_ids) > 3:
            raise LimitError("too many bytes in one answer", field="sample_ids")
        fetched.append(len(sample_ids))
        return await fetch(self, sample_ids)

    monkeypatch.setattr(BufferClient, "lease", without_payloads)
    monkeypatch.setattr(BufferClient, "fetch", at_most_three)
    async with running_rig(config, tmp_path) as rig:
        await asyncio.wait_for(rig.train(), 60)
    assert [line["samples"] for line in rig.lines("metrics")] == [8, 8]
    assert fetched == [2] * 8


async def test_a_buffer_that_refuses_the_lease_for_good_ends_the_run(model, tmp_path, monkeypatch):
    async def refuse(self, *arguments, **settings):
        raise LimitError("a message of 70 MB", field="buffer.limits.message_mb")

    config = make_config(model, tmp_path / "run")
    async with running_rig(config, tmp_path, feed=False) as rig:
        monkeypatch.setattr(BufferClient, "lease", refuse)
        with pytest.raises(LimitError, match="message_mb"):
            await asyncio.wait_for(rig.train(), 20)


async def test_a_buffer_that_is_away_is_reported_as_a_stall_and_not_asked_all_the_time(model, tmp_path, monkeypatch):
    asked = []

    async def away(self, *arguments, **settings):
        asked.append(1)
        raise UnavailableError("full", field="buffer")

    config = make_config(model, tmp_path / "run")
    config.run.stall_limit_s = 0.3
    async with running_rig(config, tmp_path, feed=False) as rig:
        monkeypatch.setattr(BufferClient, "lease", away)
        with capture_logs() as lines:
            running = asyncio.create_task(rig.train())
            await until(lambda: any(line["event"] == "stalled" for line in lines))
            assert rig.status.waiting_for.reason == "the buffer"
            rig.stop.set()
            await asyncio.wait_for(running, 20)
    assert len(asked) <= 4


async def test_a_publish_interval_publishes_every_other_step(model, tmp_path):
    config = make_config(model, tmp_path / "run", steps=5, staleness={"publish_interval": 2})
    async with running_rig(config, tmp_path) as rig:
        await asyncio.wait_for(rig.train(), 60)
    assert [push["version"] for push in rig.lines("pushes")] == ["e1.s0", "e1.s2", "e1.s4", "e1.s5"]
    assert steps_of(rig.lines("metrics")) == [1, 2, 3, 4, 5]


async def test_a_full_disk_costs_a_checkpoint_and_a_run_that_ends_so_says_it(model, tmp_path, monkeypatch):
    written = []

    def write(tensors, path):
        written.append(int(path.parent.name.split("_")[1].split("-")[0]))
        if written[-1] in (4, 7):
            path.write_bytes(b"some of it")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr("services.trainer.shards.save_file", write)
    confirmed = spy_on_confirmations(monkeypatch)
    config = make_config(model, tmp_path / "run", steps=7)
    async with running_rig(config, tmp_path) as rig:
        with (
            capture_logs() as lines,
            pytest.raises(PolyheadError, match=r"run\.dir: the checkpoint of step 7 .* No space left on device"),
        ):
            await asyncio.wait_for(rig.train(), 60)
        assert (await rig.buffer.get_ledger()).step == 7
    assert [line["step"] for line in lines if line["event"] == "checkpoint_not_written"] == [4, 7]
    assert confirmed == [2, 2]
    assert sorted(path.name for path in (config.run.dir / "checkpoints").glob("*step*")) == [
        "step_00000002",
        "step_00000006",
    ]


async def test_a_stop_without_a_buffer_still_saves(model, tmp_path, monkeypatch):
    monkeypatch.setattr("services.trainer.saver.BUFFER_TIMEOUT_S", 0.5)
    config = make_config(model, tmp_path / "run", steps=100_000)
    config.trainer.checkpoint.save_interval = 100_000
    async with running_rig(config, tmp_path) as rig:
        running = asyncio.create_task(rig.train())
        await until(lambda: rig.status.steps >= 2)
        rig.feeding.cancel()
        await until(lambda: rig.status.phase == "waiting" and rig.status.waiting_for is not None)
        await rig.stop_buffer()
        rig.stop.set()
        await asyncio.wait_for(running, 20)
    checkpoint = CheckpointStore(config.run.dir, 2).load_newest()
    assert checkpoint.state.step == rig.status.version.step
    assert checkpoint.state.watermark is None
