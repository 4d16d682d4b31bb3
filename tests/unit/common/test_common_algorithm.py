"""``[trainer.algorithm]``: what a name means, and which combinations are refused, naming the keys."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from services.common.config import dump, load
from services.common.config.algorithm import AlgorithmConfig
from services.common.errors import ConfigError


def algorithm(**keys: object) -> AlgorithmConfig:
    return load(None, {f"trainer.algorithm.{key}": value for key, value in keys.items()}).trainer.algorithm


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("grpo", {"policy_loss": "clip", "normalize_std": True, "loss_reduction": "per_sample"}),
        ("dr_grpo", {"policy_loss": "clip", "normalize_std": False, "loss_reduction": "constant"}),
        ("gspo", {"policy_loss": "gspo", "normalize_std": True}),
        ("cispo", {"policy_loss": "cispo", "normalize_std": True}),
        ("rloo", {"policy_loss": "clip", "normalize_std": False, "normalize_advantages": False}),
        ("reinforce_plus_plus", {"normalize_std": False, "normalize_advantages": True}),
        ("reinforce_plus_plus_baseline", {"normalize_std": False, "normalize_advantages": True}),
        ("ppo", {"policy_loss": "clip", "normalize_std": False, "normalize_advantages": True, "lambd": 1.0}),
    ],
)
def test_a_name_sets_what_is_not_given_and_survives_a_round_trip(
    name: str, meant: dict[str, object], tmp_path: Path
) -> None:
    config = load(None, {"trainer.algorithm.name": name})
    assert meant.items() <= config.trainer.algorithm.model_dump().items()
    path = tmp_path / "run.toml"
    path.write_text(dump(config))
    assert load(path) == config


def test_what_is_given_wins_over_what_the_name_means() -> None:
    assert algorithm(name="dr_grpo", loss_reduction="per_token").loss_reduction == "per_token"
    assert algorithm(name="grpo", policy_loss="gspo").policy_loss == "gspo"


def test_a_weight_without_bound_survives_a_round_trip(tmp_path: Path) -> None:
    keys = {"old_logprobs": "recomputed", "correction.weights": "clip", "correction.high": math.inf}
    path = tmp_path / "run.toml"
    path.write_text(dump(load(None, {f"trainer.algorithm.{key}": value for key, value in keys.items()})))
    assert load(path).trainer.algorithm.correction.high == math.inf


REFUSED = [
    ({"name": "vpg"}, "trainer.algorithm.name: Input should be 'grpo', .* not 'vpg'"),
    ({"name": "ppo", "policy_loss": "gspo"}, "policy_loss = gspo needs one advantage per segment"),
    ({"name": "ppo", "normalize_std": True}, "normalize_std = true is for grpo, gspo, cispo, and name = ppo"),
    ({"name": "ppo", "advantage_function": "my.fn"}, "advantage_function makes the advantages, and name = ppo does"),
    ({"name": "ppo", "lambd": 1.5}, "trainer.algorithm.lambd: .* less than or equal to 1"),
    ({"eps_clip": 0.3, "eps_clip_high": 0.2}, "eps_clip_high = 0.2 must be at least eps_clip = 0.3"),
    ({"eps_clip_c": 1.0}, "trainer.algorithm.eps_clip_c: .* greater than 1, not 1.0"),
    ({"name": "gspo", "policy_loss": "clip"}, "name = gspo needs policy_loss = gspo, not clip"),
    ({"name": "cispo", "policy_loss": "gspo"}, "name = cispo needs policy_loss = cispo, not gspo"),
    ({"name": "reinforce_plus_plus", "policy_loss": "gspo"}, "policy_loss = gspo needs one advantage per segment"),
    ({"name": "cispo", "eps_clip_c": 3.0}, "eps_clip_c is for policy_loss = clip or gspo"),
    ({"name": "dr_grpo", "normalize_std": True}, "normalize_std = true is for grpo, gspo, cispo, and name = dr_grpo"),
    ({"name": "reinforce_plus_plus", "normalize_advantages": False}, "needs normalize_advantages = true"),
    ({"gamma": 0.9}, "gamma = 0.9 is for reinforce_plus_plus, .* and name = grpo"),
    ({"lambd": 0.95}, "lambd = 0.95 is of GAE, which needs a critic: name = ppo, not grpo"),
    ({"kl_loss_coef": 0.1}, "kl_loss_coef = 0.1 needs use_kl_loss = true"),
    ({"kl_coef": 0.1}, "kl_coef = 0.1 is for rloo, .* grpo has its KL in the loss"),
    ({"name": "rloo", "kl_coef": 0.1, "use_kl_loss": True, "kl_loss_coef": 0.1}, "kl_coef and kl_loss_coef"),
    ({"kl_unbiased": True}, "kl_unbiased is of the KL in the loss"),
    ({"use_kl_loss": True, "kl_loss_coef": math.inf}, "must be finite"),
    ({"kl_type": "k4"}, "trainer.algorithm.kl_type: Input should be 'k1'"),
    ({"correction.weights": "clip"}, "correction needs old_logprobs = recomputed"),
    ({"correction.reject": "sequence"}, "correction needs old_logprobs = recomputed"),
    ({"correction.low": 2.0}, "trainer.algorithm.correction: low = 2.0 must be below high = 2.0"),
    ({"correction.reject_low": 3.0}, "reject_low = 3.0 must be below reject_high = 2.0"),
    ({"correction.level": "sequence"}, "level = sequence is of the weights, and weights = none"),
    ({"loss_constant": 100}, "loss_constant is for loss_reduction = constant, not per_sample"),
    ({"advantage_function": "fn"}, "trainer.algorithm.advantage_function: 'fn' is not of the form pkg.mod:fn"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_does_not_fit_together_is_refused_by_name(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        algorithm(**keys)


PPO = {"trainer.algorithm.name": "ppo"}


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"trainer.critic.lr": 1e-5}, "trainer: critic is for algorithm.name = ppo, not grpo"),
        ({"model.critic_checkpoint": "/m"}, "model.critic_checkpoint is for trainer.algorithm.name = ppo, not grpo"),
        ({**PPO, "trainer.critic.only_steps": 100}, "only_steps = 100 leaves none of run.num_rollout = 100 steps"),
        ({**PPO, "trainer.critic.value_clip": 0}, "trainer.critic.value_clip: .* greater than 0"),
        (
            {
                **PPO,
                "trainer.optimizer.lr_decay_style": "linear",
                "trainer.optimizer.min_lr": 1e-7,
                "trainer.critic.lr": 1e-8,
            },
            "trainer.critic does not go with trainer.optimizer: min_lr = 1e-07 is above lr = 1e-08",
        ),
    ],
)
def test_a_critic_that_does_not_fit_is_refused(keys: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load(None, keys)


def test_the_critic_has_the_policys_optimizer_with_a_learning_rate_and_a_warm_up_of_its_own() -> None:
    schedule = {"trainer.optimizer.lr_decay_style": "linear", "trainer.optimizer.warmup_fraction": 0.1}
    config = load(None, {**PPO, **schedule, "trainer.optimizer.lr": 1e-5, "trainer.optimizer.beta1": 0.8})
    own = config.trainer.critic.optimizer(config.trainer.optimizer)
    assert (own.lr, own.warmup_steps, own.warmup_fraction, own.beta1) == (1e-5, 0, None, 0.8)
    config = load(None, {**PPO, **schedule, "trainer.critic.lr": 1e-4, "trainer.critic.warmup_steps": 5})
    own = config.trainer.critic.optimizer(config.trainer.optimizer)
    assert (own.lr, own.warmup_steps, own.lr_decay_style) == (1e-4, 5, "linear")


def test_the_policys_schedule_is_over_the_steps_that_train_it() -> None:
    config = load(None, {**PPO, "trainer.critic.only_steps": 20, "batch.num_steps_per_rollout": 2})
    assert (config.optimizer_steps, config.policy_steps) == (200, 160)
