"""SGLang's command line and environment. It runs in a Python environment of its own, which `make engine-env` makes."""

from __future__ import annotations

import os
from pathlib import Path

from services.common.config import Config
from services.common.config.models import EngineConfig, RewardEngineConfig
from services.common.errors import ConfigError
from services.rollout.capacity import DEFAULT_SLOTS
from services.rollout.engines.python_module import flags_of, user_flags
from services.rollout.engines.receiver import LOAD, PLUGIN_DIRECTORY, START

_CHECKOUT = Path(__file__).parents[3]
# A socket's name may have 107 characters, with "/tmp" and 8 random ones after this.
_SCRATCH_MAX = 90
_CPU_SHIMS = Path(__file__).parent / "sglang_cpu"

# Flags that have a setting of their own, or whose value only we can know.
_OURS = {
    "model-path": "model.hf_checkpoint",
    "dtype": "model.dtype",
    "random-seed": "run.seed",
    "device": "rollout.engine.device",
    "context-length": "rollout.engine.context_length",
    "max-running-requests": "rollout.engine.max_running_requests",
    "stream-interval": "rollout.engine.stream_interval",
    "base-gpu-id": "rollout.engine.base_gpu",
    "model": "model.hf_checkpoint",
    **dict.fromkeys(("tp-size", "tp", "tensor-parallel-size"), "rollout.engine.gpus"),
    # Each rank of another kind would have to be a member of the weight group.
    **dict.fromkeys(("dp-size", "dp", "data-parallel-size"), "rollout.engines"),
    **dict.fromkeys(("pp-size", "pp", "pipeline-parallel-size", "nnodes", "node-rank"), ""),
    **dict.fromkeys(("host", "port", "api-key", "admin-api-key", "incremental-streaming-output", "config"), ""),
    # Engines are told their version with their weights, and are called over plain HTTP on this machine.
    "weight-version": "",
    "custom-weight-loader": "rollout.engine.staging_mb",
    "enable-memory-saver": "run.colocate",
    **dict.fromkeys(("ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "ssl-keyfile-password", "enable-ssl-refresh"), ""),
}

# Pure torch: no CPU build of SGLang's kernels is published.
CPU_FLAGS = {
    "attention-backend": "torch_native",
    "sampling-backend": "pytorch",
    "grammar-backend": "none",
    "mem-fraction-static": 0.1,
    "skip-server-warmup": True,
}


def sglang_flags(config: Config, replica: int, index: int) -> list[str]:
    """The flags of engine `index` of a replica; the port and the keys are added at each start.

    Raises ConfigError for a flag that is not the user's to set.
    """
    engine = config.rollout.engine
    options: dict[str, object] = {
        "model-path": config.model.hf_checkpoint,
        "host": "127.0.0.1",
        "device": engine.device,
        "dtype": config.model.dtype,
        "random-seed": config.run.seed,
        "tp-size": engine.gpus,
        "stream-interval": engine.stream_interval,
        "incremental-streaming-output": True,
        # Else its scheduler keeps a core busy, and the receiver's threads wait for their turns there.
        "sleep-on-idle": True,
        # One line per request is more than the log of a long run can hold.
        "log-level-http": "warning",
    }
    if engine.context_length is not None:
        options["context-length"] = engine.context_length
    if engine.float32_logits and config.model.dtype == "bfloat16":
        options["enable-fp32-lm-head"] = True
    if not config.rollout.sampling.stop:
        # Only stop strings need text inside the engine: completions are decoded here.
        options["skip-tokenizer-init"] = True
    slots = engine.max_running_requests
    if engine.device == "cpu":
        slots = slots or DEFAULT_SLOTS
        options |= CPU_FLAGS
        if engine.context_length is not None:
            options["max-total-tokens"] = slots * engine.context_length
    else:
        if config.run.colocate and config.run.offload_rollout:
            options["enable-memory-saver"] = True
        options["base-gpu-id"] = engine.base_gpu + (replica * config.rollout.engines + index) * engine.gpus
    if slots is not None:
        options["max-running-requests"] = slots
    if receives_ahead(config, replica, index):
        options["custom-weight-loader"] = [START, LOAD]
    return flags_of(options | user_flags(engine.args, _OURS, "rollout.engine.args"))


def cpu_environment(threads: int) -> dict[str, str]:
    """What SGLang without a GPU reads from its environment."""
    return {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (_CPU_SHIMS, PLUGIN_DIRECTORY))),
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": str(threads),
    }


def sglang_environment(config: Config) -> dict[str, str]:
    """What SGLang reads from its environment."""
    engine = config.rollout.engine
    if engine.device == "cpu":
        return cpu_environment(engine.threads)
    # An in-place pause only sets a flag: with this, loading weights waits for the forward pass that is still running.
    # This service's own packages are none of SGLang's.
    return {
        "HF_HUB_OFFLINE": "1",
        "SGLANG_FORCE_COARSE_WAR_BARRIER": "1",
        "PYTHONPATH": str(PLUGIN_DIRECTORY),
    }


def receives_ahead(config: Config, replica: int, index: int) -> bool:
    """Whether weights arrive at this engine ahead of the pause. They need a place for its sockets."""
    return config.rollout.engine.staging_mb > 0 and sglang_scratch(config, replica, index) is not None


def sglang_scratch(config: Config, replica: int, index: int) -> Path | None:
    """Where this engine keeps its sockets; None when they would have names that are too long for sockets."""
    directory = config.run.dir.absolute() / "tmp" / f"engine-{replica}-{index}"
    return directory if len(str(directory)) <= _SCRATCH_MAX else None


def sglang_python(engine: EngineConfig | RewardEngineConfig, field: str = "rollout.engine.python") -> Path:
    """The interpreter that has SGLang. Raises ConfigError, of `field`, when there is none."""
    if engine.python is not None:
        if not engine.python.is_file():
            raise ConfigError(f"{engine.python} is not a file", field=field)
        # Not resolved: a virtual environment's interpreter is a link, and knows its environment by the link.
        return engine.python.absolute()
    default = _CHECKOUT / ".engines" / engine.device / "bin" / "python"
    if not (default.parents[1] / "engine.installed").is_file():
        raise ConfigError(
            f"SGLang is not installed in {default.parents[1]}: make engine-env, or name an interpreter here",
            field=field,
        )
    return default
