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
    --advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28 --optimizer adam --lr 1e-6
    --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9
    --adam-beta2 0.98 --use-dynamic-batch-size --max-tokens-per-gpu 4608 --balance-data
    --calculate-per-token-loss
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


def test_checkpoints_have_slimes_flags():
    flags = "--load runs/a --save runs/a --save-interval 20 --ref-load m"
    config = load(None, slime_flags.to_overrides(flags.split()))
    checkpoint = config.trainer.checkpoint
    assert (str(config.run.dir), str(checkpoint.load), checkpoint.save_interval) == ("runs/a", "runs/a", 20)
    assert str(config.model.ref_checkpoint) == "m"


def test_losses_and_distillation_have_slimes_flags():
    flags = "--loss-type sft_loss --use-opd --opd-type megatron --opd-teacher-load /models/t --opd-kl-coef 0.5"
    config = load(None, slime_flags.to_overrides(flags.split()))
    algorithm = config.trainer.algorithm
    assert (algorithm.policy_loss, algorithm.use_opd, algorithm.opd_kl_coef) == ("sft", True, 0.5)
    assert str(config.model.teacher_checkpoint) == "/models/t"
    flags = "--loss-type=custom_loss --custom-loss-function-path a.b:c"
    algorithm = load(None, slime_flags.to_overrides(flags.split())).trainer.algorithm
    assert (algorithm.policy_loss, algorithm.loss_function) == ("custom", "a.b:c")
    flags = "--advantage-estimator gspo --loss-type policy_loss --custom-pg-loss-reducer-function-path a.b.c"
    algorithm = load(None, slime_flags.to_overrides(flags.split())).trainer.algorithm
    assert (algorithm.policy_loss, algorithm.loss_reducer_function) == ("gspo", "a.b.c")


@pytest.mark.parametrize("flags", ["--loss-type mse", "--use-opd --opd-type sglang"])
def test_other_losses_and_teachers_are_refused(flags):
    with pytest.raises(ConfigError, match="is none of"):
        slime_flags.to_overrides(flags.split())


def test_megatrons_schedule_flags_are_taken():
    flags = """--lr 1e-5 --lr-decay-style WSD --min-lr 1e-6 --lr-decay-iters 90 --lr-warmup-fraction 0.1
        --lr-warmup-init 1e-7 --lr-wsd-decay-iters 20 --lr-wsd-decay-style minus_sqrt --adam-eps 1e-6 --clip-grad 0.0"""
    optimizer = load(None, slime_flags.to_overrides(flags.split())).trainer.optimizer
    assert (optimizer.lr_decay_style, optimizer.wsd_decay_style) == ("WSD", "minus_sqrt")
    assert (optimizer.decay_steps, optimizer.warmup_fraction, optimizer.wsd_decay_steps) == (90, 0.1, 20)
    assert (optimizer.min_lr, optimizer.warmup_init, optimizer.eps, optimizer.clip_grad) == (1e-6, 1e-7, 1e-6, 0.0)


@pytest.mark.parametrize("name", ["dapo", "boxed_math", "random", "f1", "pkg.mod:fn"])
def test_scorers_and_the_key_of_their_reward(name):
    config = load(None, slime_flags.to_overrides(["--rm-type", name, "--reward-key=score"]))
    assert (config.reward.scorer, config.reward.reward_key) == (name, "score")


@pytest.mark.parametrize(
    ("flags", "fixed"),
    [
        ("--max-tokens-per-gpu 4608", None),
        ("--use-dynamic-batch-size --max-tokens-per-gpu 4608", None),
        ("--micro-batch-size 4", 4),
        ("--micro-batch-size 4 --use-dynamic-batch-size", None),
        ("--trainer.use_dynamic_batch_size=false", 1),
        ("--balance-data --trainer.use_dynamic_batch_size=false --micro-batch-size 2", 2),
    ],
)
def test_micro_batches_are_of_tokens_or_of_samples(flags, fixed):
    trainer = load(None, slime_flags.to_overrides(flags.split())).trainer
    assert trainer.fixed_micro_batch_size == fixed
    assert trainer.balance_data == ("--balance-data" in flags)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rollout-batch-sise 4", "did you mean --rollout-batch-size?"),
        ("--num-rollout", "--num-rollout: a value is missing"),
        ("--num-rollout --lr 1", "--num-rollout: a value is missing"),
        ("stray", "stray: unknown flag"),
    ],
)
def test_a_wrong_flag_is_named(arguments, message):
    with pytest.raises(ConfigError) as caught:
        slime_flags.to_overrides(arguments.split())
    assert message in str(caught.value)


def test_slimes_remote_rm_is_the_remote_scorer():
    arguments = "--rm-type remote_rm --rm-url http://10.0.0.7:8000/score"
    reward = load(None, slime_flags.to_overrides(arguments.split())).reward
    assert (reward.scorer, reward.remote.kind, reward.remote.urls) == ("remote", "http", ["http://10.0.0.7:8000/score"])
    with pytest.raises(ConfigError, match=r"needs remote\.urls"):
        load(None, slime_flags.to_overrides(["--rm-type=remote_rm"]))


