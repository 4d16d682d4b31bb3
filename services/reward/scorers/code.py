"""Programs, judged by unit tests in a sandboxed process."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from services.reward import sandbox
from services.reward.sandbox.run import Limits, run
from services.reward.scorers.base import Item, Verdict
from services.reward.scorers.code_tests import Case, program_of, tests_of

_ASSERTS = (Path(sandbox.__file__).parent / "asserts.py").read_text()


class CodeScorer:
    """1 when the program passes all tests, else 0. Parts: ``passed``, the share of tests; ``timed_out``.

    All tests of a sample share `timeout_s`; a program that is killed at it, or at another limit, has failed the test it
    was on. Outputs are equal up to white space at the ends of lines and empty lines at the end; a program has to end
    with status 0. Raises SampleError for tests it cannot read, SandboxError when no sandbox can be had.
    """

    def __init__(self, *, timeout_s: float, memory_mb: int) -> None:
        self._timeout_s = timeout_s
        self._limits = Limits(memory_mb=memory_mb)

    def __call__(self, item: Item) -> Verdict:
        tests, program = tests_of(item), program_of(item.completion)
        if tests.asserts:
            passed, timed_out = self._run_asserts(program, tests.asserts)
        else:
            passed, timed_out = self._run_cases(program, tests.cases)
        total = len(tests.asserts) + len(tests.cases)
        return Verdict(float(passed == total), {"passed": passed / total, "timed_out": float(timed_out)})

    def _run_asserts(self, program: str, tests: Sequence[str]) -> tuple[int, bool]:
        """All in one process: what they test is loaded once."""
        key = secrets.token_hex(16)
        files = {"asserts.py": _ASSERTS, "solution.py": program}
        request = json.dumps({"key": key, "tests": list(tests)}) + "\n"
        outcome = run(files, "asserts.py", request, seconds=self._timeout_s, limits=self._limits)
        said, _, count = outcome.output.partition(" ")
        passed = int(count) if outcome.ended_well and said == key and count.isdigit() else 0
        return min(passed, len(tests)), outcome.timed_out

    def _run_cases(self, program: str, cases: Sequence[Case]) -> tuple[int, bool]:
        """A process each, until the time is over."""
        passed, deadline = 0, time.monotonic() + self._timeout_s
        for case in cases:
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                return passed, True
            outcome = run({"main.py": program}, "main.py", case.text, seconds=seconds, limits=self._limits)
            if outcome.timed_out:
                return passed, True
            passed += outcome.ended_well and _lines(outcome.output) == _lines(case.output)
        return passed, False


def _lines(output: str) -> list[str]:
    lines = [line.rstrip() for line in output.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines
