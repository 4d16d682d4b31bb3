"""Reads the configuration: TOML file, then dotted overrides, then secrets from the environment.

Every mistake becomes one `ConfigError` that names the key and, for an unknown key, the nearest known one.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from services.common.config.models import (
    BatchConfig,
    BufferConfig,
    DataConfig,
    ModelConfig,
    PluginsConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    StalenessConfig,
    StoreConfig,
    TrainerConfig,
)
from services.common.errors import ConfigError

# Never in a file: it would be written to the run directory with the rest of the configuration.
_SECRETS = ("store.password", "rollout.engine.admin_key", "reward.remote.token")
# What `run.deterministic` can promise its bits for.
_DETERMINISTIC: tuple[tuple[str, Any], ...] = (
    ("staleness.max_staleness", 0),
    ("staleness.on_stale", "wait"),
    ("model.dtype", "float32"),
    ("rollout.engine.kind", "torch"),
    ("rollout.engine.external", []),
    ("rollout.pause_mode", "in_place"),
    ("trainer.device", "cpu"),
    ("trainer.ranks", 1),
)
# What colocated mode is made for: each turn of the engines begins with a push.
_COLOCATED: tuple[tuple[str, Any], ...] = (
    ("trainer.weights.backend", "ipc"),
    ("staleness.publish_interval", 1),
    ("rollout.engine.external", []),
    ("trainer.offload_reference", True),
    ("trainer.offload", False),
    ("trainer.ranks", 1),
)
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


class Config(BaseSettings):
    """One run: every service reads the whole of it and uses its own part."""

    model_config = SettingsConfigDict(extra="forbid", env_prefix="POLYHEAD_", env_nested_delimiter="__")

    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    batch: BatchConfig = Field(default_factory=BatchConfig)
    staleness: StalenessConfig = Field(default_factory=StalenessConfig)
    store: StoreConfig = Field(default_factory=StoreConfig)
    buffer: BufferConfig = Field(default_factory=BufferConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    plugins: PluginsConfig = Field(default_factory=PluginsConfig)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings

    @property
    def optimizer_steps(self) -> int:
        """Of the whole run."""
        return self.run.num_rollout * (self.batch.num_steps_per_rollout or 1)

    @property
    def policy_steps(self) -> int:
        """Optimizer steps of the policy: not those that train the critic alone."""
        return self.optimizer_steps - self.trainer.critic.only_steps * (self.batch.num_steps_per_rollout or 1)

    @model_validator(mode="after")
    def _schedule_fits(self) -> Config:
        if self.trainer.critic.only_steps >= self.run.num_rollout:
            raise ValueError(
                f"trainer.critic.only_steps = {self.trainer.critic.only_steps} leaves none of run.num_rollout = "
                f"{self.run.num_rollout} steps to the policy"
            )
        self.trainer.optimizer.span(self.policy_steps)
        return self

    @model_validator(mode="after")
    def _critic_fits(self) -> Config:
        if not self.trainer.algorithm.has_critic:
            if self.model.critic_checkpoint is not None:
                raise ValueError(
                    f"model.critic_checkpoint is for trainer.algorithm.name = ppo, not {self.trainer.algorithm.name}"
                )
            return self
        try:
            self.trainer.critic.optimizer(self.trainer.optimizer).span(self.optimizer_steps)
        except ValueError as error:
            reason = (
                error.errors()[0]["msg"].removeprefix("Value error, ")
                if isinstance(error, ValidationError)
                else str(error)
            )
            raise ValueError(f"trainer.critic does not go with trainer.optimizer: {reason}") from None
        return self

    @model_validator(mode="after")
    def _teacher_is_there_and_wanted(self) -> Config:
        if self.trainer.algorithm.use_opd != (self.model.teacher_checkpoint is not None):
            raise ValueError("trainer.algorithm.use_opd and model.teacher_checkpoint: give both or neither")
        return self

    @model_validator(mode="after")
    def _penalty_fits(self) -> Config:
        buffer_len, max_len = self.reward.overlong_buffer_len, self.rollout.sampling.max_response_len
        if buffer_len > max_len:
            raise ValueError(
                f"reward.overlong_buffer_len = {buffer_len} is more than rollout.sampling.max_response_len = {max_len}"
            )
        return self

    @model_validator(mode="after")
    def _colocation_fits(self) -> Config:
        if not self.run.colocate:
            return self
        weights = self.trainer.weights
        if "backend" not in weights.model_fields_set:
            weights.backend = "ipc"
        for key, wanted in _COLOCATED:
            value = reduce(getattr, key.split("."), self)
            if value != wanted:
                raise ValueError(f"run.colocate needs {key} = {_toml_value(wanted)}, not {_toml_value(value)}")
        return self

    @model_validator(mode="after")
    def _memory_can_be_shared(self) -> Config:
        engine, trainer = self.rollout.engine, self.trainer
        if trainer.weights.backend != "ipc" or engine.external:
            return self
        engine_device = "cpu" if engine.kind == "torch" else engine.device
        if engine_device != trainer.device:
            raise ValueError(
                f'trainer.weights.backend = "ipc" needs engines on the trainer\'s device: trainer.device = '
                f'"{trainer.device}", and the engine\'s is "{engine_device}"'
            )
        if engine.kind == "sglang" and not engine.staging_mb:
            raise ValueError(
                'trainer.weights.backend = "ipc" needs rollout.engine.staging_mb > 0: it starts the receiver'
            )
        return self

    @model_validator(mode="after")
    def _sections_fit(self) -> Config:
        if not self.run.deterministic:
            return self
        for key, wanted in _DETERMINISTIC:
            value = reduce(getattr, key.split("."), self)
            if value != wanted:
                raise ValueError(f"run.deterministic needs {key} = {_toml_value(wanted)}, not {value!r}")
        if self.batch.dynamic_sampling_filter == "nonzero_std_with_fallback":
            raise ValueError(
                "run.deterministic excludes batch.dynamic_sampling_filter = nonzero_std_with_fallback: what it keeps "
                "depends on which groups were scored first"
            )
        return self


def load(path: Path | None, overrides: Mapping[str, Any] | None = None) -> Config:
    """The validated configuration of a run.

    `overrides` maps dotted keys ("trainer.optimizer.lr") to values and wins over the file.
    Raises ConfigError for an unreadable file, broken TOML, unknown keys and values that do not fit.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", field=str(path)) from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"is not valid TOML: {error}", field=str(path)) from error
    for key, value in (overrides or {}).items():
        _set(tree, key, value)
    for secret in _SECRETS:
        if _holds(tree, secret.split(".")):
            variable = f"POLYHEAD_{secret.upper().replace('.', '__')}"
            raise ConfigError(f"comes from the environment only: {variable}", field=secret)
    try:
        return Config(**tree)
    except ValidationError as error:
        raise _explain(error) from None


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Turns ``["--trainer.optimizer.lr", "1e-6", "--data.shuffle=true"]`` into a dict for `load`.

    Values are read as TOML and fall back to plain strings. Raises ConfigError for anything not of this form.
    """
    overrides: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or "." not in flag:
            raise ConfigError("expected --section.key VALUE", field=flag)
        key, equals, text = flag.removeprefix("--").partition("=")
        if not equals:
            if not rest:
                raise ConfigError("a value is missing", field=flag)
            text = rest.pop(0)
        overrides[key] = _parse_value(text)
    return overrides


def dump(config: Config) -> str:
    """The resolved configuration as TOML, secrets left out: `load` reads it back to an equal `Config`."""
    secrets: dict[str, Any] = {
        "store": {"password"},
        "rollout": {"engine": {"admin_key"}},
        "reward": {"remote": {"token"}},
    }
    tree = config.model_dump(mode="json", exclude=secrets, exclude_none=True)
    lines = ["# Resolved configuration of this run, written at its start."]
    _write_table(lines, (), tree)
    return "\n".join(lines) + "\n"


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for name in parents:
        child = tree.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{name} is not a section", field=dotted)
        tree = child
    tree[leaf] = value


def _holds(tree: Any, path: Sequence[str]) -> bool:
    return not path or (isinstance(tree, dict) and path[0] in tree and _holds(tree[path[0]], path[1:]))


def _write_table(lines: list[str], path: tuple[str, ...], table: Mapping[str, Any]) -> None:
    plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
    if path and (plain or not table):
        lines += ["", f"[{'.'.join(_toml_key(name) for name in path)}]"]
    lines += [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in plain.items()]
    for key, value in table.items():
        if isinstance(value, dict):
            _write_table(lines, (*path, key), value)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_toml_key(key)} = {_toml_value(item)}' for key, item in value.items())}}}"
    if isinstance(value, str):
        # JSON's escapes are TOML's too, but for DEL, which TOML does not allow as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _toml_key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else str(_toml_value(key))


def _explain(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    dotted = ".".join(location)
    if first["type"] == "extra_forbidden":
        return ConfigError(f"unknown key{_nearest(location)}", field=dotted)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] not in ("value_error", "missing"):
        message = f"{message}, not {first['input']!r}"
    return ConfigError(message, field=dotted)


def _nearest(location: Sequence[str]) -> str:
    """The suggestion for an unknown key: the same name elsewhere, a like one in its section, a like one anywhere."""
    *parents, leaf = location
    section: type[BaseModel] = Config
    for name in parents:
        section = section.model_fields[name].annotation  # type: ignore[assignment]
    everywhere = dict(_leaves(Config))
    if leaf in everywhere:
        return f"; did you mean {everywhere[leaf]}?"
    if near := difflib.get_close_matches(leaf, section.model_fields, n=1):
        return f"; did you mean {'.'.join([*parents, near[0]])}?"
    if near := difflib.get_close_matches(leaf, everywhere, n=1, cutoff=0.8):
        return f"; did you mean {everywhere[near[0]]}?"
    return f"; known here: {', '.join(section.model_fields)}"


def _leaves(section: type[BaseModel], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += _leaves(field.annotation, f"{prefix}{name}.")
        else:
            found.append((name, f"{prefix}{name}"))
    return found
