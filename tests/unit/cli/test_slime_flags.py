import shlex

import pytest

from services.cli import slime_flags
from services.common.config import load
from services.common.errors import ConfigError

QUICKSTART = """
    --hf-checkpoint /models/tiny --prompt-data prompts.jsonl --input-key prompt --label-key label
    --apply-chat-template --rollout-shuffle --rm-type math --num-rollout 3000 --rollout-batch-size 16
    --n-samples-per-prompt 8 --num-steps-per-rollout 1 --global-batch-size 128 --rollout-max-response-len 8192
    --rollout-temperature 0.8 --rollout-stop-token-ids 1 -2 --rollout-stop "</answer>" 42
    --advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28 --lr 1e-6 --weight-decay 0.1 --adam-beta1 0.9
    --adam-beta2 0.98 --max-tokens-per-gpu 4608 --calculate-per-token-loss
    --dynamic-sampling-filter-path slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std
    --trainer.checkpoint.keep_last=3
"""


def test_quickstart_flags_set_our_keys():
    config = load(None, slime_flags.to_overrides(shlex.split(QUICKSTART)))
    assert str(config.model.hf_checkpoint) == "/models/tiny"
    assert (config.data.input_key, config.data.label_key) == ("prompt", "label")
    assert config.data.apply_chat_template
    assert config.data.shuffle
    assert config.batch.global_batch_size == 128
    assert config.batch.dynamic_sampling_filter == "nonzero_std"
    assert config.rollout.sampling.temperature == 0.8
    assert config.rollout.sampling.stop_token_ids == [1, -2]
    assert config.trainer.algorithm.eps_clip_high == 0.28
    assert config.trainer.algorithm.loss_reduction == "per_token"
    assert config.trainer.optimizer.lr == 1e-6
    assert config.trainer.checkpoint.keep_last == 3
    assert str(config.run.dir) == "runs/tiny"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rollout-batch-sise 4", "did you mean --rollout-batch-size?"),
        ("--num-rollout", "--num-rollout: a value is missing"),
        ("--num-rollout --lr 1", "--num-rollout: a value is missing"),
        ("--dynamic-sampling-filter-path my.filter", "not built in"),
        ("stray", "stray: unknown flag"),
    ],
)
def test_a_wrong_flag_is_named(arguments, message):
    with pytest.raises(ConfigError) as caught:
        slime_flags.to_overrides(arguments.split())
    assert message in str(caught.value)


def test_batch_sizes_that_do_not_fit_show_the_numbers():
    arguments = ["--rollout-batch-size", "16", "--n-samples-per-prompt", "8", "--global-batch-size", "100"]
    with pytest.raises(ConfigError, match=r"16 × 8 = 128 must equal .* 100 × 1 = 100"):
        load(None, slime_flags.to_overrides(arguments))


def test_every_flag_names_a_key_that_exists():
    sections = load(None)
    for flag, key in {**slime_flags.VALUE_FLAGS, **slime_flags.LIST_FLAGS}.items():
        node = sections
        for part in key.split("."):
            assert part in type(node).model_fields, (flag, key)
            node = getattr(node, part)
