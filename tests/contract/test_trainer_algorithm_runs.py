"""Algorithms in a real run: leased over gRPC, trained, committed, and told in metrics.jsonl."""

import asyncio
import math

import pytest
import torch
from safetensors import safe_open

from services.common.errors import ConfigError
from tests.kit.tiny_model import build_tiny_qwen3
from tests.kit.trainer_rig import make_config, running_rig, steps_of


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_qwen3(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


RUNS = {
    "dr_grpo": ({"name": "dr_grpo"}, set()),
    "gspo-decoupled": (
        {"name": "gspo", "old_logprobs": "recomputed", "correction": {"weights": "clip", "high": math.inf}},
        {"correction_weight_mean", "correction_weight_max", "correction_clip_fraction"},
    ),
    "cispo-kl": ({"name": "cispo", "use_kl_loss": True, "kl_loss_coef": 0.01, "kl_type": "low_var_kl"}, {"kl"}),
    "reinforce_plus_plus": ({"name": "reinforce_plus_plus", "kl_coef": 0.01, "gamma": 0.99}, {"kl"}),
    "ppo": (
        {"name": "ppo", "kl_coef": 0.01, "gamma": 0.99, "lambd": 0.95},
        {"kl", "value_loss", "value_clip_fraction", "explained_variance", "value_mean", "return_mean", "critic_lr"},
    ),
    "users": ({"advantage_function": "tests.kit.advantage_functions.centred", "entropy_coef": 0.01}, set()),
}


@pytest.mark.parametrize("name", RUNS)
async def test_a_run_with_it_trains_and_reports(model, tmp_path, name):
    algorithm, figures = RUNS[name]
    batch = {"num_steps_per_rollout": 2}
    config = make_config(model, tmp_path / "run", steps=3, batch=batch, trainer={"algorithm": algorithm})
    async with running_rig(config, tmp_path) as rig:
        await asyncio.wait_for(rig.train(), 60)
    lines = rig.lines("metrics")
    assert steps_of(lines) == [1, 2, 3]
    for line in lines:
        assert figures | {"ratio_max", "clip_fraction_low", "clip_fraction_high"} <= line.keys()
        assert line["optimizer_steps_skipped"] == 0
        assert math.isfinite(line["loss"])


async def test_steps_of_the_critic_alone_are_steps_of_the_run(model, tmp_path):
    trainer = {"algorithm": {"name": "ppo"}, "critic": {"only_steps": 2}, "checkpoint": {"export_hf": True}}
    config = make_config(model, tmp_path / "run", steps=3, trainer=trainer)
    async with running_rig(config, tmp_path) as rig:
        await asyncio.wait_for(rig.train(), 60)
    lines = rig.lines("metrics")
    assert [(line["version"].partition(".")[2], line["critic_only"]) for line in lines] == [
        ("s1", True),
        ("s2", True),
        ("s3", False),
    ]
    assert [line["grad_norm"] > 0.0 for line in lines] == [False, False, True]
    assert all(line["optimizer_steps_skipped"] == 0 and line["critic_grad_norm"] > 0.0 for line in lines)
    with safe_open(tmp_path / "run" / "hf" / "model.safetensors", "pt") as exported:
        assert not [name for name in exported.keys() if "value_head" in name]  # noqa: SIM118 (no mapping)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_00000003")
    assert (checkpoint / "critic-00000.safetensors").exists()
    assert (checkpoint / "critic_optimizer-00000.safetensors").exists()


async def test_a_function_that_fails_ends_the_run_with_its_name(model, tmp_path):
    algorithm = {"advantage_function": "tests.kit.advantage_functions.short"}
    config = make_config(model, tmp_path / "run", trainer={"algorithm": algorithm})
    async with running_rig(config, tmp_path) as rig:
        with pytest.raises(ConfigError, match=r"trainer\.algorithm\.advantage_function: did not give"):
            await asyncio.wait_for(rig.train(), 60)
