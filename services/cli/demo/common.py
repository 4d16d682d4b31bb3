"""What the demos share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from services.cli.lock import sole_launcher
from services.common.errors import ConfigError

_MARK = "demo.json"


def config_file(name: str) -> Path:
    """A file of deploy/config. Raises ConfigError outside a checkout: the demos are not part of the wheel."""
    path = Path(__file__).parents[3] / "deploy" / "config" / name
    if not path.exists():
        raise ConfigError("is not here: the demos run from a checkout of the repository", field=str(path))
    return path


def prepare_directory(run_dir: Path, task: str, seed: int) -> None:
    """Marks `run_dir` as this demo's. An unfinished demo with the same seed goes on; any other is started anew.

    Raises ConfigError for a directory that holds something else, or that is in use.
    """
    mark, wanted = run_dir / _MARK, {"task": task, "seed": seed}
    if run_dir.is_dir() and any(run_dir.iterdir()) and not mark.exists():
        raise ConfigError("holds something that is not a demo: give another --run.dir", field=str(run_dir))
    with sole_launcher(run_dir):
        same = mark.exists() and json.loads(mark.read_text()) == wanted
        if same and not (run_dir / "summary.json").exists():
            return
        for path in run_dir.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "launcher.lock":
                path.unlink()
        mark.write_text(json.dumps(wanted))
