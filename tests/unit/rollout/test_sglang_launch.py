"""How SGLang is started: what the settings become, and what is refused before anything starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.common.config import Config
from services.common.errors import ConfigError
from services.common.shared_directory import shared_directory
from services.rollout.engines import sglang_launch
from services.rollout.engines.launch import engine_command
from services.rollout.engines.python_module import module_command, secret_arguments
from services.rollout.engines.receiver import LOAD, PLUGIN_DIRECTORY, START


def configured(base: Config, **engine: Any) -> Config:
    """SGLang, with this test's own interpreter for its."""
    tree = base.model_dump()
    tree["rollout"]["engine"] |= {"kind": "sglang", "python": sys.executable, **engine}
    return Config.model_validate(tree)


def options(command: list[str]) -> dict[str, str]:
    flags = [index for index, part in enumerate(command) if part.startswith("--")]
    return {command[at]: "" if at + 1 in flags else "".join(command[at + 1 : at + 2]) for at in flags}


def test_the_settings_become_flags(base_config: Config) -> None:
    args = {"chunked_prefill_size": 8, "enable-metrics": True, "cuda-graph-bs": [1, 2]}
    config = configured(base_config, context_length=64, max_running_requests=4, args=args)
    launch = engine_command(config)(123, "secret")
    command = list(launch.command)
    assert command[:2] == [sys.executable, "-c"]
    assert "sglang.launch_server" in command[2]
    flags = options(command)
    assert Path(flags["--model-path"]) == config.model.hf_checkpoint
    assert (flags["--host"], flags["--port"]) == ("127.0.0.1", "123")
    assert (flags["--context-length"], flags["--max-running-requests"], flags["--max-total-tokens"]) == (
        "64",
        "4",
        "256",
    )
    assert (flags["--tp-size"], flags["--chunked-prefill-size"], flags["--enable-metrics"]) == ("1", "8", "")
    at = command.index("--cuda-graph-bs")
    assert command[at + 1 : at + 3] == ["1", "2"]
    assert flags["--attention-backend"] == "torch_native"
    assert "--incremental-streaming-output" in flags
    assert "--disable-overlap-schedule" not in flags
    assert "--skip-tokenizer-init" in flags
    assert launch.environment["OMP_NUM_THREADS"] == "1"
    assert launch.environment["SGLANG_USE_CPU_ENGINE"] == "1"


def test_an_argument_of_the_user_replaces_a_default(base_config: Config) -> None:
    command = list(engine_command(configured(base_config, args={"mem_fraction_static": 0.4}))(1, "").command)
    assert command.count("--mem-fraction-static") == 1
    assert options(command)["--mem-fraction-static"] == "0.4"


def test_a_gpu_gets_nothing_that_is_for_cpus(base_config: Config) -> None:
    launch = engine_command(configured(base_config, device="cuda", context_length=64))(1, "")
    flags = options(list(launch.command))
    assert flags["--device"] == "cuda"
    assert not {"--attention-backend", "--disable-overlap-schedule", "--max-total-tokens"} & flags.keys()
    assert launch.environment["SGLANG_FORCE_COARSE_WAR_BARRIER"] == "1"
    assert launch.environment["PYTHONPATH"] == str(PLUGIN_DIRECTORY), "this service's packages are none of SGLang's"
    assert "SGLANG_USE_CPU_ENGINE" not in launch.environment


def test_weights_arrive_ahead_of_a_pause_where_there_is_memory_for_them(base_config: Config, tmp_path: Path) -> None:
    config = configured(base_config, staging_mb=64)
    config.run.dir = tmp_path
    launch = engine_command(config)(1, "")
    place = list(launch.command).index("--custom-weight-loader")
    assert list(launch.command)[place + 1 : place + 3] == [START, LOAD]
    assert launch.receiver is not None
    assert launch.receiver.memory_bytes == 64 << 20
    without = engine_command(configured(base_config, staging_mb=0))(1, "")
    assert without.receiver is None
    assert "--custom-weight-loader" not in without.command


def test_an_engine_on_the_trainers_gpu_can_sleep(base_config: Config, tmp_path: Path) -> None:
    for device, sleeps in (("cuda", True), ("cpu", False)):
        config = configured(base_config, device=device)
        config.run.dir, config.run.colocate, config.trainer.weights.backend = tmp_path, True, "ipc"
        launch = engine_command(config)(1, "")
        assert ("--enable-memory-saver" in launch.command) == sleeps
        assert launch.environment["POLYHEAD_SHARED_DIR"] == str(shared_directory(tmp_path))


