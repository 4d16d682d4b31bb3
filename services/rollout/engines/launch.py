"""How each kind of engine is started: command line and environment, from the run's configuration."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from services.common.config import Config
from services.rollout.engines.sglang_launch import sglang_arguments, sglang_environment
from services.rollout.engines.torch_engine.options import ADMIN_KEY_VARIABLE


class Launch(NamedTuple):
    """One engine process to be."""

    command: Sequence[str]
    environment: Mapping[str, str] = {}
    """Added to this process's own."""


# (port, admin key) -> what to start
EngineCommand = Callable[[int, str], Launch]


def engine_command(config: Config) -> EngineCommand:
    """The configured kind of engine. Raises ConfigError when it cannot be started as configured."""
    if config.rollout.engine.kind == "torch":
        return torch_engine_command(config)
    arguments, environment = sglang_arguments(config), sglang_environment(config)

    def command(port: int, admin_key: str) -> Launch:
        # Without a key for everything, /server_info would show the admin key to anyone who asks.
        keys = ["--api-key", admin_key, "--admin-api-key", admin_key]
        return Launch([*arguments, "--port", str(port), *keys], environment)

    return command


def torch_engine_command(config: Config) -> EngineCommand:
    """The in-house engine."""
    engine = config.rollout.engine

    def command(port: int, admin_key: str) -> Launch:
        options: dict[str, object] = {
            "--model-path": config.model.hf_checkpoint,
            "--port": port,
            "--max-running-requests": engine.max_running_requests,
            "--prefill-chunk": engine.prefill_chunk,
            "--stream-interval": engine.stream_interval,
            "--threads": engine.threads,
            "--dtype": config.model.dtype,
            "--random-seed": config.run.seed,
        }
        if engine.context_length is not None:
            options["--context-length"] = engine.context_length
        flags = ["--incremental-streaming-output"]
        if config.run.deterministic:
            flags.append("--enable-deterministic-inference")
        if not config.rollout.sampling.stop:
            # Only stop strings need text inside the engine: completions are decoded here.
            flags.append("--skip-tokenizer-init")
        arguments = [part for name, value in options.items() for part in (name, str(value))]
        # By its environment, the key stays out of the list of processes.
        environment = {ADMIN_KEY_VARIABLE: admin_key}
        return Launch([sys.executable, "-m", "services.rollout.engines.torch_engine", *arguments, *flags], environment)

    return command
