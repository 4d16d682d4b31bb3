"""The configuration: what is read, what is written back, and how mistakes are told."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.config import Config, dump, load, parse_overrides
from services.common.config.models import DataConfig
from services.common.errors import ConfigError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(toml(tmp_path, "")) == load(None) == Config()


def test_what_is_dumped_is_loaded_again(tmp_path: Path) -> None:
    config = load(
        None,
        {
            "run.name": "a-b.c",
            "run.dir": "runs/with space",
            "data.prompt_data": 'quote " backslash \\ line\nend é 😀 \x7f \r \x00',
            "data.chat_template_kwargs": {"plain": True, "with space": {"a.b": [1, {"x": 'y"'}]}, "": []},
            "rollout.sampling.stop": ["\n\n", "'"],
            "rollout.sampling.temperature": 0.1,
            "trainer.optimizer.lr": 1e-7,
            "plugins.paths": ["a", "b/c"],
            "staleness.max_staleness": 0,
            "staleness.publish_interval": 1,
        },
    )
    assert load(toml(tmp_path, dump(config))) == config


@given(TEXT, st.dictionaries(TEXT, st.one_of(TEXT, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.lists(TEXT))))
def test_any_text_survives_a_round_trip(text: str, table: dict[str, object]) -> None:
    config = Config(data=DataConfig(prompt_data=text, chat_template_kwargs=table))
    with tempfile.TemporaryDirectory() as directory:
        assert load(toml(Path(directory), dump(config))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[trainer]\nlerning_rate = 1", "trainer.lerning_rate: unknown key; known here: address, device,"),
        ("[rollout]\nreplica = 2", "rollout.replica: unknown key; did you mean rollout.replicas?"),
        ("[trainer.optimizer]\nlrr = 1", "trainer.optimizer.lrr: unknown key; did you mean trainer.optimizer.lr?"),
        (
            "[trainer]\nweight_decay = 1",
            "trainer.weight_decay: unknown key; did you mean trainer.optimizer.weight_decay?",
        ),
        ("[rewards]\nscorer = 'math'", "rewards: unknown key; did you mean reward?"),
        ("[batch]\nrollout_batch_size = 'eight'", "batch.rollout_batch_size: Input should be a valid integer"),
        ("[batch]\nrollout_batch_size = 0", "batch.rollout_batch_size: Input should be greater than 0, not 0"),
        ("[staleness]\non_stale = 'hope'", "staleness.on_stale: Input should be 'wait', 'mask' or 'drop', not 'hope'"),
        ("[run]\nname = 'a b'", "run.name: must be 1 to 64 letters"),
        ("[store]\nurl = 'http://x'", 'store.url: must be "embedded" or begin with redis://'),
        ("[store]\npassword = 'x'", "store.password: comes from the environment only: POLYHEAD_STORE__PASSWORD"),
        (
            "[rollout.engine]\nadmin_key = 'x'",
            "rollout.engine.admin_key: comes from the environment only: POLYHEAD_ROLLOUT",
        ),
        (
            "[buffer]\nreplicas = 3\naddress = '127.0.0.1:1,127.0.0.1:2'",
            "buffer: address names 2 of 3 replicas",
        ),
        ("store = 3", "store: Input should be a valid dictionary"),
        ("[run\n", "is not valid TOML"),
        ("[run]\ndeterministic = true", "run.deterministic needs staleness.max_staleness = 0, not 4"),
        (
            "[run]\ndeterministic = true\n[staleness]\nmax_staleness = 0\n[trainer]\ndevice = 'cuda'",
            "run.deterministic needs trainer.device = \"cpu\", not 'cuda'",
        ),
        (
            "[run]\ndeterministic = true\n[staleness]\nmax_staleness = 0\n"
            "[batch]\ndynamic_sampling_filter = 'nonzero_std_with_fallback'",
            "run.deterministic excludes batch.dynamic_sampling_filter = nonzero_std_with_fallback",
        ),
        (
            "[run]\ncolocate = true\n[trainer.weights]\nbackend = 'nccl'",
            'run.colocate needs trainer.weights.backend = "ipc", not "nccl"',
        ),
        (
            "[run]\ncolocate = true\n[staleness]\npublish_interval = 2",
            "run.colocate needs staleness.publish_interval = 1, not 2",
        ),
        (
            "[trainer]\ndevice = 'cuda'\nweights.backend = 'ipc'",
            'trainer.device = "cuda", and the engine\'s is "cpu"',
        ),
        (
            "[rollout.engine]\nkind = 'sglang'\nstaging_mb = 0\n[trainer.weights]\nbackend = 'ipc'",
            "needs rollout.engine.staging_mb > 0",
        ),
        (
            "[rollout.engine]\nexternal = ['http://a:1', 'http://A:1/']",
            "rollout.engine.external: http://A:1/ is named twice",
        ),
        ("[rollout.engine]\nexternal = ['http://a', 'http://a:80']", "http://a:80 is named twice"),
        ("[rollout.engine]\nexternal = ['http://a:1']\nargs = { x = 1 }", "rollout.engine: args is for engines that"),
        ("[rollout.engine]\nexternal = ['http://a:1']\ngpus = 2", "rollout.engine: gpus is for engines that"),
        ("[rollout]\nengines = 2\nengine.external = ['http://a:1']", "rollout: engines = 2 is for engines that"),
        ("[rollout.engine]\ngpus = 2", 'rollout.engine: gpus = 2 needs device = "cuda"'),
        ("[rollout.router]\nargs = { x = 1 }", "rollout: router.args are given, but no replica has several engines"),
        ("[trainer.weights]\naddress = '0.0.0.0'", "trainer.weights.address: '0.0.0.0' is not one IPv4 address"),
        ("[staleness]\npublish_interval = 7", "max_staleness = 4 must be at least publish_interval - 1 = 6"),
    ],
)
def test_mistakes_are_told_in_one_line_with_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(toml(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_colocated_weights_go_over_ipc() -> None:
    config = load(None, {"run.colocate": True})
    assert config.trainer.weights.backend == "ipc"
    assert load(None, {}).trainer.weights.backend == "gloo"


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"rollout_batch_size": 3, "global_batch_size": 10, "num_steps_per_rollout": 2}, "3 × 8 = 24 must equal"),
        ({"rollout_batch_size": 3, "global_batch_size": 10, "num_steps_per_rollout": 2}, "= 10 × 2 = 20"),
        ({"global_batch_size": 48}, "8 × 8 = 64 must equal global_batch_size × num_steps_per_rollout = 48 × 1 = 48"),
        (
            {"rollout_batch_size": 4, "num_steps_per_rollout": 3},
            "4 × 8 = 32 is not a multiple of num_steps_per_rollout = 3",
        ),
        (
            {"rollout_batch_size": 3, "num_steps_per_rollout": 4},
            "3 groups cannot be split over num_steps_per_rollout = 4",
        ),
        ({"over_sampling_batch_size": 4}, "over_sampling_batch_size = 4 must be at least rollout_batch_size = 8"),
        ({"min_group_size": 9}, "min_group_size = 9 is above n_samples_per_prompt = 8"),
    ],
)
def test_batch_sizes_that_do_not_fit_show_the_numbers(batch: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, {f"batch.{name}": value for name, value in batch.items()})
    assert message in str(caught.value)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_batch_sizes_multiply_out(groups: int, samples: int, steps: int) -> None:
    try:
        batch = load(None, {"batch.rollout_batch_size": groups, "batch.n_samples_per_prompt": samples,
                            "batch.num_steps_per_rollout": steps}).batch  # fmt: skip
    except ConfigError:
        assert groups % steps
    else:
        assert groups * samples == batch.global_batch_size * batch.num_steps_per_rollout


def test_overrides_are_typed_and_win_over_the_file(tmp_path: Path) -> None:
    arguments = ["--trainer.optimizer.lr", "1e-3", "--data.shuffle=true", "--run.name", "x", "--rollout.sampling.stop",
                 '["a", "b"]', "--data.prompt_data=a=b", "--run.seed", "-1"]  # fmt: skip
    config = load(toml(tmp_path, "[trainer.optimizer]\nlr = 1.0\nbeta1 = 0.5\n"), parse_overrides(arguments))
    assert (config.trainer.optimizer.lr, config.trainer.optimizer.beta1) == (1e-3, 0.5)
    assert config.data.shuffle is True
    assert (config.run.name, config.run.seed) == ("x", -1)
    assert config.rollout.sampling.stop == ["a", "b"]
    assert config.data.prompt_data == "a=b"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run.name"], "--run.name: a value is missing"),
        (["run.name", "x"], "run.name: expected --section.key VALUE"),
        (["--seed", "1"], "--seed: expected --section.key VALUE"),
    ],
)
def test_overrides_of_another_form_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_overrides(arguments)


def test_an_override_below_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.name.x: name is not a section"):
        load(toml(tmp_path, "[run]\nname = 'a'"), {"run.name.x": 1})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.toml: cannot be read: No such file"):
        load(tmp_path / "none.toml")


def test_the_password_comes_from_the_environment_and_goes_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYHEAD_STORE__PASSWORD", "hunter2")
    config = load(None, {"store.url": "redis://localhost:1"})
    assert config.store.password is not None
    assert config.store.password.get_secret_value() == "hunter2"
    assert config.store.url == "redis://localhost:1"
    assert "hunter2" not in dump(config) + repr(config)


def test_the_key_of_external_engines_comes_from_the_environment_and_goes_nowhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("POLYHEAD_ROLLOUT__ENGINE__ADMIN_KEY", "hunter2")
    config = load(None, {"rollout.engine.external": ["http://a:1"]})
    text = dump(config)
    assert "hunter2" not in text
    assert "admin_key" not in text
    again = load(toml(tmp_path, text)).rollout.engine
    assert again.admin_key is not None
    assert again.admin_key.get_secret_value() == "hunter2"
    assert again.external == ["http://a:1"]


def test_the_password_is_not_taken_from_the_command_line() -> None:
    with pytest.raises(ConfigError, match="environment only"):
        load(None, {"store.password": "hunter2"})
