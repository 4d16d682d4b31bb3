"""`polyhead scale`: asks a run for more or fewer replicas of a role. The wish is a file, which the launcher watches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import orjson

from services.cli.lock import holder
from services.cli.status import find_run
from services.common.config import Config, load
from services.common.errors import ConfigError, UnavailableError

ROLES = ("rollout", "reward")
# Of one role. A slip of the finger must not start a thousand processes.
MOST = 256
_NAME = "scale.json"


def ask(run_dir: Path | None, requests: Sequence[str]) -> int:
    """Leaves the wish `requests`, each ROLE=N, for the launcher of a run.

    Raises ConfigError for what cannot be, UnavailableError when no launcher is there to hear it.
    """
    run_dir = find_run(run_dir)
    config = load(run_dir / "config.toml")
    asked = _parse(requests)
    check(config, asked)
    if holder(run_dir) is None:
        raise UnavailableError("no launcher is running", field=str(run_dir))
    before = {**configured(config), **read(run_dir)}
    wish(run_dir, asked)
    print(", ".join(f"{role} {before[role]} → {count}" for role, count in asked.items()))
    return 0


def configured(config: Config) -> dict[str, int]:
    """The replicas of each role that a run begins with."""
    return {role: getattr(config, role).replicas for role in ROLES}


def check(config: Config, wanted: Mapping[str, int]) -> None:
    """Raises ConfigError, naming the role, for numbers of replicas that a run of `config` cannot have."""
    for role, count in wanted.items():
        if role not in ROLES:
            raise ConfigError(f"cannot be scaled: {' and '.join(ROLES)} can", field=role)
        if not 1 <= count <= MOST:
            raise ConfigError(f"{count} replicas: at least 1 and at most {MOST}", field=role)
        address = getattr(config, role).address
        if count > 1 and not address.endswith(":0"):
            raise ConfigError(f"{role}.address = {address} is a fixed port and serves one replica", field=role)
    if wanted.get("rollout", 0) > config.rollout.replicas and config.rollout.engine.external:
        raise ConfigError(
            "rollout.engine.external was shared out over the replicas when the run began", field="rollout"
        )


def read(run_dir: Path) -> dict[str, int]:
    """The last wish by role; empty when there is none. Raises ConfigError when the file holds something else."""
    path = run_dir / _NAME
    try:
        wanted = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"is not JSON: {error}", field=str(path)) from error
    if not isinstance(wanted, dict) or not all(type(count) is int for count in wanted.values()):
        raise ConfigError("is not an object of roles and numbers", field=str(path))
    return wanted


def wish(run_dir: Path, asked: Mapping[str, int]) -> None:
    """Leaves the wish for these roles, and those for others as they are."""
    wanted = {**read(run_dir), **asked}
    partial = run_dir / f"{_NAME}.partial"
    partial.write_bytes(orjson.dumps(wanted) + b"\n")
    partial.replace(run_dir / _NAME)


def forget(run_dir: Path) -> None:
    """A run that is resumed begins with the numbers of its configuration."""
    (run_dir / _NAME).unlink(missing_ok=True)


def _parse(requests: Sequence[str]) -> dict[str, int]:
    asked: dict[str, int] = {}
    for request in requests:
        role, _, count = request.partition("=")
        if not (count.isascii() and count.isdigit()):
            raise ConfigError("is not ROLE=N, for example rollout=4", field=request)
        if role in asked:
            raise ConfigError("is asked for twice", field=role)
        asked[role] = int(count)
    return asked
