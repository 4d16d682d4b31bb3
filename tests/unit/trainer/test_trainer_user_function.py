"""A user's advantage function: what it gets, what becomes of its result, and how its mistakes are told."""

import numpy as np
import pytest

from services.common.config import Config
from services.common.errors import ConfigError
from services.common.versions import Version
from services.trainer.algorithms.user_function import load_advantage_function
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.backends.torch.results import StepResult
from services.trainer.batch.staleness import Clock
from services.trainer.step import train_batch
from tests.kit import advantage_functions
from tests.kit.tiny_model import build_tiny_qwen3
from tests.kit.trainer_ragged import ragged_samples

CLOCK = Clock(Version(1, 0), {1: 0})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_qwen3(tmp_path_factory.mktemp("models") / "m")


def configured(model, function, **algorithm):
    path = f"tests.kit.advantage_functions:{function}"
    return Config(model={"hf_checkpoint": model}, trainer={"algorithm": {"advantage_function": path, **algorithm}})


def trained_advantages(config, samples, monkeypatch):
    """By sample, what the loss gets."""
    seen = []

    def train(self, micro_batches):
        seen.extend(micro_batches)
        return StepResult(applied=True)

    monkeypatch.setattr(TorchBackend, "train", train)
    train_batch(TorchBackend(config), samples, CLOCK, config)
    rows = np.concatenate([batch.sample_rows for batch in seen])
    return rows, np.concatenate([batch.advantages for batch in seen])


def test_it_gets_the_batch_under_slimes_names_and_its_advantages_are_trained(model, monkeypatch):
    samples = ragged_samples(0, segments=True)
    advantage_functions.SEEN.clear()
    rows, advantages = trained_advantages(configured(model, "centred", kl_coef=0.1), samples, monkeypatch)
    rewards = [sample.reward for sample in samples for _ in sample.segments]
    expected = [sample.reward - np.mean(rewards) for sample in samples]
    # The reference is the model itself, and old log-probs those recorded: the KL is not 0.
    ((args, data),) = advantage_functions.SEEN
    assert args.kl_coef == 0.1
    assert (advantages != np.array(expected, dtype=np.float32)[rows]).any()
    segments = [(sample, segment) for sample in samples for segment in sample.segments]
    assert data["response_lengths"] == [segment.completion_length for _, segment in segments]
    assert data["raw_reward"] == rewards
    assert data["group_ids"] == [sample.group_id for sample, _ in segments]
    for number, (_, segment) in enumerate(segments):
        mask = segment.loss_mask
        assert data["tokens"][number].tolist() == segment.token_ids.tolist()
        assert data["loss_masks"][number].tolist() == mask.tolist()
        np.testing.assert_array_equal(data["rollout_log_probs"][number], segment.rollout_logprobs * mask)
        wanted = (data["log_probs"][number] - data["ref_log_probs"][number]).numpy() * mask
        np.testing.assert_allclose(data["kl"][number], wanted, atol=1e-5)


def test_what_it_returns_counts_too_and_is_whitened_where_that_is_wanted(model, monkeypatch):
    samples = ragged_samples(0, segments=True)
    _, plain = trained_advantages(configured(model, "returned"), samples, monkeypatch)
    places = [np.flatnonzero(segment.loss_mask) for sample in samples for segment in sample.segments]
    assert sorted(plain.tolist()) == sorted(np.concatenate(places).tolist())
    _, white = trained_advantages(configured(model, "returned", normalize_advantages=True), samples, monkeypatch)
    np.testing.assert_allclose(white, (plain - plain.mean()) / plain.std(ddof=1), atol=1e-5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("forgetful", "failed: KeyError: 'advantages'"),
        ("short", "did not give one advantage for each completion token"),
        ("endless", "gave an advantage that is not finite to g0-0"),
    ],
)
def test_its_mistakes_are_named(model, function, message):
    config = configured(model, function)
    with pytest.raises(ConfigError, match=rf"trainer\.algorithm\.advantage_function: {message}"):
        train_batch(TorchBackend(config), ragged_samples(0), CLOCK, config)


def test_one_that_is_not_there_is_refused_before_anything_is_loaded(model):
    with pytest.raises(ConfigError, match=r"trainer\.algorithm\.advantage_function: .* has no function 'nonesuch'"):
        load_advantage_function(configured(model, "nonesuch"))