ENGINES = """
    --rollout-num-gpus 8 --rollout-num-gpus-per-engine 2 --sglang-mem-fraction-static 0.8 --sglang-enable-metrics
    --sglang-cuda-graph-bs 1 2 4 --sglang-attention-backend=fa3 --sglang-server-concurrency 64
    --router-policy round_robin --router-cache-threshold 0.5 --sglang-router-request-timeout-secs 600
"""


def test_engine_flags_are_handed_through():
    rollout = load(None, slime_flags.to_overrides(shlex.split(ENGINES))).rollout
    assert (rollout.engines, rollout.engine.gpus, rollout.max_inflight) == (4, 2, 256)
    assert (rollout.engine.kind, rollout.engine.device) == ("sglang", "cuda")
    assert rollout.engine.args == {
        "mem-fraction-static": 0.8,
        "enable-metrics": True,
        "cuda-graph-bs": [1, 2, 4],
        "attention-backend": "fa3",
    }
    assert rollout.router.policy == "round_robin"
    assert rollout.router.args == {"cache-threshold": 0.5, "request-timeout-secs": 600}


def test_what_is_said_in_our_own_words_wins_over_what_slime_implies():
    arguments = "--rollout-num-gpus 4 --rollout.engine.device cpu --rollout.engine.kind torch --rollout.replicas 2"
    rollout = load(None, slime_flags.to_overrides(arguments.split())).rollout
    assert (rollout.engine.kind, rollout.engine.device, rollout.engines) == ("torch", "cpu", 2)


def test_without_engine_flags_the_engine_is_the_in_house_one():
    assert load(None, slime_flags.to_overrides(["--router-policy", "random"])).rollout.engine.kind == "torch"


def test_external_engines_become_addresses():
    arguments = "--rollout-external-engine-addrs 10.0.0.1:30000 https://b:1"
    engine = load(None, slime_flags.to_overrides(arguments.split())).rollout.engine
    assert (engine.kind, engine.external) == ("sglang", ["http://10.0.0.1:30000", "https://b:1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rollout-num-gpus 8 --rollout-num-gpus-per-engine 3", "--rollout-num-gpus: 8 GPUs .* 3 GPUs per engine"),
        ("--rollout-num-gpus many", "--rollout-num-gpus: 'many' is not a number"),
        ("--rollout-num-gpus", "--rollout-num-gpus: a value is missing"),
        ("--sglang-router-ip 10.0.0.1", "--sglang-router-ip: a router is started .* --rollout-external-engine-addrs"),
        ("--sglang-router-port 3000", "--sglang-router-port: a router is started"),
        ("--sglang- 1", "--sglang-: unknown flag"),
        ("--rollout-num-gpu 4", "did you mean --rollout-num-gpus?"),
    ],
)
def test_an_engine_flag_that_cannot_be_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        slime_flags.to_overrides(arguments.split())


def test_every_flag_is_described():
    described = slime_flags.describe()
    for flag in ("--sglang-FLAG", "--router-FLAG", "--rollout-num-gpus ", "--rollout-external-engine-addrs"):
        assert flag in described


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


def test_filters_of_the_users_own_keep_their_path():
    def configured(path):
        arguments = ["--dynamic-sampling-filter-path", path]
        return load(None, slime_flags.to_overrides(arguments)).batch

    assert configured("my.filters.keep").user_filter == "my.filters.keep"
    fallback = "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std_with_fallback"
    assert configured(fallback).dynamic_sampling_filter == "nonzero_std_with_fallback"
    with pytest.raises(ConfigError, match="unknown filter 'nonzero': known are none, nonzero_std"):
        configured("nonzero")


def test_partial_rollout_is_how_it_is_and_its_mask_is_a_setting():
    staleness = load(None, slime_flags.to_overrides(["--partial-rollout"])).staleness
    assert (staleness.partial_rollout, staleness.mask_offpolicy) == (True, False)
    assert load(None, slime_flags.to_overrides(["--mask-offpolicy-in-partial-rollout"])).staleness.mask_offpolicy
    with pytest.raises(ConfigError, match="partial_rollout"):
        load(None, {"staleness.partial_rollout": False})


ALGORITHM = """
    --advantage-estimator reinforce_plus_plus --gamma 0.99 --lambd 1.0 --normalize-advantages --kl-coef 0.01
    --eps-clip 0.2 --eps-clip-high 0.28 --eps-clip-c 3 --entropy-coef 0.001 --use-tis --tis-clip 5 --tis-clip-low 0.1
    --kl-loss-coef 0.00 --kl-loss-type low_var_kl --ref-load /models/first
    --custom-advantage-function-path my.module.advantages
"""


