"""Learning rates by step, against torch's and transformers' schedules, and the values of Megatron's own by hand."""

import itertools
import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from transformers import get_inverse_sqrt_schedule, get_wsd_schedule

from services.common.config import load
from services.common.errors import ConfigError
from services.trainer.schedule import learning_rate

LR, STEPS = 2e-3, 40


def rates(steps=STEPS, **settings):
    overrides = {f"trainer.optimizer.{key}": value for key, value in ({"lr": LR} | settings).items()}
    schedule = learning_rate(load(None, {"run.num_rollout": STEPS, **overrides}))
    return [schedule(step) for step in range(steps + 1)]


def run(make, steps=STEPS):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    schedule = make(optimizer)
    found = []
    for _ in range(steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def warmed_up(optimizer, decay, start=0.0):
    # LinearLR refuses a start of 0.
    rising = LinearLR(optimizer, start_factor=max(start / LR, 1e-12), total_iters=8)
    return SequentialLR(optimizer, [rising, decay(optimizer)], milestones=[8])


def test_constant_stays_after_a_linear_warm_up():
    assert rates(steps=100) == [LR] * 101
    assert rates(steps=4, warmup_steps=3, warmup_init=5e-4) == pytest.approx([5e-4, 1e-3, 1.5e-3, LR, LR])


@pytest.mark.parametrize("warmup", [{"warmup_steps": 8}, {"warmup_fraction": 0.2}])
@pytest.mark.parametrize("start", [0.0, 3e-4])
def test_linear_and_cosine_are_torchs(warmup, start):
    def linear(optimizer):
        return LinearLR(optimizer, start_factor=1.0, end_factor=1e-4 / LR, total_iters=STEPS - 8)

    def cosine(optimizer):
        return CosineAnnealingLR(optimizer, T_max=STEPS - 8, eta_min=1e-4)

    for style, decay in (("linear", linear), ("cosine", cosine)):
        mine = rates(lr_decay_style=style, min_lr=1e-4, warmup_init=start, **warmup)
        assert mine == pytest.approx(run(lambda optimizer, decay=decay: warmed_up(optimizer, decay, start)), abs=1e-9)


@pytest.mark.parametrize("style", ["linear", "cosine", "inverse-square-root"])
def test_after_the_decay_it_is_the_lowest(style):
    mine = rates(steps=60, lr_decay_style=style, min_lr=1e-5, decay_steps=20)
    assert mine[21:] == [1e-5] * 40
    assert mine[0] == LR
    assert all(later <= earlier for earlier, later in itertools.pairwise(mine))


def test_inverse_square_root_is_transformers():
    mine = rates(lr_decay_style="inverse-square-root", warmup_steps=9)
    wanted = run(lambda optimizer: get_inverse_sqrt_schedule(optimizer, num_warmup_steps=9))
    assert mine == pytest.approx(wanted)
    assert rates(lr_decay_style="inverse-square-root", min_lr=1e-3)[5:] == [1e-3] * 36


@pytest.mark.parametrize(("style", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("minus_sqrt", "1-sqrt")])
def test_wsd_is_transformers(style, theirs):
    settings = {"lr_decay_style": "WSD", "wsd_decay_steps": 12, "wsd_decay_style": style}
    mine = rates(warmup_steps=6, min_lr=2e-4, **settings)
    wanted = run(
        lambda optimizer: get_wsd_schedule(
            optimizer,
            num_warmup_steps=6,
            num_training_steps=STEPS,
            num_decay_steps=12,
            min_lr_ratio=0.1,
            decay_type=theirs,
        )
    )
    # Its warm-up begins at min_lr_ratio, Megatron's at warmup_init.
    assert mine[6:] == pytest.approx(wanted[6:])


def test_wsd_falls_exponentially_by_default():
    mine = rates(lr_decay_style="WSD", wsd_decay_steps=4)
    wanted = [2 * math.exp(-math.log(2) * quarter / 4) - 1 for quarter in range(5)]
    assert mine[36:] == pytest.approx([LR * share for share in wanted], abs=1e-12)


def test_the_decay_is_over_all_optimizer_steps_of_the_run():
    overrides = {
        "run.num_rollout": 10,
        "batch.rollout_batch_size": 8,
        "batch.num_steps_per_rollout": 4,
        "trainer.optimizer.lr_decay_style": "linear",
    }
    schedule = learning_rate(load(None, overrides))
    assert schedule(20) == pytest.approx(schedule(0) / 2)
    assert schedule(40) == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 3, "warmup_fraction": 0.1}, "trainer.optimizer: warmup_steps and warmup_fraction: give one"),
        ({"min_lr": 1e-4}, "min_lr = 0.0001 is for an lr_decay_style that decays"),
        ({"min_lr": 1.0, "lr_decay_style": "linear"}, "min_lr = 1 is above lr = 0.002"),
        ({"warmup_init": 1.0}, "warmup_init = 1 is above lr"),
        ({"lr_decay_style": "WSD"}, "lr_decay_style = WSD and wsd_decay_steps: give both"),
        ({"wsd_decay_steps": 3}, "lr_decay_style = WSD and wsd_decay_steps: give both"),
        ({"lr_decay_style": "WSD", "wsd_decay_steps": 41}, "wsd_decay_steps = 41 is more than the 40 steps"),
        ({"lr_decay_style": "cosine", "warmup_steps": 40}, "a warm-up of 40 steps leaves nothing of 40"),
        ({"name": "sgd"}, "trainer.optimizer.name"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        rates(**settings)
