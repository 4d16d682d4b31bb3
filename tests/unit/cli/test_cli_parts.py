"""The launcher's smaller parts: the lock, the demo's directory, the followed file, the checks before a resume."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from services.cli.demo.common import prepare_directory
from services.cli.lock import holder, sole_launcher
from services.cli.observe import JsonLines
from services.cli.preflight import _check_addresses, _check_collective, _check_resumable
from services.cli.run import _free_ports, _resolve
from services.common.config import dump, load
from services.common.errors import ConfigError


def test_a_run_directory_has_one_launcher_at_a_time(tmp_path):
    assert holder(tmp_path) is None
    with sole_launcher(tmp_path / "run"):
        assert holder(tmp_path / "run") == os.getpid()
        with (
            pytest.raises(ConfigError, match=f"already running .process {os.getpid()}"),
            sole_launcher(tmp_path / "run"),
        ):
            pass
    assert holder(tmp_path / "run") is None, "the pid that is left in the file is nobody's"


def test_a_demo_goes_on_if_unfinished_and_starts_anew_otherwise(tmp_path):
    run = tmp_path / "run"
    prepare_directory(run, "addition", 1)
    (run / "store").mkdir()
    prepare_directory(run, "addition", 1)
    assert (run / "store").exists(), "the same seed goes on"
    prepare_directory(run, "addition", 2)
    assert not (run / "store").exists(), "another seed is another run"
    (run / "summary.json").touch()
    prepare_directory(run, "addition", 2)
    assert not (run / "summary.json").exists(), "a finished one is done again"


def test_a_demo_touches_no_directory_of_others(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="not a demo"):
        prepare_directory(tmp_path, "addition", 0)
    assert (tmp_path / "checkpoints").exists()


def test_a_followed_file_yields_whole_lines_and_passes_over_torn_ones(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = JsonLines(path)
    assert lines.read_new() == []
    path.write_text('{"step": 1}\n{"st')
    assert lines.read_new() == [{"step": 1}]
    with path.open("a") as file:
        file.write('{"step": 2}\n{"step": 3}\n')
    assert lines.read_new() == [{"step": 3}]


def test_a_run_is_resumed_with_the_data_it_was_begun_with(tmp_path):
    begun = load(None, {"run.dir": str(tmp_path), "data.prompt_data": "a.jsonl"})
    _check_resumable(begun)
    (tmp_path / "config.toml").write_text(dump(begun))
    _check_resumable(load(None, {"run.dir": str(tmp_path), "data.prompt_data": "a.jsonl", "run.num_rollout": 7}))
    with pytest.raises(ConfigError, match=r"data.prompt_data: .* begun with 'a.jsonl', not 'b.jsonl'"):
        _check_resumable(load(None, {"run.dir": str(tmp_path), "data.prompt_data": "b.jsonl"}))


@pytest.mark.parametrize("role", ["buffer", "rollout", "reward"])
def test_replicas_cannot_share_a_port(role):
    with pytest.raises(ConfigError, match=rf"{role}.address: .* cannot serve 2 replicas"):
        _check_addresses(load(None, {f"{role}.replicas": 2, f"{role}.address": "127.0.0.1:9000"}))


def test_each_buffer_replica_may_have_an_address_of_its_own():
    ports = _free_ports(2)
    address = ",".join(f"127.0.0.1:{port}" for port in ports)
    _check_addresses(load(None, {"buffer.replicas": 2, "buffer.address": address}))
    resolved = _resolve(load(None, {"buffer.replicas": 3}), Path("/tmp"))
    assert len(set(resolved.buffer.addresses)) == 3


def test_engines_on_other_hosts_need_an_address_that_they_can_reach(monkeypatch):
    far = {"rollout.engine.external": ["http://localhost:1", "http://127.0.0.2:1", "http://10.0.0.1:1"]}
    with pytest.raises(ConfigError, match=r"rollout\.engine\.external: http://10.* trainer\.weights\.address = 127"):
        _check_collective(load(None, far))
    _check_collective(load(None, {"rollout.engine.external": far["rollout.engine.external"][:2]}))
    with pytest.raises(ConfigError, match=r"trainer\.weights\.address: 192\.0\.2\.1 is no address of this machine"):
        _check_collective(load(None, {**far, "trainer.weights.address": "192.0.2.1"}))
    monkeypatch.setattr("services.cli.preflight.free_port", lambda _: 1)
    _check_collective(load(None, {**far, "trainer.weights.address": "192.0.2.1"}))


def test_a_password_in_the_stores_url_is_refused():
    with pytest.raises(ConfigError, match="POLYHEAD_STORE__PASSWORD"):
        load(None, {"store.url": "redis://:secret@localhost:6379"})


def test_the_mark_names_task_and_seed(tmp_path):
    prepare_directory(tmp_path / "run", "smollm2", 3)
    assert json.loads((tmp_path / "run" / "demo.json").read_text()) == {"task": "smollm2", "seed": 3}
