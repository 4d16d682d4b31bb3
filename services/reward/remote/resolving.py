"""Names resolved to addresses that may be called, and to no others."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Sequence

from aiohttp.abc import AbstractResolver, ResolveResult

from services.common.outbound import Network, check_address


async def resolve(host: str, port: int, networks: Sequence[Network]) -> list[ResolveResult]:
    """Every address of a name; an address is its own.

    Raises OSError when there is none, or any that must not be called.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    addresses = [str(address[0]) for _, _, _, _, address in found]
    try:
        for address in addresses:
            check_address(address, networks, literal=address == host, host=host)
    except ValueError as error:
        raise PermissionError(errno.EACCES, str(error)) from None
    return [
        ResolveResult(
            hostname=host,
            host=address,
            port=port,
            family=family,
            proto=proto,
            flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
        )
        for (family, _, proto, _, _), address in zip(found, addresses, strict=True)
    ]


class CheckedResolver(AbstractResolver):
    """For HTTP connections: what was checked is what is connected to."""

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks = networks

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await resolve(host, port, self._networks)
        return [each for each in found if family in (socket.AF_UNSPEC, each["family"])]

    async def close(self) -> None:
        """Nothing is open."""
