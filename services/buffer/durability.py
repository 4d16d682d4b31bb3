"""What a store promises of acknowledged work: it must never evict, and it says so when it may forget."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from services.common.errors import ConfigError

log = structlog.get_logger()

# By the server's fsync policy; None for a server that does not tell.
_WARNINGS = {
    "everysec": "a crash of the server or its machine loses up to two seconds of acknowledged work: "
    "set appendfsync to always",
    "no": "a crash of the server or its machine loses half a minute or so of acknowledged work: "
    "set appendfsync to always",
    None: "it does not tell its appendfsync: with anything but always, a crash of its machine loses acknowledged work",
}


@dataclass(frozen=True, slots=True)
class Durability:
    """The server's settings. `appendfsync` is None when it may not be asked."""

    max_memory: int
    """Bytes; 0 for no limit."""
    policy: str
    append_only: bool
    appendfsync: str | None


def check_durability(found: Durability, where: str) -> None:
    """Warns, in one line, of what a crash can lose. Raises ConfigError for a store that evicts."""
    if found.max_memory and found.policy != "noeviction":
        raise ConfigError(
            f"maxmemory-policy is {found.policy}: it deletes samples when memory is short; set it to noeviction",
            field=f"store {where}",
        )
    if not found.append_only:
        log.warning("store_not_durable", store=where, why="appendonly is off: a restart loses the run's samples")
    elif (warning := _WARNINGS.get(found.appendfsync)) is not None:
        log.warning("store_not_durable", store=where, why=warning)
