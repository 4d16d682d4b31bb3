"""A reward model in an SGLang engine of the run's own: what is started, and how the reward service reaches it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from services.common.config import Config
from services.common.errors import ConfigError
from services.common.process import free_port

KEY_VARIABLE = "POLYHEAD_REWARD__REMOTE__TOKEN"
_FIELD = "reward.engine"
# Flags that have a setting of their own, or that we give.
_OURS = {
    "model-path": "reward.engine.model",
    "model": "reward.engine.model",
    "device": "reward.engine.device",
    "dtype": "reward.engine.dtype",
    "port": "reward.engine.port",
    "base-gpu-id": "reward.engine.base_gpu",
    **dict.fromkeys(("tp-size", "tp", "tensor-parallel-size"), "reward.engine.gpus"),
    **dict.fromkeys(("is-embedding", "host", "api-key", "admin-api-key", "config"), ""),
}
# SGLang gives these a bias: made up where the checkpoint has none, and another one at each start.
_BIASED = ("Qwen2ForSequenceClassification", "Qwen3ForSequenceClassification")
_BIAS = "score.bias"
_HEADER_BYTES = 8
_MAX_HEADER = 100 << 20


class RewardEngine(NamedTuple):
    """One to be started."""

    url: str
    command: Sequence[str]
    environment: Mapping[str, str]
    key: str
    """The key without which it answers nobody."""


def reward_engine(config: Config) -> RewardEngine | None:
    """None where the run starts none. Raises ConfigError when it cannot be started so."""
    from services.rollout.engines.python_module import flags_of, module_command, secret_arguments, user_flags
    from services.rollout.engines.sglang_launch import CPU_FLAGS, cpu_environment, sglang_python

    engine = config.reward.engine
    if engine.model is None:
        return None
    _check_model(engine.model)
    port, key = engine.port or free_port(), secrets.token_urlsafe(24)
    options: dict[str, object] = {
        "model-path": engine.model.resolve(),
        "host": "127.0.0.1",
        "port": port,
        "is-embedding": True,
        "device": engine.device,
        "dtype": engine.dtype,
        "tp-size": engine.gpus,
        "log-level-http": "warning",
    }
    if engine.device == "cpu":
        options |= CPU_FLAGS
        environment = cpu_environment(engine.threads)
    else:
        options["base-gpu-id"] = engine.base_gpu
        environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    flags = flags_of(options | user_flags(engine.args, _OURS, f"{_FIELD}.args"))
    # Without a key for everything, /server_info would show the admin key to anyone who asks.
    keys = secret_arguments(f"--api-key={key}", f"--admin-api-key={key}")
    command = module_command(sglang_python(engine, f"{_FIELD}.python"), "sglang.launch_server", flags)
    return RewardEngine(f"http://127.0.0.1:{port}", command, {**environment, **keys}, key)


def _check_model(directory: Path) -> None:
    """It is one, and SGLang makes nothing of it up."""
    field = f"{_FIELD}.model"
    try:
        architectures = json.loads((directory / "config.json").read_text()).get("architectures") or []
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{directory} has no config.json that can be read: {error}", field=field) from error
    if set(architectures) & set(_BIASED) and _BIAS not in _tensors(directory, field):
        raise ConfigError(
            f"{directory} has no {_BIAS}, which SGLang would make up, another one at each start: "
            "add zeros (docs/rewards_remote.md)",
            field=field,
        )


def _tensors(directory: Path, field: str) -> set[str]:
    """The names of what its safetensors files hold, by their headers."""
    names: set[str] = set()
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(_HEADER_BYTES), "little")
                names |= set(json.loads(file.read(min(length, _MAX_HEADER))))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is no safetensors file: {error}", field=field) from error
    return names
