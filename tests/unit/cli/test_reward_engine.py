"""The reward model that a run starts: its command line, its key, and what is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from services.cli.preflight import _check_scorer
from services.cli.reward_engine import reward_engine
from services.common.config import Config
from services.common.errors import ConfigError


def model_in(directory: Path, architecture: str, *tensors: str) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    save_file({name: np.zeros(1, np.float32) for name in tensors}, directory / "model.safetensors")
    return directory


def config_of(model: Path, remote: dict[str, Any] | None = None, **engine: Any) -> Config:
    python = model / "config.json"  # any file
    return Config.model_validate(
        {
            "reward": {
                "scorer": "remote",
                "remote": {"kind": "classify", **(remote or {})},
                "engine": {"model": model, "python": python, **engine},
            }
        }
    )


def test_without_a_model_nothing_is_started() -> None:
    assert reward_engine(Config()) is None


def test_the_command_line_has_the_model_and_no_key(tmp_path: Path) -> None:
    model = model_in(tmp_path / "m", "LlamaForSequenceClassification", "score.weight")
    engine = reward_engine(config_of(model, port=31000, args={"context-length": 512}))
    assert engine is not None
    assert engine.url == "http://127.0.0.1:31000"
    line = " ".join(engine.command)
    assert f"--model-path {model} --host 127.0.0.1 --port 31000 --is-embedding --device cpu" in line
    assert "--context-length 512" in line
    assert len(engine.key) >= 32
    assert engine.key not in line
    assert sum(engine.key in value for value in engine.environment.values()) == 1


def test_on_gpus_it_has_its_own(tmp_path: Path) -> None:
    model = model_in(tmp_path / "m", "LlamaForSequenceClassification", "score.weight")
    engine = reward_engine(config_of(model, device="cuda", base_gpu=6, gpus=2))
    assert engine is not None
    assert "--tp-size 2" in " ".join(engine.command)
    assert "--base-gpu-id 6" in " ".join(engine.command)


@pytest.mark.parametrize("architecture", ["Qwen3ForSequenceClassification", "Qwen2ForSequenceClassification"])
def test_a_bias_that_would_be_made_up_is_refused(tmp_path: Path, architecture: str) -> None:
    without = model_in(tmp_path / "without", architecture, "score.weight")
    with pytest.raises(ConfigError, match=r"reward\.engine\.model: .* no score\.bias"):
        reward_engine(config_of(without))
    assert reward_engine(config_of(model_in(tmp_path / "with", architecture, "score.weight", "score.bias")))


@pytest.mark.parametrize("flag", ["port", "is-embedding", "api-key", "model-path", "tp"])
def test_our_flags_are_not_the_users(tmp_path: Path, flag: str) -> None:
    model = model_in(tmp_path / "m", "LlamaForSequenceClassification")
    with pytest.raises(ConfigError, match=rf"reward\.engine\.args\.{flag}"):
        reward_engine(config_of(model, args={flag: 1}))


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    python = tmp_path / "python"
    python.touch()
    with pytest.raises(ConfigError, match=r"reward\.engine\.model: .* no config\.json"):
        reward_engine(config_of(tmp_path / "m", python=python))


def test_no_other_address_is_given_beside_it(tmp_path: Path) -> None:
    model = model_in(tmp_path / "m", "LlamaForSequenceClassification")
    _check_scorer(config_of(model))
    with pytest.raises(ConfigError, match=r"reward\.remote\.urls: is given by the engine"):
        _check_scorer(config_of(model, {"urls": "http://127.0.0.1:9"}))


@pytest.mark.parametrize("reward", [{"scorer": "math"}, {"scorer": "remote", "remote": {"kind": "http"}}])
def test_it_is_for_classification_only(tmp_path: Path, reward: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"engine\.model is for"):
        Config.model_validate({"reward": {**reward, "engine": {"model": tmp_path}}})
