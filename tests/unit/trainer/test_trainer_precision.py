"""What rounding in bfloat16 does to log-probs, against the same weights in float32."""

import numpy as np
import pytest
import torch

from services.trainer.algorithms.kl import k3
from services.trainer.backends.torch.logprobs import to_device, token_logprobs
from services.trainer.backends.torch.model import load_model
from services.trainer.backends.torch.sharding import Placement
from services.trainer.batch.packing import PackItem, pack
from tests.kit.tiny_model import build_tiny_llama, build_tiny_qwen2, build_tiny_qwen3

CPU = torch.device("cpu")
VOCABULARY, PROMPT = 128, 3


@pytest.fixture(scope="module")
def batch():
    generator = np.random.default_rng(0)
    items = []
    for row, length in enumerate((4, 17, 60, 33)):
        tokens = generator.integers(0, VOCABULARY, length, dtype=np.int32)
        targets = tokens[PROMPT:]
        items.append(
            PackItem(
                token_ids=tokens[:-1],
                prompt_length=PROMPT,
                predict=np.arange(PROMPT - 1, length - 1),
                targets=targets,
                rollout_logprobs=np.zeros(len(targets), dtype=np.float32),
                fresh=np.zeros(len(targets), dtype=np.bool_),
                weight=0.0,
                temperature=1.0,
                sample_row=row,
            )
        )
    return to_device(pack(items), CPU)


@pytest.mark.parametrize("build", [build_tiny_llama, build_tiny_qwen2, build_tiny_qwen3])
def test_a_float32_residual_stream_brings_log_probs_nearer_to_those_of_float32(tmp_path, batch, build):
    directory = build(tmp_path / "model", hidden=128, layers=8)
    exact = load_model(directory, "bfloat16", Placement(CPU)).float()
    with torch.no_grad():
        expected = exact.run(token_logprobs, batch).logprobs
    distance = {}
    for wide in (False, True):
        root = load_model(directory, "bfloat16", Placement(CPU, wide_residuals=wide))
        logprobs = root.run(token_logprobs, batch).logprobs
        distance[wide] = k3(expected, logprobs.detach()).mean().item()
        logprobs.sum().backward()
        for name, parameter in root.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == torch.bfloat16
            assert parameter.grad.isfinite().all()
    assert distance[True] < distance[False]


def test_wide_residuals_change_nothing_in_float32(tmp_path, batch):
    directory = build_tiny_qwen3(tmp_path / "model")
    with torch.no_grad():
        plain, wide = (
            load_model(directory, "float32", Placement(CPU, wide_residuals=wide)).run(token_logprobs, batch).logprobs
            for wide in (False, True)
        )
    assert torch.equal(plain, wide)
