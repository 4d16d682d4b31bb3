"""What the demos share."""

from __future__ import annotations

from pathlib import Path

from services.common.errors import ConfigError


def config_file(name: str) -> Path:
    """A file of deploy/config. Raises ConfigError outside a checkout: the demos are not part of the wheel."""
    path = Path(__file__).parents[3] / "deploy" / "config" / name
    if not path.exists():
        raise ConfigError("is not here: the demos run from a checkout of the repository", field=str(path))
    return path
