"""An interpreter for SGLang that can run block-wise fp8 where these tests run: see sglang_fp8/sitecustomize.py."""

from __future__ import annotations

from pathlib import Path


def fp8_python(directory: Path, python: str | Path) -> Path:
    """Writes a script into `directory` that is `python` with that module ahead of the others; returns its path."""
    path = directory / "fp8-python"
    shims = Path(__file__).parent / "sglang_fp8"
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{shims}:$PYTHONPATH" exec "{Path(python).absolute()}" "$@"\n')
    path.chmod(0o755)
    return path
