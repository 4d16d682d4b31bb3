"""Bad input: one clear line, a non-zero exit, nothing half-written."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import redis

from tests.kit.runs import polyhead
from tests.kit.valkey import running

PLUGINS = """
import time
def raises(args, sample, **kwargs): raise RuntimeError("no judge today")
def hangs(args, sample, **kwargs): time.sleep(600)
def fine(args, sample, **kwargs): return 1.0
"""


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plugins")
    (directory / "my_rewards.py").write_text(PLUGINS)
    (directory / "broken_rewards.py").write_text("import a_module_that_is_not_there\n")
    return directory


def refused(tmp_path: Path, *arguments: str) -> str:
    """The one line that a refused run prints."""
    result = polyhead(*arguments, "--run-dir", str(tmp_path / "run"))
    assert result.returncode not in (0, -9), result.stdout
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("polyhead: ")
    assert not (tmp_path / "run").exists(), "nothing half-written"
    return lines[0]


def test_a_missing_model_directory(tmp_path, flags):
    assert "no-such-model is not a directory" in refused(tmp_path, *flags, "--hf-checkpoint", "no-such-model")


def test_a_model_directory_without_weights(tmp_path, flags, inputs):
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    assert "has no *.safetensors" in refused(tmp_path, *flags, "--hf-checkpoint", str(broken))


def test_a_malformed_line_is_named_by_file_and_number(tmp_path, flags):
    data = tmp_path / "broken.jsonl"
    data.write_text('{"prompt": "1", "label": "1"}\n{"prompt": \n')
    assert f"{data}:2" in refused(tmp_path, *flags, "--prompt-data", str(data))


def test_an_empty_data_set(tmp_path, flags):
    data = tmp_path / "empty.jsonl"
    data.touch()
    assert "empty" in refused(tmp_path, *flags, "--prompt-data", str(data))


def test_a_key_that_the_rows_do_not_have(tmp_path, flags):
    assert "question" in refused(tmp_path, *flags, "--input-key", "question")


def test_a_mistyped_key_names_the_nearest(tmp_path, flags):
    line = refused(tmp_path, *flags, "--trainer.optimizer.learning_rat", "1")
    assert "unknown key" in line
    assert "did you mean batch.global_batch_size?" in refused(tmp_path, *flags, "--batch.global_batch_sise", "1")


def test_batch_sizes_that_do_not_fit_show_the_numbers(tmp_path, flags):
    assert "4 × 4 = 16" in refused(tmp_path, *flags, "--global-batch-size", "10")


def test_a_port_in_use(tmp_path, flags):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = refused(tmp_path, *flags, "--buffer.address", address)
    assert address in line


def test_an_engine_that_is_not_installed(tmp_path, flags):
    engine = ("--rollout.engine.kind", "sglang", "--rollout.engine.python", "no/such/python")
    assert "rollout.engine.python: no/such/python is not a file" in refused(tmp_path, *flags, *engine)


def test_a_redis_that_is_down(tmp_path, flags):
    assert "does not answer" in refused(tmp_path, *flags, "--store.url", f"unix://{tmp_path}/nobody.sock")


def test_a_redis_that_refuses_writes(tmp_path, flags):
    with running() as store, redis.Redis.from_url(store.url) as client:
        client.config_set("maxmemory", 1)
        assert "refuses writes" in refused(tmp_path, *flags, "--store.url", store.url)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("broken_rewards:fine", "a_module_that_is_not_there"),
        ("my_rewards:missing", "missing"),
        ("my_rewards:raises", "no judge today"),
        ("my_rewards:hangs", "timed out"),
    ],
)
def test_a_user_function_that_cannot_score(tmp_path, flags, plugins, function, reason):
    line = refused(
        tmp_path,
        *flags,
        *("--custom-rm-path", function, "--plugins.paths", json.dumps([str(plugins)]), "--reward.score_timeout_s", "1"),
    )
    assert reason in line


def test_a_dry_run_prints_the_resolved_run_and_writes_nothing(tmp_path, flags):
    result = polyhead(*flags, "--run-dir", str(tmp_path / "run"), "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "global_batch_size = 16" in result.stdout
    assert not (tmp_path / "run").exists()
