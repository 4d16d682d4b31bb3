"""The control plane imports without the heavy libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

IMPORT_ALL = """
import importlib, importlib.abc, pkgutil, sys

HEAVY = {"torch", "transformers", "sglang", "megatron", "ray", "safetensors", "accelerate", "peft"}
# The collective itself: only trainer and engine import it.
EXCEPT = {"services.common.fp8", "services.common.weight_group", "services.common.weight_memory"}

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
count = 0
for package in ("services.common", "services.buffer", "services.reward", "services.cli"):
    found = pkgutil.walk_packages(importlib.import_module(package).__path__, package + ".", onerror=lambda name: None)
    for name in [package, *(module.name for module in found)]:
        if name in EXCEPT:
            continue
        try:
            importlib.import_module(name)
            count += 1
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}")
print(count, "imported", file=sys.stderr)
"""


def test_the_control_plane_imports_without_heavy_libraries() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == []
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.split()[-2]) > 30
