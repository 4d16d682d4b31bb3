"""Programs, their tests, and every way in which a program ends.

Tests come in the forms of the published data sets: lists of asserts as in MBPP (arXiv 2108.07732), a text that ends
with `check(entry_point)` as in HumanEval (arXiv 2107.03374), inputs and outputs as in APPS (arXiv 2105.09938).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from services.reward.jobs import FailureKind
from services.reward.sandbox.run import Limits, SandboxError, run
from services.reward.scorers import build, code_tests
from services.reward.scorers.base import SampleError, ScorerUnavailableError
from services.reward.scorers.builtin import Options
from services.reward.scorers.code_tests import Case, program_of
from tests.kit.reward_items import item, running_pool

scorer = build("code", paths=[], args={}, options=Options(code_timeout_s=4.0, code_memory_mb=256))
ADD = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add(0, 0) == 0"]
HUMAN_EVAL = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n\ncheck(add)\n"
DOUBLE = {"inputs": ["1\n", "21\n"], "outputs": ["2\n", "42\n"]}

# program, tests, share of them that it passes
PROGRAMS: list[tuple[str, Any, float]] = [
    ("def add(a, b): return a + b", ADD, 1.0),
    ("def add(a, b): return a + b", "\n".join(ADD), 1.0),
    ("def add(a, b): return a + b", HUMAN_EVAL, 1.0),
    ("def add(a, b): return a - b", HUMAN_EVAL, 0.0),
    ("def add(a, b): return abs(a + b) or 1", ADD, 1 / 3),
    ("def add(a, b): return 3", "\n".join(ADD), 0.0),
    ("def sub(a, b): return a - b", ADD, 0.0),
    ("def add(a, b: return", ADD, 0.0),
    ("", ADD, 0.0),
    ("print('KEY 3'); add = lambda a, b: a + b", ADD, 1.0),
    ("import sys; sys.exit(0)", ADD, 0.0),
    *((f"import os; os._exit({status})", ADD, 0.0) for status in (1, 125, 255)),
    ("import os; os._exit(0)", ADD, 0.0),
    ("import os; os.kill(os.getpid(), 9); os._exit(0)", ADD, 0.0),
    ("print('3'); raise SystemExit", ADD, 0.0),
    ("def add(a, b):\n    raise SystemExit(0)", ADD, 0.0),
    ("add = lambda a, b: a + b\nif __name__ == '__main__':\n    add = None", ADD, 1.0),
    ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int'\nadd = lambda a, b: P(a + b).x", ADD, 1.0),
    ("x = '\x00'", ADD, 0.0),
    ("x = '\ud800'", ADD, 0.0),
    ("print(2 * int(input()))", DOUBLE, 1.0),
    ("print(2 * int(input()), end='')", DOUBLE, 1.0),
    ("print(2 * int(input()), '  \\n\\n')", DOUBLE, 1.0),
    ("print(2)", DOUBLE, 0.5),
    ("print(2 * int(input())); 1 / 0", DOUBLE, 0.0),
    ("input(); input()", DOUBLE, 0.0),
    ("print(' 2')", [{"input": "", "output": "2"}], 0.0),
    ("import sys; print(sys.stdin.read()[::-1])", [{"input": ["ab", "c"], "output": "c\nba"}], 1.0),
    ("print(input())", [{"input": "４２ é \x00", "output": "４２ é \x00"}], 1.0),
    ("import sys; sys.stdout.buffer.write(b'\\xff')", [{"input": "", "output": "\ufffd"}], 1.0),
    ("x = 'a' * 10**10", [{"input": "", "output": ""}], 0.0),
    ("print('x' * 10**8)", [{"input": "", "output": "x"}], 0.0),
    ("open('big', 'w').write('x' * 10**8)", [{"input": "", "output": ""}], 0.0),
    ("import numpy", [{"input": "", "output": ""}], 0.0),
    ("open('a', 'w').write('x'); print(open('a').read())", [{"input": "", "output": "x"}], 1.0),
]
BLOCKS = [
    ("```python\na = 1\n```", "a = 1"),
    ("First\n```py\na = 1\n```\nthen\n```\na = 2\n```\nbye", "a = 2"),
    ("```python\na = 1\n```\n```json\n{}\n```", "a = 1"),
    ("```json\n{}\n```\nno more", "```json\n{}\n```\nno more"),
    ("```python\na = 1", "a = 1"),
    ("<think>```python\na = 1\n```</think>\n```python3\na = 2\n```", "a = 2"),
    ("a = 1", "a = 1"),
    ("", ""),
]
UNREADABLE = [
    ("", "there are no tests"),
    ("[]", "there are no tests"),
    ('{"inputs": ["1"], "outputs": []}', "no lists of one length"),
    ('{"inputs": "1", "outputs": "1"}', "no lists of one length"),
    ('{"fn_name": "f", "inputs": [[1]], "outputs": [1]}', "fn_name are not supported"),
    ('{"x": 1}', "no lists of one length"),
    ('[{"input": 1, "output": "1"}]', "an input or output is a int, not a text"),
    ('[{"input": "1"}]', "an input or output is a NoneType, not a text"),
    ('["assert True", 7]', "neither Python, nor a list of asserts"),
    (json.dumps(["assert True"] * 1001), "more than 1000"),
]


@pytest.mark.parametrize(("program", "tests", "passed"), PROGRAMS)
def test_a_program(program: str, tests: Any, passed: float) -> None:
    fenced = f"Here:\n```python\n{program}\n```"
    verdict = scorer(item(fenced, "unused", metadata_json=json.dumps({"tests": tests})))
    assert verdict == (float(passed == 1.0), {"passed": passed, "timed_out": 0.0}, ())


@pytest.mark.parametrize(("completion", "program"), BLOCKS)
def test_the_program_of_a_completion(completion: str, program: str) -> None:
    assert program_of(completion) == program


@pytest.mark.parametrize(("label", "message"), UNREADABLE)
def test_tests_that_are_none_are_a_failure(label: str, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        scorer(item("pass", label))


def test_tests_in_the_label() -> None:
    assert code_tests.tests_of(item("", json.dumps(DOUBLE))).cases == [Case("1\n", "2\n"), Case("21\n", "42\n")]
    assert code_tests.tests_of(item("", "assert [1]")).asserts == ["assert [1]"]
    assert code_tests.tests_of(item("", "[1] == f() or True")).asserts == ["[1] == f() or True"]


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time; time.sleep(60)", "import os\nwhile os.fork(): pass"]
)
def test_a_program_that_does_not_end(program: str) -> None:
    short = build("code", paths=[], args={}, options=Options(code_timeout_s=1.0, code_memory_mb=128))
    begun = time.monotonic()
    verdict = short(item(program, '[{"input": "", "output": ""}]'))
    assert verdict == (0.0, {"passed": 0.0, "timed_out": 1.0}, ())
    assert time.monotonic() - begun < 20


def test_a_sandbox_that_cannot_be_had_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.reward.sandbox.run._LAUNCH", "/nowhere/launch.py")
    with pytest.raises(SandboxError, match="could not be set up"):
        scorer(item("print(1)", '[{"input": "", "output": "1"}]'))
    assert issubclass(SandboxError, ScorerUnavailableError)


def test_a_disk_that_takes_no_program_is_no_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(SandboxError, match="could not be set up: No such file or directory"):
        scorer(item("print(1)", '[{"input": "", "output": "1"}]'))


def _namespaces() -> bool:
    """Whether this kernel gives a process namespaces of its own: it has hidden those of others."""
    return run({"m.py": "import os; print(os.getpid())"}, "m.py", "", seconds=10, limits=Limits()).output == "1\n"


def test_what_a_program_leaves_behind_ends_with_it() -> None:
    if not _namespaces():
        pytest.skip("needs namespaces")
    leaves = "import os, time\nif not os.fork():\n    os.setsid()\n    time.sleep(654.321)\nprint('left')"
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    assert scorer(item(leaves, '[{"input": "", "output": "left"}]')).reward == 1.0
    left = [child for child in psutil.process_iter(["cmdline"]) if "launch.py" in " ".join(child.info["cmdline"] or [])]
    assert not [child for child in left if child.ppid() == 1]
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_no_network() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)\nprint('connected')"
        assert scorer(item(program, '[{"input": "", "output": "connected"}]')).reward == 0.0


def test_nothing_of_ours_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYHEAD_STORE__PASSWORD", "secret")
    program = (
        "import glob, os\nsaid = repr(os.environ)\n"
        "for path in glob.glob('/proc/[0-9]*/environ'):\n"
        "    try: said += open(path).read()\n    except OSError: pass\n"
        "print('secret' in said, os.listdir('.'))"
    )
    outcome = run({"m.py": program}, "m.py", "", seconds=10, limits=Limits())
    assert outcome.output == "False ['m.py']\n"


def test_files_outside_are_not_written(tmp_path: Path) -> None:
    if not _namespaces():
        pytest.skip("needs namespaces")
    target = tmp_path / "target"
    target.write_text("ours")
    program = f"try:\n    open({str(target)!r}, 'w').write('theirs')\nexcept OSError as error:\n    print(error.errno)"
    assert run({"m.py": program}, "m.py", "", seconds=10, limits=Limits()).output == "30\n"
    assert target.read_text() == "ours"


def test_where_there_are_no_namespaces_sockets_are_refused() -> None:
    here = str(Path(run.__code__.co_filename).parent)
    guarded = (
        f"import sys\nsys.path.insert(0, {here!r})\n"
        "try:\n    import launch\n    launch._guard_network()\nexcept PermissionError:\n    pass  # it is on already\n"
        "import socket\ntry:\n    socket.socket()\nexcept PermissionError as error:\n    print(error)"
    )
    outcome = run({"m.py": guarded}, "m.py", "", seconds=10, limits=Limits())
    assert outcome.output == "socket.__new__ is not allowed here\n"


async def test_a_pool_that_is_killed_takes_its_programs_along() -> None:
    async with running_pool("code", timeout_s=1.5) as pool:
        [pid] = pool.pids()
        seen: set[int] = set()
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.05):
                try:
                    seen.update(child.pid for child in psutil.Process(pid).children(recursive=True))
                except psutil.NoSuchProcess:
                    return

        watcher = threading.Thread(target=watch)
        watcher.start()
        [result] = await pool.score([item("import time; time.sleep(600)", '[{"input": "", "output": ""}]')])
        stop.set()
        watcher.join()
        assert result.failure is FailureKind.TIMED_OUT
    assert seen
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(one) and one != os.getpid() for one in seen) and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    assert not [one for one in seen if psutil.pid_exists(one)]
