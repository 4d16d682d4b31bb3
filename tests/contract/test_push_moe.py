"""A mixture of experts that was trained, pushed to engines that compute with it."""

import os

import pytest
import torch

from services.common.config import Config
from services.common.versions import Version
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.batch.staleness import Clock
from services.trainer.step import train_batch
from services.trainer.weights.form import EngineForm
from services.trainer.weights.snapshot import Snapshot, build_manifest
from tests.kit.engine_process import SGLANG_WANTED, generate_body, logprobs_of
from tests.kit.hf_reference import load_reference, teacher_forced
from tests.kit.pushed_engine import checksums, push, replica_of
from tests.kit.tiny_model import build_tiny_mixtral, build_tiny_qwen3_moe
from tests.kit.trainer_ragged import ragged_samples

PROMPT = [7, 9, 11, 40, 41]


def trained(model, exported):
    """What is pushed after a step, which is exported too."""
    config = Config(model={"hf_checkpoint": model}, trainer={"optimizer": {"lr": 1e-3, "weight_decay": 0.1}})
    backend = TorchBackend(config)
    (result,) = train_batch(backend, ragged_samples(0), Clock(Version(1, 0), {1: 0}), config)
    assert result.applied
    form = EngineForm.of_directory(model)
    # One expert's projections are in several buckets.
    snapshot = Snapshot(build_manifest(backend.layout, 5_000, form), torch.device("cpu"), form)
    snapshot.fill(backend.tensors())
    exported.mkdir()
    backend.save_pretrained(exported)
    return snapshot


async def logprob_error(client, directory):
    """Of what the engine samples, against transformers on the weights of `directory`: the largest."""
    # The key keeps it from the KV cache of other weights, as a replica does.
    body = generate_body(PROMPT, max_new_tokens=24, ignore_eos=True, extra_key=directory.name)
    async with client._session.post(client.url + "/generate", json=body) as response:
        assert response.status == 200
        answer = await response.json()
    expected = teacher_forced(load_reference(directory, torch.float64), PROMPT, answer["output_ids"])
    return max(abs(a - b) for a, b in zip(logprobs_of(answer), expected, strict=True))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kind", "build"),
    [
        pytest.param("torch", build_tiny_qwen3_moe, id="torch", marks=pytest.mark.long),
        pytest.param("sglang", build_tiny_qwen3_moe, id="sglang"),
        pytest.param("sglang", build_tiny_mixtral, id="sglang, other names"),
    ],
)
async def test_an_engine_computes_with_what_was_pushed(kind, build, tmp_path):
    if kind == "sglang" and not os.environ.get(SGLANG_WANTED):
        pytest.skip("make conformance")
    model, exported = build(tmp_path / "model"), tmp_path / "exported"
    snapshot = trained(model, exported)
    async with replica_of(kind, model, tmp_path, "float32") as (address, client):
        before = await checksums(client)
        assert await logprob_error(client, model) < 1e-4
        (after,) = await push("gloo", address, model, [snapshot], tmp_path / "versions", client, first=1)
        assert before.keys() == after.keys()
        assert {name for name in before if before[name] == after[name]} == set()
        assert await logprob_error(client, exported) < 1e-4
        await client.update_from_disk(str(exported), version="e1.s9", timeout_s=60.0)
        assert await checksums(client) == after
