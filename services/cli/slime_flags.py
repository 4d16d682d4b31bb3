"""slime's command-line flags, as keys of our configuration."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.cli import slime_engine_flags
from services.common.config import parse_overrides
from services.common.errors import ConfigError

LOSS = "trainer.algorithm.policy_loss"
TIS = "trainer.algorithm.correction.weights"

# flag -> key. A flag that takes a value.
VALUE_FLAGS: dict[str, str] = {
    "--hf-checkpoint": "model.hf_checkpoint",
    "--prompt-data": "data.prompt_data",
    "--input-key": "data.input_key",
    "--label-key": "data.label_key",
    "--metadata-key": "data.metadata_key",
    "--tool-key": "data.tool_key",
    "--apply-chat-template-kwargs": "data.chat_template_kwargs",
    "--rollout-seed": "data.seed",
    "--seed": "run.seed",
    "--num-rollout": "run.num_rollout",
    "--run-dir": "run.dir",
    "--rollout-batch-size": "batch.rollout_batch_size",
    "--n-samples-per-prompt": "batch.n_samples_per_prompt",
    "--global-batch-size": "batch.global_batch_size",
    "--num-steps-per-rollout": "batch.num_steps_per_rollout",
    "--over-sampling-batch-size": "batch.over_sampling_batch_size",
    "--max-staleness": "staleness.max_staleness",
    "--update-weights-interval": "staleness.publish_interval",
    "--rollout-max-response-len": "rollout.sampling.max_response_len",
    "--rollout-max-prompt-len": "rollout.sampling.max_prompt_len",
    "--rollout-max-context-len": "rollout.engine.context_length",
    "--rollout-temperature": "rollout.sampling.temperature",
    "--rollout-top-p": "rollout.sampling.top_p",
    "--rollout-top-k": "rollout.sampling.top_k",
    "--custom-rm-path": "reward.scorer",
    "--reward-key": "reward.reward_key",
    "--rm-url": "reward.remote.urls",
    "--buffer-filter-path": "reward.buffer_filter",
    "--ref-load": "model.ref_checkpoint",
    "--advantage-estimator": "trainer.algorithm.name",
    "--custom-advantage-function-path": "trainer.algorithm.advantage_function",
    "--custom-loss-function-path": "trainer.algorithm.loss_function",
    "--custom-pg-loss-reducer-function-path": "trainer.algorithm.loss_reducer_function",
    "--critic-load": "model.critic_checkpoint",
    "--critic-lr": "trainer.critic.lr",
    "--critic-lr-warmup-iters": "trainer.critic.warmup_steps",
    "--num-critic-only-steps": "trainer.critic.only_steps",
    "--value-clip": "trainer.critic.value_clip",
    "--opd-teacher-load": "model.teacher_checkpoint",
    "--opd-kl-coef": "trainer.algorithm.opd_kl_coef",
    "--gamma": "trainer.algorithm.gamma",
    "--lambd": "trainer.algorithm.lambd",
    "--eps-clip": "trainer.algorithm.eps_clip",
    "--eps-clip-high": "trainer.algorithm.eps_clip_high",
    "--eps-clip-c": "trainer.algorithm.eps_clip_c",
    "--tis-clip": "trainer.algorithm.correction.high",
    "--tis-clip-low": "trainer.algorithm.correction.low",
    "--kl-loss-coef": "trainer.algorithm.kl_loss_coef",
    "--kl-loss-type": "trainer.algorithm.kl_type",
    "--kl-coef": "trainer.algorithm.kl_coef",
    "--entropy-coef": "trainer.algorithm.entropy_coef",
    "--moe-aux-loss-coeff": "trainer.algorithm.router_aux_loss_coef",
    "--context-parallel-size": "trainer.context_parallel",
    "--max-tokens-per-gpu": "trainer.max_tokens_per_gpu",
    "--micro-batch-size": "trainer.micro_batch_size",
    "--optimizer": "trainer.optimizer.name",
    "--lr": "trainer.optimizer.lr",
    "--lr-decay-style": "trainer.optimizer.lr_decay_style",
    "--min-lr": "trainer.optimizer.min_lr",
    "--lr-decay-iters": "trainer.optimizer.decay_steps",
    "--lr-warmup-iters": "trainer.optimizer.warmup_steps",
    "--lr-warmup-fraction": "trainer.optimizer.warmup_fraction",
    "--lr-warmup-init": "trainer.optimizer.warmup_init",
    "--lr-wsd-decay-iters": "trainer.optimizer.wsd_decay_steps",
    "--lr-wsd-decay-style": "trainer.optimizer.wsd_decay_style",
    "--weight-decay": "trainer.optimizer.weight_decay",
    "--adam-beta1": "trainer.optimizer.beta1",
    "--adam-beta2": "trainer.optimizer.beta2",
    "--adam-eps": "trainer.optimizer.eps",
    "--clip-grad": "trainer.optimizer.clip_grad",
    "--load": "trainer.checkpoint.load",
    "--save": "run.dir",
    "--save-interval": "trainer.checkpoint.save_interval",
}

# Flags that take several values.
LIST_FLAGS: dict[str, str] = {
    "--rollout-stop": "rollout.sampling.stop",
    "--rollout-stop-token-ids": "rollout.sampling.stop_token_ids",
}

# Flags without a value -> (key, what they set it to).
SWITCHES: dict[str, tuple[str, Any]] = {
    "--apply-chat-template": ("data.apply_chat_template", True),
    "--rollout-shuffle": ("data.shuffle", True),
    "--group-rm": ("reward.group_rm", True),
    "--partial-rollout": ("staleness.partial_rollout", True),
    "--mask-offpolicy-in-partial-rollout": ("staleness.mask_offpolicy", True),
    "--calculate-per-token-loss": ("trainer.algorithm.loss_reduction", "per_token"),
    "--disable-grpo-std-normalization": ("trainer.algorithm.normalize_std", False),
    "--normalize-advantages": ("trainer.algorithm.normalize_advantages", True),
    "--use-rollout-logprobs": ("trainer.algorithm.old_logprobs", "rollout"),
    "--use-opd": ("trainer.algorithm.use_opd", True),
    "--use-tis": (TIS, "clip"),
    "--use-kl-loss": ("trainer.algorithm.use_kl_loss", True),
    "--use-dynamic-batch-size": ("trainer.use_dynamic_batch_size", True),
    "--balance-data": ("trainer.balance_data", True),
    "--optimizer-cpu-offload": ("trainer.offload", True),
    "--colocate": ("run.colocate", True),
    "--offload-train": ("run.offload_train", True),
    "--offload-rollout": ("run.offload_rollout", True),
    "--use-unbiased-kl": ("trainer.algorithm.kl_unbiased", True),
}

# The ranks of the trainer are the product of these.
_RANKS = ("--actor-num-nodes", "--actor-num-gpus-per-node")
# Megatron's ways to say what is kept of the activations. With any of them all decoder layers are computed again; with
# the method "block" the first so many.
_METHOD, _LAYERS = "--recompute-method", "--recompute-num-layers"
_RECOMPUTE = ("--recompute-granularity", _METHOD, _LAYERS)

# flag -> key, where the value is translated.
_TRANSLATED = {
    **dict.fromkeys(_RANKS, "trainer.ranks"),
    **dict.fromkeys(_RECOMPUTE, "trainer.recompute"),
    _LAYERS: "block: trainer.recompute_layers",
    "--rm-type": "reward.scorer",
    "--dynamic-sampling-filter-path": "batch.dynamic_sampling_filter",
    "--loss-type": "trainer.algorithm.policy_loss",
    "--opd-type": "megatron: model.teacher_checkpoint",
}

# slime's losses; its policy_loss is what --advantage-estimator says.
_LOSSES: dict[str, dict[str, Any]] = {
    "policy_loss": {},
    "sft_loss": {LOSS: "sft"},
    "custom_loss": {LOSS: "custom"},
}
# Of slime's teachers, the one that the trainer has by itself.
_TEACHERS: dict[str, dict[str, Any]] = {"megatron": {}}

# slime's names for scorers that have another one here.
_SCORERS = {"remote_rm": "remote"}

# Dotted paths that name what is built in here.
_FILTERS = {
    "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std": "nonzero_std",
    "check_reward_nonzero_std": "nonzero_std",
    "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std_with_fallback": (
        "nonzero_std_with_fallback"
    ),
}


def to_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Dotted overrides for `services.common.config.load`. Our own --section.key flags are accepted among slime's.

    Raises ConfigError for an unknown flag, naming the nearest known one, and for a missing value.
    """
    overrides: dict[str, Any] = {}
    engine_flags: dict[str, list[str]] = {}
    recompute: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        flag, equals, inline = rest.pop(0).partition("=")
        if "." in flag and flag.startswith("--"):
            overrides |= parse_overrides(
                [f"{flag}={inline}" if equals else flag, *([] if equals else _values(flag, rest, 1))]
            )
        elif slime_engine_flags.is_engine_flag(flag):
            bare = not equals and flag not in slime_engine_flags.KNOWN
            engine_flags[flag] = [inline] if equals else _values(flag, rest, least=0 if bare else 1)
        elif flag in SWITCHES:
            key, value = SWITCHES[flag]
            overrides[key] = value
        elif flag in LIST_FLAGS:
            overrides[LIST_FLAGS[flag]] = _values(flag, rest)
        elif flag == "--dynamic-sampling-filter-path":
            overrides["batch.dynamic_sampling_filter"] = _filter(inline if equals else _values(flag, rest, 1)[0])
        elif flag in _RANKS:
            overrides["trainer.ranks"] = overrides.get("trainer.ranks", 1) * _count(flag, rest, inline)
        elif flag in _RECOMPUTE:
            recompute[flag] = inline or _values(flag, rest, 1)[0]
        elif flag == "--rm-type":
            scorer = inline if equals else _values(flag, rest, 1)[0]
            overrides["reward.scorer"] = _SCORERS.get(scorer, scorer)
        elif flag in ("--loss-type", "--opd-type"):
            known = _LOSSES if flag == "--loss-type" else _TEACHERS
            overrides |= _one_of(known, flag, inline if equals else _values(flag, rest, 1)[0])
        elif flag in VALUE_FLAGS:
            text = inline if equals else _values(flag, rest, 1)[0]
            overrides |= parse_overrides([f"--{VALUE_FLAGS[flag]}={text}"])
        else:
            raise ConfigError(f"unknown flag{_nearest(flag)}", field=flag)
    overrides = _recomputed(recompute) | overrides
    overrides |= slime_engine_flags.engine_overrides(engine_flags, overrides)
    if TIS in overrides:
        # slime's own default, and what a correction is of.
        overrides.setdefault("trainer.algorithm.old_logprobs", "recomputed")
    overrides.setdefault("run.dir", _default_dir(overrides))
    return overrides


