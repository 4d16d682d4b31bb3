"""User functions by dotted path. Paths come from the operator's configuration only."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from services.common.errors import ConfigError


def load_function(path: str, *, field: str, search: Iterable[Path] = ()) -> Callable[..., Any]:
    """Imports ``pkg.mod:fn`` or ``pkg.mod.fn``.

    `search` directories are put on sys.path first. Raises ConfigError, naming `field`, when the module does not
    import, has no such name, or the name is not callable.
    """
    for directory in search:
        resolved = str(directory.resolve())
        if resolved not in sys.path:
            sys.path.insert(0, resolved)
    module_name, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    if not module_name or not name:
        raise ConfigError(f"{path!r} is not of the form pkg.mod:fn", field=field)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ConfigError(f"{module_name} does not import: {type(error).__name__}: {error}", field=field) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{module_name} has no function {name!r}", field=field)
    return function
