"""A run that trains adapters, from lease to export, and when it may be gone on with."""

import asyncio

import orjson
import pytest
import torch
from transformers import AutoModelForCausalLM

from services.common.errors import ConfigError
from services.common.versions import Version
from services.trainer.checkpoint import CheckpointStore
from tests.kit.tiny_model import build_tiny_qwen3
from tests.kit.trainer_rig import make_config, running_rig, steps_of


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_qwen3(tmp_path_factory.mktemp("model") / "m", hidden=32)


async def test_a_run_pushes_and_exports_the_merged_model_and_saves_adapters(model, tmp_path):
    trainer = {"lora": {"rank": 4}, "optimizer": {"lr": 1e-3}, "algorithm": {"use_kl_loss": True}}
    config = make_config(model, tmp_path / "run", steps=2, trainer=trainer)
    async with running_rig(config, tmp_path) as rig:
        assert await asyncio.wait_for(rig.train(), 60)
        engine = rig.engines[0]
        # Gone on with: what was pushed last is pushed again.
        config.run.num_rollout = 3
        assert await asyncio.wait_for(rig.train(), 60)
        config.trainer.lora.rank = 8
        config.run.num_rollout = 4
        with pytest.raises(ConfigError, match=r"^trainer\.lora\.rank: the run's checkpoints have 4, and this run 8"):
            await asyncio.wait_for(rig.train(), 60)

    def received(version, weights):
        buckets = engine.manifests[version].buckets
        return b"".join(weights[spec.name].numpy().tobytes() for bucket in buckets for spec in bucket.tensors)

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    exported = AutoModelForCausalLM.from_pretrained(config.run.dir / "hf", dtype=torch.float32).state_dict()
    assert engine.received[Version(1, 0)] == received(Version(1, 0), base)
    assert engine.received[Version(2, 2)] == engine.received[Version(1, 2)]
    assert engine.received[Version(2, 3)] == received(Version(2, 3), exported)
    assert len(set(engine.received.values())) == 4

    lines = rig.lines("metrics")
    assert steps_of(lines) == [1, 2, 3]
    assert [line["kl"] == 0 for line in lines] == [True, False, False]
    assert lines[0]["grad_norm"] > 0
    (*_, last) = sorted((config.run.dir / "checkpoints").iterdir())
    assert CheckpointStore(config.run.dir, 2).steps()[-1] == 3
    said = orjson.loads((last / "state.json").read_bytes())
    assert (said["model"], said["lora"]["rank"]) == (str(model.resolve()), 4)
    assert sorted(said["files"]) == [f"{part}-00000.safetensors" for part in ("adapter", "optimizer", "rng")]