def describe() -> str:
    """Every flag with the key it sets, a line each."""
    rows = {**VALUE_FLAGS, **LIST_FLAGS, **{flag: f"{key} = {value}" for flag, (key, value) in SWITCHES.items()}}
    rows |= _TRANSLATED
    rows |= slime_engine_flags.DESCRIPTIONS
    return "\n".join(f"{flag:36} {key}" for flag, key in sorted(rows.items()))


def _values(flag: str, rest: list[str], count: int | None = None, *, least: int = 1) -> list[str]:
    """The next `count` values, or all up to the next flag, `least` or more. A negative number is a value."""
    taken: list[str] = []
    while rest and (count is None or len(taken) < count) and not (rest[0].startswith("--")):
        taken.append(rest.pop(0))
    if len(taken) < (least if count is None else count):
        raise ConfigError("a value is missing", field=flag)
    return taken


def _count(flag: str, rest: list[str], inline: str) -> int:
    text = inline or _values(flag, rest, 1)[0]
    if not text.isdigit():
        raise ConfigError(f"{text!r} is not a number", field=flag)
    return int(text)


def _recomputed(flags: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"trainer.recompute": True} if flags else {}
    if flags.get(_METHOD) == "block" and _LAYERS in flags:
        found |= parse_overrides([f"--trainer.recompute_layers={flags[_LAYERS]}"])
    return found


def _one_of(known: dict[str, dict[str, Any]], flag: str, value: str) -> dict[str, Any]:
    if value not in known:
        raise ConfigError(f"{value!r} is none of {', '.join(known)}", field=flag)
    return known[value]


def _filter(path: str) -> str:
    return _FILTERS.get(path, path)


def _nearest(flag: str) -> str:
    known = [
        *(*VALUE_FLAGS, *LIST_FLAGS, *SWITCHES, *_TRANSLATED),
        *slime_engine_flags.KNOWN,
    ]
    near = difflib.get_close_matches(flag, known, n=1)
    return f"; did you mean {near[0]}?" if near else "; polyhead train --list-flags prints the known ones"


def _default_dir(overrides: dict[str, Any]) -> str:
    model = Path(str(overrides.get("model.hf_checkpoint", "model"))).name or "model"
    return f"runs/{model}"