def test_flags_of_the_algorithm_set_our_keys():
    config = load(None, slime_flags.to_overrides(shlex.split(ALGORITHM)))
    algorithm = config.trainer.algorithm
    assert (algorithm.name, algorithm.gamma, algorithm.normalize_advantages) == ("reinforce_plus_plus", 0.99, True)
    assert (algorithm.eps_clip, algorithm.eps_clip_high, algorithm.eps_clip_c) == (0.2, 0.28, 3.0)
    assert (algorithm.kl_coef, algorithm.kl_type, algorithm.entropy_coef) == (0.01, "low_var_kl", 0.001)
    correction = algorithm.correction
    assert (correction.weights, correction.low, correction.high) == ("clip", 0.1, 5.0)
    assert (algorithm.old_logprobs, algorithm.advantage_function) == ("recomputed", "my.module.advantages")
    assert str(config.model.ref_checkpoint) == "/models/first"


def test_flags_of_the_critic_set_our_keys():
    arguments = """--advantage-estimator ppo --critic-load /models/critic --critic-lr 1e-5 --critic-lr-warmup-iters 3
        --num-critic-only-steps 2 --value-clip 0.3 --gamma 0.99 --lambd 0.95 --kl-coef 0.01"""
    config = load(None, slime_flags.to_overrides(arguments.split()))
    algorithm, critic = config.trainer.algorithm, config.trainer.critic
    assert (algorithm.name, algorithm.gamma, algorithm.lambd, algorithm.kl_coef) == ("ppo", 0.99, 0.95, 0.01)
    assert (critic.lr, critic.warmup_steps, critic.only_steps, critic.value_clip) == (1e-5, 3, 2, 0.3)
    assert str(config.model.critic_checkpoint) == "/models/critic"


def test_flags_of_the_kl_in_the_loss_and_of_grpo_set_our_keys():
    arguments = """--advantage-estimator grpo --use-kl-loss --kl-loss-coef 0.01 --kl-loss-type k3 --use-unbiased-kl
        --disable-grpo-std-normalization"""
    algorithm = load(None, slime_flags.to_overrides(arguments.split())).trainer.algorithm
    assert (algorithm.use_kl_loss, algorithm.kl_loss_coef, algorithm.kl_type) == (True, 0.01, "k3")
    assert (algorithm.kl_unbiased, algorithm.normalize_std, algorithm.old_logprobs) == (True, False, "rollout")


def test_the_quickstarts_grpo_arguments_are_taken_unchanged():
    arguments = """--advantage-estimator grpo --use-kl-loss --kl-loss-coef 0.00 --kl-loss-type low_var_kl
        --entropy-coef 0.00 --eps-clip 0.2 --eps-clip-high 0.28"""
    algorithm = load(None, slime_flags.to_overrides(arguments.split())).trainer.algorithm
    assert (algorithm.needs_reference, algorithm.kl_loss_coef, algorithm.kl_type) == (True, 0.0, "low_var_kl")


def test_tis_and_rollout_logprobs_exclude_each_other():
    with pytest.raises(ConfigError, match="correction needs old_logprobs = recomputed"):
        load(None, slime_flags.to_overrides(["--use-tis", "--use-rollout-logprobs"]))


def test_rewards_of_whole_groups():
    reward = load(None, slime_flags.to_overrides(["--custom-rm-path", "pkg.mod.fn", "--group-rm"])).reward
    assert (reward.scorer, reward.group_rm) == ("pkg.mod.fn", True)
    with pytest.raises(ConfigError, match="group_rm needs a function of yours as scorer"):
        load(None, slime_flags.to_overrides(["--rm-type", "math", "--group-rm"]))


def test_the_trainers_ranks_are_the_product_of_nodes_and_gpus():
    flags = "--actor-num-nodes 2 --actor-num-gpus-per-node=4 --recompute-granularity full --recompute-num-layers 1"
    config = load(None, slime_flags.to_overrides(shlex.split(flags)))
    assert (config.trainer.ranks, config.trainer.recompute, config.trainer.recompute_layers) == (8, True, None)
    with pytest.raises(ConfigError, match="--actor-num-nodes: 'two' is not a number"):
        slime_flags.to_overrides(["--actor-num-nodes", "two"])


@pytest.mark.parametrize(("method", "layers"), [("block", 4), ("uniform", None)])
def test_the_layers_that_are_recomputed(method, layers):
    flags = f"--recompute-num-layers 4 --recompute-granularity full --recompute-method {method}"
    trainer = load(None, slime_flags.to_overrides(shlex.split(flags))).trainer
    assert (trainer.recompute, trainer.recompute_layers) == (True, layers)


def test_offload_needs_a_gpu():
    with pytest.raises(ConfigError, match='offload needs device = "cuda"'):
        load(None, slime_flags.to_overrides(["--optimizer-cpu-offload"]))
    flags = ["--optimizer-cpu-offload", "--trainer.device", "cuda"]
    assert load(None, slime_flags.to_overrides(flags)).trainer.offload
