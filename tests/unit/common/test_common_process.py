"""Child processes, user functions, logs, and how a service process begins and ends."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import structlog

from services.common import plugins, process
from services.common.errors import ConfigError
from services.common.telemetry import configure_logging

ROOT = Path(__file__).parents[3]
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"}

PARENT = """
import sys, time
from pathlib import Path
from services.common.process import spawn
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_DFL); print('up', flush=True); time.sleep(600)"
child = spawn([sys.executable, "-c", code], log_path=Path(sys.argv[1]))
print(child.pid, flush=True)
time.sleep(600)
"""

SERVICE = """
import asyncio, sys
from services.common.errors import FencedError
from services.common.lifecycle import run_service

async def serve(config, process):
    print(process.role, process.index, process.replica_id, flush=True)
    if config.run.name == "fenced":
        raise FencedError("epoch 4 is newer", field="epoch")
    await process.stop.wait()
    if config.run.name == "stubborn":
        await asyncio.sleep(600)

sys.exit(run_service("trainer", serve))
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=ENV,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def until_gone(pid: int) -> None:
    gone, _ = psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=20)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, gone


def test_a_spawned_child_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    with start(PARENT, str(tmp_path / "log")) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert psutil.Process(child).ppid() == parent.pid
        parent.kill()
        parent.wait()
        until_gone(child)


def test_a_spawned_child_has_its_own_session_and_its_log(tmp_path: Path) -> None:
    log = tmp_path / "deep" / "log"
    child = process.spawn(
        [sys.executable, "-c", "import os; print(os.environ['GREETING'], os.getsid(0))"],
        log_path=log,
        env={"GREETING": "hello"},
    )
    assert child.wait(20) == 0
    assert log.read_text() == f"hello {child.pid}\n"
    assert child.pid != os.getsid(0)
    again = process.spawn(["sh", "-c", "echo more; echo error >&2"], log_path=log)
    assert again.wait(20) == 0
    assert process.last_lines(log, 2) == "more\nerror"


def test_a_child_whose_parent_is_already_gone_ends_at_once() -> None:
    code = "import sys; from services.common.process import die_with_parent; die_with_parent(int(sys.argv[1]))"
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert subprocess.run([sys.executable, "-c", code, str(gone.pid)], env=ENV, timeout=20).returncode == 1


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", process.free_port()))


def test_last_lines_of_nothing() -> None:
    assert process.last_lines(Path("/nowhere/log")) == ""


def test_logs_are_json_lines_with_the_service() -> None:
    saved = structlog.get_config()
    stream = io.StringIO()
    try:
        configure_logging("reward", 1, stream=stream)
        structlog.get_logger().info("scored", sample_id="g1-000")
        structlog.get_logger().debug("not seen")
    finally:
        structlog.configure(**saved)
        structlog.contextvars.clear_contextvars()
    [line] = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert (entry["service"], entry["event"], entry["level"]) == ("reward-1", "scored", "info")
    assert entry["sample_id"] == "g1-000"


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "their_package").mkdir()
    (tmp_path / "their_package" / "__init__.py").write_text("")
    (tmp_path / "their_package" / "good.py").write_text("def fn():\n    return 42\nvalue = 3\n")
    (tmp_path / "their_package" / "broken.py").write_text("def fn(:\n")
    (tmp_path / "their_package" / "raises.py").write_text("raise RuntimeError('no GPU here')\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.startswith("their_package")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


@pytest.mark.parametrize("path", ["their_package.good:fn", "their_package.good.fn"])
def test_functions_are_loaded_by_both_spellings(modules: Path, path: str) -> None:
    assert plugins.load_function(path, field="x", search=[modules])() == 42


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("fn", "reward.scorer: 'fn' is not of the form pkg.mod:fn"),
        ("their_package.good:", "reward.scorer: 'their_package.good:' is not of the form pkg.mod:fn"),
        (":fn", "reward.scorer: ':fn' is not of the form pkg.mod:fn"),
        ("their_package.good:nothing", "reward.scorer: their_package.good has no function 'nothing'"),
        ("their_package.good:value", "reward.scorer: their_package.good has no function 'value'"),
        ("their_package.none:fn", "reward.scorer: their_package.none does not import: ModuleNotFoundError"),
        ("their_package.broken:fn", "reward.scorer: their_package.broken does not import: SyntaxError"),
        ("their_package.raises:fn", "reward.scorer: their_package.raises does not import: RuntimeError: no GPU here"),
    ],
)
def test_functions_that_cannot_be_loaded_are_told_in_one_line(modules: Path, path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plugins.load_function(path, field="reward.scorer", search=[modules])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def start_service(tmp_path: Path, name: str) -> subprocess.Popen[str]:
    (tmp_path / "run.toml").write_text(f"[run]\nname = '{name}'\n")
    return start(SERVICE, "-c", str(tmp_path / "run.toml"), "--index", "3")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_leaves_on_the_first_signal(tmp_path: Path, number: signal.Signals) -> None:
    with start_service(tmp_path, "a") as service:
        assert service.stdout is not None
        role, index, replica_id = service.stdout.readline().split()
        assert (role, index, replica_id[:10]) == ("trainer", "3", "trainer-3.")
        service.send_signal(number)
        _, errors = service.communicate(timeout=20)
    assert service.returncode == 0
    assert [json.loads(line)["event"] for line in errors.splitlines()] == ["starting", "stopping", "stopped"]


def test_a_second_signal_ends_a_service_that_does_not_leave(tmp_path: Path) -> None:
    with start_service(tmp_path, "stubborn") as service:
        assert service.stdout is not None
        assert service.stderr is not None
        service.stdout.readline()
        service.send_signal(signal.SIGTERM)
        while "stopping" not in service.stderr.readline():
            pass
        service.send_signal(signal.SIGTERM)
        assert service.wait(20) == 1


def test_a_typed_error_is_one_line_and_its_own_exit_status(tmp_path: Path) -> None:
    with start_service(tmp_path, "fenced") as service:
        _, errors = service.communicate(timeout=20)
    assert service.returncode == 3
    assert [line for line in errors.splitlines() if not line.startswith("{")] == [
        "polyhead trainer: epoch: epoch 4 is newer"
    ]


def test_a_wrong_configuration_is_one_line(tmp_path: Path) -> None:
    with start_service(tmp_path, "a b") as service:
        _, errors = service.communicate(timeout=20)
    assert service.returncode == 2
    assert [line for line in errors.splitlines() if line.startswith("polyhead")] == [
        "polyhead trainer: run.name: must be 1 to 64 letters, digits, '-', '_' or '.'"
    ]
