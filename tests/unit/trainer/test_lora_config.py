"""Settings of adapters that are refused, each in a line that names the key."""

import sys

import pytest

from services.cli.preflight import check
from services.common.config import Config, load
from services.common.config.loader import dump
from services.common.errors import ConfigError
from services.trainer.backends.torch.backend import TorchBackend
from tests.kit.tiny_model import build_tiny_qwen3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_qwen3(tmp_path_factory.mktemp("model") / "m")


def test_the_settings_come_back_as_they_were_written(tmp_path):
    lora = {"rank": 16, "alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "mlp.up_proj"]}
    config = Config(trainer={"lora": lora})
    (tmp_path / "config.toml").write_text(dump(config))
    assert load(tmp_path / "config.toml").trainer.lora == config.trainer.lora
    assert config.trainer.lora.scale == 2.0
    assert Config(trainer={"lora": {"rank": 16}}).trainer.lora.scale == 2.0
    assert load(None, {"trainer.lora.rank": 8}).trainer.lora.scale == 4.0


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"rank": -1}, r"trainer\.lora\.rank: .*, not -1"),
        ({"rank": 4, "alpha": 0}, r"trainer\.lora\.alpha: .*, not 0"),
        ({"alpha": 16}, r"lora\.rank = 0"),
        ({"target_modules": ["q_proj"]}, r"lora\.rank = 0"),
        ({"rank": 4, "target_modules": ["q_proj", "."]}, r"trainer\.lora\.target_modules: holds an empty name"),
        ({"rank": 4, "dropout": 0.1}, r"trainer\.lora\.dropout: unknown key"),
    ],
)
def test_settings_that_do_not_fit_are_refused(lora, reason):
    with pytest.raises(ConfigError, match=reason):
        load(None, {"trainer.lora": lora})


@pytest.mark.parametrize("name", ["lm_head", "query", "proj", "q_proj.weight", "embed_tokens", "layers.2.mlp.up_proj"])
def test_layers_that_the_model_does_not_have_are_named_with_those_it_has(model, name):
    config = Config(model={"hf_checkpoint": model}, trainer={"lora": {"rank": 4, "target_modules": ["q_proj", name]}})
    known = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(ConfigError, match=rf"^trainer\.lora\.target_modules: '{name}' .* there are {known}$"):
        TorchBackend(config)


def test_without_peft_the_line_says_what_to_install(model, monkeypatch):
    config = Config(model={"hf_checkpoint": model}, trainer={"lora": {"rank": 4}})
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"^trainer\.lora\.rank: .*pip install 'polyhead\[lora\]'$"):
        TorchBackend(config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^trainer\.lora\.rank: .*pip install 'polyhead\[lora\]'$"):
        check(config)
