"""Python programs of other packages, started without their secrets on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from services.common.errors import ConfigError

_SECRETS = "POLYHEAD_SECRET_ARGUMENTS"
# Everybody on the machine may read a process's arguments, only its owner its environment. The module sees what
# `python -m` would have shown it, and so do the processes that it spawns.
_START = (
    "import os, runpy, sys; sys.argv += os.environ.pop({variable!r}).split(); "
    "runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
)


def module_command(python: Path, module: str, flags: Sequence[str]) -> list[str]:
    """`python -m module flags...`, to be started in the environment that `secret_arguments` gives."""
    return [str(python), "-c", _START.format(variable=_SECRETS, module=module), *flags]


def secret_arguments(*arguments: str) -> Mapping[str, str]:
    """Further arguments, without spaces, by way of the environment.

    A module in the working directory must not take the place of one of the program's, so that is off its path.
    """
    return {_SECRETS: " ".join(arguments), "PYTHONSAFEPATH": "1"}


def flags_of(options: Mapping[str, object]) -> list[str]:
    """Command-line flags: True is a flag without a value, a list one with several."""
    return [part for name, value in options.items() for part in _flag(name, value)]


def user_flags(args: Mapping[str, object], ours: Mapping[str, str], field: str) -> dict[str, object]:
    """Flags that the user gave in the table `field`, by their full names.

    `ours` has those that are not the user's to give, each with the setting that gives it, if any. Raises ConfigError
    for one of them and for its beginning, which argparse would take for the whole.
    """
    flags: dict[str, object] = {}
    for flag, value in args.items():
        name = flag.replace("_", "-")
        meant = name if name in ours else next((whole for whole in ours if whole.startswith(name)), None)
        if meant is not None:
            what = "" if meant == name else f"is short for {meant}, which "
            why = (
                f"is set by {ours[meant]}"
                if ours[meant]
                else "is not to be set: it is given at each start, or not at all"
            )
            raise ConfigError(what + why, field=f"{field}.{flag}")
        flags[name] = value
    return flags


def _flag(name: str, value: object) -> list[str]:
    if value is True:
        return [f"--{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", str(value)]
