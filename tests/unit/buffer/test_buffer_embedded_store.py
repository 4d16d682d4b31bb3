"""The command line of the embedded store."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.common import embedded_store
from services.common.errors import ConfigError


def test_the_command_is_durable_and_private() -> None:
    words = embedded_store.command(Path("/data"), Path("/run/s"), "always", 256)
    assert Path(words[0]).name == "valkey-server"
    assert Path(words[0]).is_file()
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert options == {
        "--dir": "/data",
        "--port": "0",
        "--unixsocket": "/run/s",
        "--unixsocketperm": "700",
        "--daemonize": "no",
        "--save": "",
        "--appendonly": "yes",
        "--appendfsync": "always",
        "--aof-load-truncated": "yes",
        "--maxmemory": "256mb",
        "--maxmemory-policy": "noeviction",
    }


def test_a_socket_path_the_kernel_refuses_is_named() -> None:
    with pytest.raises(ConfigError, match="store socket: longer than 107 bytes: /a"):
        embedded_store.command(Path("/data"), Path("/" + "a" * 107), "always", 256)
    assert embedded_store.url(Path("/run/s")) == "unix:///run/s"
