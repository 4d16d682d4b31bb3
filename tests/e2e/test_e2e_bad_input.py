"""Bad input: one clear line, a non-zero exit, nothing half-written."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import redis

from services.common.process import free_port
from tests.kit.engine_process import engine_environment, wait_healthy
from tests.kit.runs import Run, polyhead
from tests.kit.valkey import running

PLUGINS = """
import time
def raises(args, sample, **kwargs): raise RuntimeError("no judge today")
def hangs(args, sample, **kwargs): time.sleep(600)
def fine(args, sample, **kwargs): return 1.0
"""

# Stand-ins for the interpreter that has SGLang. This one answers like a version that is too old, and takes no flag that
# it does not know.
OLD_SGLANG = """
import argparse, json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
if "--no-such-flag" in sys.argv:
    argparse.ArgumentParser(prog="launch_server.py").error("unrecognized arguments: --no-such-flag 7")
class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        self.wfile.write(json.dumps({"version": "0.5.9", "context_length": 64}).encode())
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answer).serve_forever()
"""
CRASHING_SGLANG = """
raise RuntimeError("Not enough memory")
"""
# The in-house engine, but that it has no log-probs for prompts of one length.
POISON = "1+" * 15
NAN_ENGINE = f"""
import os
import numpy as np
from services.rollout.engines.torch_engine.__main__ import main
from services.rollout.engines.torch_engine.slot_table import SlotTable
append = SlotTable.append
def poisoned(self, slots, tokens, logprobs):
    append(self, slots, tokens, np.where(self.prompt_length[slots] == {len(POISON)}, np.nan, logprobs))
SlotTable.append = poisoned
os._exit(main())
"""


@pytest.fixture(scope="module")
def old_sglang(tmp_path_factory):
    return sglang(tmp_path_factory.mktemp("sglang"), OLD_SGLANG)


def sglang(directory: Path, source: str) -> tuple[str, ...]:
    """The flags of a run whose SGLang is this program."""
    python = directory / "python"
    python.write_text(f"#!{sys.executable}\n{source}")
    python.chmod(0o755)
    return ("--rollout.engine.kind", "sglang", "--rollout.engine.python", str(python))


@pytest.fixture
def nan_engine(tmp_path, inputs):
    """The address of an engine that has no log-probs for one prompt."""
    (tmp_path / "engine.py").write_text(NAN_ENGINE)
    port = free_port()
    command = [sys.executable, str(tmp_path / "engine.py"), "--model-path", str(inputs / "model"), "--port", str(port)]
    process = subprocess.Popen([*command, "--context-length", "64"], env=engine_environment())
    try:
        wait_healthy(f"http://127.0.0.1:{port}", process, within_s=60)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def other_model():
    """The address of an engine that serves another model, or 404s all that it is not asked about here."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"version": "0.5.23", "model_type": "llama"}).encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


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


def failed(tmp_path: Path, *arguments: str) -> str:
    """The line with which a run ends that could not know before it had begun."""
    result = polyhead(*arguments, "--run-dir", str(tmp_path / "run"))
    assert result.returncode == 2, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("polyhead: "), result.stderr
    return line


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


def test_a_flag_of_sglang_that_is_ours(tmp_path, flags, old_sglang):
    line = refused(tmp_path, *flags, *old_sglang, "--sglang-tp-size", "2")
    assert "rollout.engine.args.tp-size: is set by rollout.engine.gpus" in line


def test_gpus_that_do_not_make_whole_engines(tmp_path, flags):
    line = refused(tmp_path, *flags, "--rollout-num-gpus", "8", "--rollout-num-gpus-per-engine", "3")
    assert "--rollout-num-gpus: 8 GPUs cannot be shared out among engines with 3 GPUs per engine" in line


def test_a_router_that_is_not_installed(tmp_path, flags):
    python = shutil.which("false")
    line = refused(tmp_path, *flags, "--rollout.engines", "2", "--rollout.router.python", str(python))
    assert f"rollout.router.python: several engines need sglang-router, which {python} does not have" in line


def test_a_flag_of_the_router_that_is_ours(tmp_path, flags):
    line = refused(tmp_path, *flags, "--rollout.engines", "2", "--router-api-key", "secret")
    assert "rollout.router.args.api-key: is not to be set" in line


def test_an_external_engine_that_does_not_answer(tmp_path, flags):
    address = f"127.0.0.1:{free_port()}"
    line = refused(tmp_path, *flags, "--rollout-external-engine-addrs", address)
    assert f"rollout.engine.external: http://{address} does not answer: " in line


def test_external_engines_that_are_too_few(tmp_path, flags, other_model):
    line = refused(tmp_path, *flags, "--rollout-external-engine-addrs", other_model, "--rollout.replicas", "2")
    assert "rollout.engine.external: 1 engines cannot be shared out over 2 replicas" in line


@pytest.mark.long
def test_a_flag_that_sglang_does_not_know(tmp_path, flags, old_sglang):
    line = failed(tmp_path, *flags, *old_sglang, "--sglang-no-such-flag", "7")
    assert line.endswith("rollout failed: rollout.engine.args: unrecognized arguments: --no-such-flag 7")


def test_an_engine_that_ends_at_each_start(tmp_path, flags):
    line = failed(tmp_path, *flags, *sglang(tmp_path, CRASHING_SGLANG))
    assert "rollout failed: engine: ended with status 1; " in line
    assert line.endswith("| RuntimeError: Not enough memory")
    started = (tmp_path / "run" / "logs" / "engine-0.log").read_text().count("RuntimeError: Not enough memory")
    assert started == 3


@pytest.mark.long
@pytest.mark.timeout(180)
def test_what_cannot_be_generated_is_closed_counted_and_made_up_for(tmp_path, flags, inputs, nan_engine):
    """A prompt that is too long, and one that the engine has no log-probs for, among six others."""
    rows = (inputs / "prompts.jsonl").read_text().splitlines()[:6]
    poison, long = json.dumps({"prompt": POISON, "label": "15"}), json.dumps({"prompt": "1+" * 40, "label": "40"})
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join([*rows[:3], poison, *rows[3:], long]) + "\n")
    run = Run(
        tmp_path / "run",
        *(*flags, "--num-rollout", "4", "--prompt-data", str(data), "--run-dir", str(tmp_path / "run")),
        *("--rollout-external-engine-addrs", nan_engine, "--buffer.max_attempts", "2"),
    )
    assert run.finish(within_s=120) == 0, run.tail()
    summary = run.summary()
    assert [line["step"] for line in run.steps()] == [1, 2, 3, 4]
    trained = {ordinal % 8 for line in run.steps() for ordinal in line["prompt_ordinals"]}
    assert not trained & {3, 7}, "the two rows"
    assert summary["ledger"]["dropped"]["oversize"] >= 4
    # The first sample of a group that has failed twice is dead; its siblings go with the group.
    assert summary["ledger"]["dead"] >= 1
    assert (summary["ledger"]["dead"] + summary["ledger"]["dropped"]["group_dead"]) % 4 == 0
    assert "nan is not a log-probability" in (run.dir / "logs" / "rollout-0.log").read_text()
    assert summary["ledger_imbalance"] == 0


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
