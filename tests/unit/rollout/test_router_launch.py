"""How the router is started: whose interpreter, which flags, and what is refused before anything starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from services.common.config import load
from services.common.errors import ConfigError
from services.rollout.engines import router_launch
from services.rollout.engines.router_launch import router_command, router_python


def flags(**overrides: Any) -> list[str]:
    return list(router_command(load(None, {"rollout.engines": 2, **overrides}))(1, 2, "secret").command)


def test_what_would_undo_our_care_is_off() -> None:
    command = flags()
    assert {"--disable-retries", "--disable-circuit-breaker", "--disable-health-check"} <= set(command)
    assert command[command.index("--policy") + 1] == "cache_aware"
    assert command[command.index("--host") + 1] == command[command.index("--prometheus-host") + 1] == "127.0.0.1"


def test_an_argument_of_the_user_replaces_a_default() -> None:
    command = flags(**{"rollout.router.args": {"log_level": "info", "cache-threshold": 0.5}})
    assert command.count("--log-level") == 1
    assert command[command.index("--log-level") + 1] == "info"
    assert command[command.index("--cache-threshold") + 1] == "0.5"


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"policy": "random"}, "is set by rollout.router.policy"),
        ({"worker_urls": ["a"]}, "is set by rollout.engine.external"),
        ({"api-key": "k"}, "is not to be set"),
        ({"disable-retries": True}, "is not to be set"),
        ({"prometheus-p": 1}, "is short for prometheus-port, which is not to be set"),
    ],
)
def test_flags_that_are_ours_are_refused(args: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"rollout\.router\.args\.{next(iter(args))}: {reason}"):
        flags(**{"rollout.router.args": args})


def test_a_policy_that_the_router_does_not_start_with_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.router\.policy"):
        flags(**{"rollout.router.policy": "power_of_two"})


def test_an_interpreter_without_the_router_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    with pytest.raises(ConfigError, match=r"rollout\.router\.python: .*/python does not have: pip install"):
        router_python(load(None, {"rollout.router.python": str(bare)}))
    with pytest.raises(ConfigError, match=r"rollout\.router\.python: .*nowhere is not a file"):
        router_python(load(None, {"rollout.router.python": str(tmp_path / "nowhere")}))
    monkeypatch.setattr(router_launch, "_MODULE", "no_such_router")
    with pytest.raises(ConfigError, match="sglang-router"):
        router_python(load(None))


def test_this_interpreter_comes_first_then_that_of_sglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tmp_path / "python"
    engine.write_text("#!/bin/sh\nexit 0\n")
    engine.chmod(0o755)
    config = load(None, {"rollout.engine.kind": "sglang", "rollout.engine.python": str(engine)})
    assert router_python(config) == Path(sys.executable)
    monkeypatch.setattr(router_launch, "_MODULE", "no_such_router")
    assert router_python(config) == engine
    assert "SGLANG_USE_CPU_ENGINE" in router_command(config)(1, 2, "key").environment
