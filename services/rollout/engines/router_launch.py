"""The command line of sglang-router, and which interpreter has it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from services.common.config import Config
from services.common.errors import ConfigError
from services.rollout.engines.launch import Launch
from services.rollout.engines.python_module import flags_of, module_command, secret_arguments, user_flags
from services.rollout.engines.sglang_launch import sglang_environment, sglang_python

# (port, port of its metrics, key) -> what to start
RouterCommand = Callable[[int, int, str], Launch]

_MODULE = "sglang_router"
_POLICY = "rollout.router.policy"
_FIELD = "rollout.router.python"
_FIND_TIMEOUT_S = 30.0

# Why: a retry would carry the request that kills its engine to the next one; the breaker opens for all engines after a
# burst of failures; a health check admits an engine again without weights.
_FIXED = ("disable-retries", "disable-circuit-breaker", "disable-health-check")
_DEFAULTS: dict[str, object] = {
    # Its own, 64 and 1.5, leave one engine of two with three quarters of the requests.
    "balance-abs-threshold": 10,
    "balance-rel-threshold": 1.2,
    "worker-startup-check-interval": 1,
    "worker-startup-timeout-secs": 5,
    "shutdown-grace-period-secs": 1,
    "request-timeout-secs": 14_400,
    "log-level": "warn",
}

# Flags that have a setting of their own, or that only we can know.
_OURS = {
    "policy": _POLICY,
    "worker-urls": "rollout.engine.external",
    **dict.fromkeys(("host", "port", "prometheus-host", "prometheus-port", "api-key", "control-plane-api-keys"), ""),
    **dict.fromkeys((*_FIXED, "dp-aware", "enable-igw", "mini-lb", "backend", "service-discovery"), ""),
    **dict.fromkeys(("pd-disaggregation", "prefill", "decode", "prefill-policy", "decode-policy"), ""),
}


def router_command(config: Config) -> RouterCommand:
    """Raises ConfigError when no interpreter has the router, or for a flag that is not the user's to set."""
    options: dict[str, object] = {
        "host": "127.0.0.1",
        "prometheus-host": "127.0.0.1",
        "policy": config.rollout.router.policy,
        **dict.fromkeys(_FIXED, True),
        **_DEFAULTS,
        **user_flags(config.rollout.router.args, _OURS, "rollout.router.args"),
    }
    python, flags = router_python(config), flags_of(options)
    # In SGLang's environment it imports SGLang.
    environment = sglang_environment(config) if python in _engine_python(config) else {}

    def command(port: int, metrics_port: int, key: str) -> Launch:
        ports = ["--port", str(port), "--prometheus-port", str(metrics_port)]
        secrets = secret_arguments(f"--api-key={key}", "--control-plane-api-keys", f"rollout:rollout:admin:{key}")
        return Launch(module_command(python, f"{_MODULE}.launch_router", [*flags, *ports]), {**environment, **secrets})

    return command


def router_python(config: Config) -> Path:
    """The configured interpreter, else this one, else SGLang's. Raises ConfigError when it has no sglang-router."""
    chosen = config.rollout.router.python
    if chosen is not None:
        if not chosen.is_file():
            raise ConfigError(f"{chosen} is not a file", field=_FIELD)
        candidates = [chosen.absolute()]
    else:
        # This one first: without SGLang beside it, the router starts in half a second.
        candidates = [Path(sys.executable), *_engine_python(config)]
    for python in candidates:
        if _has_router(python):
            return python
    raise ConfigError(
        f"several engines need sglang-router, which {candidates[0]} does not have: pip install 'polyhead[router]', "
        "or name an interpreter that has it here",
        field=_FIELD,
    )


def _engine_python(config: Config) -> list[Path]:
    engine = config.rollout.engine
    return [sglang_python(engine)] if engine.kind == "sglang" and not engine.external else []


def _has_router(python: Path) -> bool:
    if python == Path(sys.executable):
        return importlib.util.find_spec(_MODULE) is not None
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({_MODULE!r}) is None)"
    try:
        return subprocess.run([python, "-I", "-c", look], timeout=_FIND_TIMEOUT_S, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{python} cannot be run: {error}", field=_FIELD) from error
