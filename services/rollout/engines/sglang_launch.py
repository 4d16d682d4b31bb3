"""SGLang's command line and environment. It runs in a Python environment of its own, which `make engine-env` makes."""

from __future__ import annotations

from pathlib import Path

from services.common.config import Config
from services.common.config.models import EngineConfig
from services.common.errors import ConfigError

_CHECKOUT = Path(__file__).parents[3]
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
    **dict.fromkeys(("host", "port", "api-key", "admin-api-key", "incremental-streaming-output"), ""),
}

# Pure torch: no CPU build of SGLang's kernels is published. Without the overlapped schedule, no forward pass is running
# when the scheduler answers a call, which is what makes a pause certain.
_CPU_FLAGS = {
    "attention-backend": "torch_native",
    "sampling-backend": "pytorch",
    "grammar-backend": "none",
    "mem-fraction-static": 0.1,
    "disable-overlap-schedule": True,
    "skip-server-warmup": True,
}


def sglang_arguments(config: Config) -> list[str]:
    """Interpreter, module and flags; the port and the keys are added at each start.

    Raises ConfigError when there is no such interpreter, or for a flag that is not the user's to set.
    """
    engine = config.rollout.engine
    options: dict[str, object] = {
        "model-path": config.model.hf_checkpoint,
        "host": "127.0.0.1",
        "device": engine.device,
        "dtype": config.model.dtype,
        "random-seed": config.run.seed,
        "max-running-requests": engine.max_running_requests,
        "stream-interval": engine.stream_interval,
        "incremental-streaming-output": True,
        # One line per request is more than the log of a long run can hold.
        "log-level-http": "warning",
    }
    if engine.context_length is not None:
        options["context-length"] = engine.context_length
    if not config.rollout.sampling.stop:
        # Only stop strings need text inside the engine: completions are decoded here.
        options["skip-tokenizer-init"] = True
    if engine.device == "cpu":
        options |= _CPU_FLAGS
        if engine.context_length is not None:
            options["max-total-tokens"] = engine.max_running_requests * engine.context_length
    for flag, value in engine.args.items():
        name = flag.replace("_", "-")
        if name in _OURS:
            reason = f"is set by {_OURS[name]}" if _OURS[name] else "is not to be set: every start needs its own value"
            raise ConfigError(reason, field=f"rollout.engine.args.{flag}")
        options[name] = value
    flags = [part for name, value in options.items() for part in _flag(name, value)]
    return [str(_interpreter(engine)), "-m", "sglang.launch_server", *flags]


def sglang_environment(config: Config) -> dict[str, str]:
    """What SGLang reads from its environment."""
    engine = config.rollout.engine
    # A module in the working directory must not take the place of one of SGLang's.
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    if engine.device == "cpu":
        return environment | {
            "PYTHONPATH": str(_CPU_SHIMS),
            "SGLANG_USE_CPU_ENGINE": "1",
            "OMP_NUM_THREADS": str(engine.threads),
        }
    # An in-place pause only sets a flag: with this, loading weights waits for the forward pass that is still running.
    return environment | {"SGLANG_FORCE_COARSE_WAR_BARRIER": "1"}


def _flag(name: str, value: object) -> list[str]:
    return [f"--{name}"] if value is True else [f"--{name}", str(value)]


def _interpreter(engine: EngineConfig) -> Path:
    if engine.python is not None:
        if not engine.python.is_file():
            raise ConfigError(f"{engine.python} is not a file", field="rollout.engine.python")
        # Not resolved: a virtual environment's interpreter is a link, and knows its environment by the link.
        return engine.python.absolute()
    default = _CHECKOUT / ".engines" / engine.device / "bin" / "python"
    if not (default.parents[1] / "engine.installed").is_file():
        raise ConfigError(
            f"SGLang is not installed in {default.parents[1]}: make engine-env, or name an interpreter here",
            field="rollout.engine.python",
        )
    return default