@pytest.mark.parametrize(("replica", "engine", "first"), [(0, 0, 4), (0, 2, 8), (1, 0, 10), (2, 1, 18)])
def test_each_engine_has_gpus_of_its_own(base_config: Config, replica: int, engine: int, first: int) -> None:
    config = configured(base_config, device="cuda", gpus=2, base_gpu=4)
    config.rollout.engines = 3
    flags = options(list(engine_command(config, replica, engine)(1, "").command))
    assert (flags["--base-gpu-id"], flags["--tp-size"]) == (str(first), "2")


def test_keys_and_sockets_are_the_engines_own(base_config: Config, tmp_path: Path) -> None:
    config = configured(base_config)
    config.run.dir = tmp_path
    left = tmp_path / "tmp" / "engine-1-2" / "left"
    left.parent.mkdir(parents=True)
    left.touch()
    launch = engine_command(config, 1, 2)(1, "-secret")
    assert "-secret" not in " ".join(launch.command)
    assert "--api-key=-secret" in " ".join(launch.environment.values())
    assert launch.scratch == Path(launch.environment["TMPDIR"]) == left.parent
    assert not left.exists(), "what an engine that was killed has left goes at the next start"
    config.run.dir = tmp_path / ("x" * 100)
    assert engine_command(config)(1, "").scratch is None, "a socket's name would be too long"


def test_the_program_sees_its_arguments_and_its_children_do_not_see_the_secret(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import os, sys\n"
        "if __name__ == '__main__':\n"
        "    print(sys.argv[1:], 'the-key' in str(os.environ), __spec__.name)\n"
    )
    command = module_command(Path(sys.executable), "program", ["--port", "1"])
    environment = {**os.environ, **secret_arguments("--key=the-key"), "PYTHONPATH": str(tmp_path)}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert output.stdout == "['--port', '1', '--key=the-key'] False program\n"


def test_stop_strings_need_the_engines_tokenizer(base_config: Config) -> None:
    config = configured(base_config)
    config.rollout.sampling.stop = ["x"]
    assert "--skip-tokenizer-init" not in engine_command(config)(1, "").command


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"model_path": "x"}, r"args.model_path: is set by model.hf_checkpoint"),
        ({"port": 1}, r"args.port: is not to be set"),
        ({"tp": 2}, r"args.tp: is set by rollout.engine.gpus"),
        ({"base-gpu-id": 2}, r"args.base-gpu-id: is set by rollout.engine.base_gpu"),
        ({"pp_size": 2}, r"args.pp_size: is not to be set"),
        ({"nnodes": 2}, r"args.nnodes: is not to be set"),
        ({"weight-version": "1"}, r"args.weight-version: is not to be set"),
        ({"ssl-keyfile": "x"}, r"args.ssl-keyfile: is not to be set"),
        ({"admin-api": "x"}, r"args.admin-api: is short for admin-api-key, which is not to be set"),
        ({"max-run": 2}, r"args.max-run: is short for max-running-requests, which is set by rollout.engine.max_run"),
    ],
)
def test_flags_that_are_ours_are_refused(base_config: Config, args: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        engine_command(configured(base_config, args=args))


@pytest.mark.parametrize("args", [{"--tp": 2}, {"a b": 1}, {"enable-metrics": False}])
def test_names_that_are_no_flags_are_refused(base_config: Config, args: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="flag"):
        configured(base_config, args=args)


def test_an_environment_that_was_not_made_says_how(base_config: Config, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sglang_launch, "_CHECKOUT", tmp_path)
    with pytest.raises(ConfigError, match=r"rollout.engine.python: SGLang is not installed in .*cpu: make engine-env"):
        engine_command(configured(base_config, python=None))
    with pytest.raises(ConfigError, match=r"rollout.engine.python: .*nowhere is not a file"):
        engine_command(configured(base_config, python=tmp_path / "nowhere"))


def test_a_deterministic_run_needs_the_in_house_engine(base_config: Config) -> None:
    tree = configured(base_config).model_dump()
    tree["run"]["deterministic"], tree["staleness"]["max_staleness"] = True, 0
    with pytest.raises(ValueError, match=r"rollout\.engine\.kind"):
        Config.model_validate(tree)


def test_missing_kernels_can_be_imported_but_not_called() -> None:
    script = (
        "import sys\nfrom sgl_kernel import some_kernel_cpu\n"
        "assert 'torchvision._meta_registrations' in sys.modules\n"
        "try:\n    some_kernel_cpu(1)\nexcept NotImplementedError as error:\n    print(error)\n"
    )
    shims = Path(sglang_launch.__file__).parent / "sglang_cpu"
    environment = {**os.environ, "PYTHONPATH": str(shims)}
    output = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "sgl_kernel.some_kernel_cpu" in output.stdout
