"""How each kind of engine is started: command line and environment, from the run's configuration."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from services.common.config import Config
from services.common.shared_directory import VARIABLE as SHARED_VARIABLE
from services.common.shared_directory import shared_directory
from services.rollout.capacity import DEFAULT_SLOTS
from services.rollout.engines.python_module import flags_of, module_command, secret_arguments
from services.rollout.engines.receiver import DIRECTORY_VARIABLE, EngineReceiver
from services.rollout.engines.sglang_launch import (
    receives_ahead,
    sglang_environment,
    sglang_flags,
    sglang_python,
    sglang_scratch,
)
from services.rollout.engines.torch_engine.options import ADMIN_KEY_VARIABLE


class Launch(NamedTuple):
    """One engine process to be."""

    command: Sequence[str]
    environment: Mapping[str, str] = {}
    """Added to this process's own."""
    scratch: Path | None = None
    """A directory of its own for what it leaves behind: to be removed when it has ended."""
    receiver: EngineReceiver | None = None
    """Where weights arrive ahead of a pause; None when the engine receives them by its own means."""


# (port, admin key) -> what to start
EngineCommand = Callable[[int, str], Launch]


def engine_command(config: Config, replica: int = 0, engine: int = 0) -> EngineCommand:
    """The configured kind of engine, as this one of the run's. Raises ConfigError when it cannot be started so."""
    if config.rollout.engine.kind == "torch":
        return torch_engine_command(config)
    python, flags = sglang_python(config.rollout.engine), sglang_flags(config, replica, engine)
    environment = sglang_environment(config)
    if config.trainer.weights.backend == "ipc":
        environment |= {SHARED_VARIABLE: str(shared_directory(config.run.dir))}
    scratch = sglang_scratch(config, replica, engine)
    receiver = None
    if scratch is not None and receives_ahead(config, replica, engine):
        receiver = EngineReceiver(scratch, config.rollout.engine.gpus, config.rollout.engine.staging_mb << 20)

    def command(port: int, admin_key: str) -> Launch:
        # Without a key for everything, /server_info would show the admin key to anyone who asks.
        secrets = secret_arguments(f"--api-key={admin_key}", f"--admin-api-key={admin_key}")
        if scratch is not None:
            # What an engine that was killed has left goes first.
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True, mode=0o700)  # whoever reaches its sockets gives it weights
            secrets = {**secrets, "TMPDIR": str(scratch), DIRECTORY_VARIABLE: str(scratch)}
        launched = module_command(python, "sglang.launch_server", [*flags, "--port", str(port)])
        return Launch(launched, {**environment, **secrets}, scratch, receiver)

    return command


def torch_engine_command(config: Config) -> EngineCommand:
    """The in-house engine."""
    engine = config.rollout.engine

    def command(port: int, admin_key: str) -> Launch:
        options: dict[str, object] = {
            "model-path": config.model.hf_checkpoint,
            "port": port,
            "max-running-requests": engine.max_running_requests or DEFAULT_SLOTS,
            "prefill-chunk": engine.prefill_chunk,
            "stream-interval": engine.stream_interval,
            "threads": engine.threads,
            "dtype": config.model.dtype,
            "random-seed": config.run.seed,
            "incremental-streaming-output": True,
        }
        if engine.decode_rate is not None:
            options["decode-rate"] = engine.decode_rate
        if engine.context_length is not None:
            options["context-length"] = engine.context_length
        if config.run.colocate and config.run.offload_rollout:
            options["enable-memory-saver"] = True
        if config.trainer.weights.backend == "ipc":
            options["shared-weights-dir"] = shared_directory(config.run.dir)
        if config.run.deterministic:
            options["enable-deterministic-inference"] = True
        if not config.rollout.sampling.stop:
            # Only stop strings need text inside the engine: completions are decoded here.
            options["skip-tokenizer-init"] = True
        flags = flags_of(options | engine.args)
        # By its environment, the key stays out of the list of processes.
        environment = {ADMIN_KEY_VARIABLE: admin_key}
        return Launch([sys.executable, "-m", "services.rollout.engines.torch_engine", *flags], environment)

    return command
