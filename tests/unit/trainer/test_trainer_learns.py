"""The short form of `make learn`: each of its algorithms, with its settings, raises the reward of a bandit's arms.

The policy draws one token after one of four prompts; half of the arms of each pay. What is trained was sampled one step
earlier, by the policy as it was then.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from services.common.config import load
from services.common.versions import Version
from services.trainer.backends.torch import attention
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.batch.samples import TrainSample, decode_groups
from services.trainer.batch.staleness import Clock
from services.trainer.step import train_batch
from tests.bench.learn import ALGORITHMS
from tests.kit.tiny_model import VOCAB_SIZE, build_tiny_qwen3
from tests.kit.trainer_batch import make_group, make_sample

CLOCK = Clock(Version(1, 0), {1: 0})
PROMPTS = ([5, 9, 11], [7, 30, 31], [40, 41, 42], [90, 8, 60])
GROUP, STEPS = 16, 14
# Makes the first policy all but uniform: its mean reward is near 0.25.
PAYS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen3(tmp_path_factory.mktemp("model"), hidden=32, layers=1)


def draw(backend: TorchBackend, rng: np.random.Generator) -> list[TrainSample]:
    """A group of each prompt, with the log-probs of the very policy, and 1 for every arm that pays."""
    backend.model.set_attn_implementation(attention.PLAIN)
    with torch.no_grad():
        logits = backend.model(input_ids=torch.tensor(PROMPTS)).logits[:, -1].double()
    backend.model.set_attn_implementation(attention.NAME)
    logprobs = logits.log_softmax(dim=1).numpy()
    groups, drawn = [], []
    for number, prompt in enumerate(PROMPTS):
        arms = rng.choice(VOCAB_SIZE, GROUP, p=np.exp(logprobs[number]))
        samples = [
            make_sample(rng, sample_id=f"g{number:08d}-{row:03d}", prompt=prompt, completion_length=1)
            for row in range(GROUP)
        ]
        groups.append(make_group(samples, [float(arm % PAYS == number) for arm in arms], order=number))
        drawn += [(int(arm), logprobs[number, arm]) for arm in arms]
    decoded = decode_groups(groups, vocab_size=VOCAB_SIZE)
    return [drawn_instead(sample, *each) for sample, each in zip(decoded, drawn, strict=True)]


def drawn_instead(sample: TrainSample, arm: int, logprob: float) -> TrainSample:
    (segment,) = sample.segments
    tokens = segment.token_ids.copy()
    tokens[-1] = arm
    recorded = np.array([logprob], dtype=np.float32)
    return replace(sample, segments=(replace(segment, token_ids=tokens, rollout_logprobs=recorded),))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_it_learns_which_arms_pay(model: Path, algorithm: str) -> None:
    settings = {key: value for key, value in ALGORITHMS[algorithm].items() if key.startswith("trainer.")}
    settings |= {"rollout.sampling.max_response_len": 1, "trainer.optimizer.lr": 1e-2}
    config = load(None, {"model.hf_checkpoint": str(model), **settings})
    backend, rng = TorchBackend(config), np.random.default_rng(0)
    waiting, rewards = draw(backend, rng), []
    for _ in range(STEPS):
        fresh = draw(backend, rng)
        train_batch(backend, waiting, CLOCK, config)
        rewards.append(float(np.mean([sample.reward for sample in waiting])))
        waiting = fresh
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.3, rewards
