"""`polyhead bench NAME`: the benchmarks of a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from services.common.errors import ConfigError

_CHECKOUT = Path(__file__).parents[2]


def run_bench(name: str, arguments: Sequence[str]) -> int:
    """The exit status of the benchmark. Raises ConfigError when there is none of that name, or no checkout."""
    directory = _CHECKOUT / "tests" / "bench"
    if not directory.is_dir():
        raise ConfigError("needs a checkout: the benchmarks are in its tests/bench", field="bench")
    names = sorted(path.stem.removeprefix("bench_") for path in directory.glob("bench_*.py"))
    if name not in names:
        raise ConfigError(f"{name!r} is none of {', '.join(names)}", field="bench")
    paths = [str(_CHECKOUT), str(_CHECKOUT / "protos"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", f"tests.bench.bench_{name}", *arguments]
    return subprocess.run(command, cwd=_CHECKOUT, env=environment, check=False).returncode
