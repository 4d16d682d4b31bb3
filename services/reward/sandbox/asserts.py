"""Runs inside the sandbox, as its program: loads solution.py as a module and executes test texts in its namespace.

The first line of the input is JSON, ``{"key": …, "tests": [texts]}``. The answer is ``KEY PASSED``. A program that
ends the process, or writes what it likes, does not know the key: it has passed nothing.
"""

import json
import os
import sys
import types


def main() -> None:
    request = json.loads(sys.stdin.readline())
    answer, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    with open("solution.py", encoding="utf-8") as file:  # noqa: PTH123 - pathlib would be one more import per run
        exec(compile(file.read(), "solution.py", "exec"), module.__dict__)  # noqa: S102 - what the sandbox is for
    passed = sum(_passes(test, module) for test in request["tests"])
    os.write(answer, f"{request['key']} {passed}".encode())
    os._exit(0)


def _passes(test: str, module: types.ModuleType) -> bool:
    try:
        exec(compile(test, "test", "exec"), module.__dict__)  # noqa: S102 - as above
    except BaseException:
        return False
    return True


if __name__ == "__main__":
    main()
