"""Versions that go to the engines by way of a directory."""

import asyncio

import pytest
import torch
from safetensors.torch import load_file

from polyhead.v1 import buffer_pb2 as pb
from services.common.versions import Version
from services.trainer.weights.directory import VersionDirectories, write_version
from services.trainer.weights.publisher import Publisher
from services.trainer.weights.snapshot import Snapshot, build_manifest
from tests.kit.tiny_model import build_tiny_qwen3
from tests.kit.trainer_rig import make_config, running_rig, until

CPU = torch.device("cpu")


def make_weights(value):
    generator = torch.Generator().manual_seed(value)
    return {
        "a": torch.randn(200_000, generator=generator),
        "b": torch.randn(300, 300, generator=generator).bfloat16(),
        "c": torch.randn(130, 5, generator=generator).to(torch.float8_e4m3fn),
    }


def as_bytes(weights):
    return b"".join(tensor.flatten().view(torch.uint8).numpy().tobytes() for tensor in weights.values())


def make_snapshot(weights, bucket_bytes=1 << 20):
    snapshot = Snapshot(build_manifest(weights, bucket_bytes), CPU)
    snapshot.fill(weights.items())
    return snapshot


@pytest.mark.parametrize("bucket_bytes", [1, 1 << 30])
def test_a_version_is_a_directory_that_others_read(tmp_path, bucket_bytes):
    model, weights = build_tiny_qwen3(tmp_path / "model"), make_weights(0)
    write_version(tmp_path / "e1.s0", make_snapshot(weights, bucket_bytes), model)
    files = sorted((tmp_path / "e1.s0").glob("*.safetensors"))
    assert len(files) == (3 if bucket_bytes == 1 else 1)
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert read.keys() == weights.keys()
    for name, tensor in weights.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name].view(torch.uint8), tensor.view(torch.uint8))
    # It is a model's directory: what stands beside the weights comes along, and nothing of the old weights.
    assert (tmp_path / "e1.s0" / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert (tmp_path / "e1.s0" / "tokenizer.json").exists()
    assert not (tmp_path / "e1.s0" / "model.safetensors").exists()


async def test_a_version_is_written_once_and_goes_when_nobody_loads_it_and_newer_ones_stay(tmp_path):
    model, snapshot = build_tiny_qwen3(tmp_path / "model"), make_snapshot(make_weights(0))
    (tmp_path / "weights" / ".tmp-e1.s9-1").mkdir(parents=True)
    directories = VersionDirectories(tmp_path / "weights", model, keep_last=2)
    assert not list((tmp_path / "weights").iterdir())

    def there():
        return sorted(path.name for path in (tmp_path / "weights").iterdir())

    first = directories.start(Version(1, 8), snapshot)
    assert directories.start(Version(1, 8), snapshot) is first
    await first
    await directories.release(Version(1, 8))
    for version in (Version(1, 9), Version(1, 10), Version(2, 9)):
        await directories.start(version, snapshot)
        await directories.release(version)
    assert there() == ["e1.s10", "e1.s8", "e2.s9"]  # the straggler's, and the two newest
    await directories.release(Version(1, 8))
    assert there() == ["e1.s10", "e2.s9"]


class Push:
    def __init__(self, rig):
        self.rig, self.lines, self.failures = rig, [], []
        rig.config.trainer.weights.backend = "disk"
        self.root = rig.config.run.dir / "weights"
        self.publisher = Publisher(rig.buffer, rig.config, 1, self.lines.append)

    async def __aenter__(self):
        await self.rig.buffer.acquire_epoch("test")
        await self.rig.buffer.recover(1, 0)
        await self.publisher.start(lambda task: task.cancelled() or self.failures.append(task.exception()))
        return self

    async def __aexit__(self, *exc):
        await self.publisher.close()

    async def offer(self, weights):
        snapshot = await self.publisher.take_snapshot(weights)
        snapshot.fill(weights.items())
        await self.publisher.offer(Version(1, 0), snapshot)


def rig_of(tmp_path, replicas, engines=1):
    model = build_tiny_qwen3(tmp_path / "model")
    config = make_config(model, tmp_path / "run")
    return running_rig(config, tmp_path, replicas=replicas, engines=engines, feed=False)


async def test_every_engine_loads_what_was_written_and_so_does_one_that_joins_later(tmp_path):
    weights = make_weights(0)
    async with rig_of(tmp_path, 2) as rig, Push(rig) as push:
        await push.offer(weights)
        await asyncio.wait_for(push.publisher.wait_published(Version(1, 0)), 20.0)
        await until(lambda: len(push.lines) == 2)
        await rig.add_replica()
        late = rig.engines[-1]
        await until(lambda: late.state == pb.REPLICA_STATE_SERVING)
        assert [path.name for path in push.root.iterdir()] == ["e1.s0"]
        for engine in rig.engines:
            assert engine.received[Version(1, 0)] == as_bytes(weights)
            assert set(engine.calls) == {"LoadVersion"}
    for line in push.lines:
        assert (line["ok"], line["transport"], line["bytes"]) == (True, "disk", len(as_bytes(weights)))
        assert {"prepare_s", "write_s", "load_version_s"} <= line["phases"].keys()
        assert line["gb_per_s"] > 0


async def test_a_disk_that_refuses_is_tried_again_and_costs_no_engine_anything(tmp_path):
    async with rig_of(tmp_path, 1) as rig, Push(rig) as push:
        push.root.parent.mkdir(exist_ok=True)
        push.root.write_text("in the way")
        await push.offer(make_weights(0))
        await until(lambda: push.lines)
        assert "trainer.weights.directory: cannot be written" in push.lines[0]["error"]
        assert rig.engines[0].calls == []
        push.root.unlink()
        await asyncio.wait_for(push.publisher.wait_published(Version(1, 0)), 20.0)
        assert rig.engines[0].received[Version(1, 0)] == as_bytes(make_weights(0))
