"""Which addresses elsewhere a service may call: those that an operator wrote down, as long as they are what they seem.

Checked twice. `parse_url` looks at the text before anything starts; `check_address` at every address that a name
resolves to, each time it is resolved, and at an address that stands in a URL itself.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*", re.IGNORECASE)
# What C libraries read as an IPv4 address: "2130706433", "127.1", "0x7f.0.0.1", "0177.0.0.1".
_NUMBER = re.compile(r"(0x[0-9a-f]*|[0-9]+)", re.IGNORECASE)
_SECRET = re.compile(
    r"(^|[-_.])(key|apikey|token|secret|password|passwd|pwd|sig|signature|auth)($|[-_.])", re.IGNORECASE
)

# Where clouds hand credentials to whoever asks from inside: AWS over IPv6, Alibaba, Azure, Oracle. The link-local
# ones are refused with their range.
_METADATA = frozenset(map(ip_address, ("fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")))
# IPv6 ranges that carry an IPv4 address, which would be called in the end: mapped, translated (NAT64), Teredo, 6to4.
_CARRIERS = tuple(map(ip_network, ("::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16")))


class Place(NamedTuple):
    """A URL that `parse_url` let pass."""

    url: str
    scheme: str
    host: str
    port: int


def parse_url(text: str, schemes: Collection[str], default_ports: dict[str, int] | None = None) -> Place:
    """Takes a URL of one of `schemes` apart. Raises ValueError, saying what is wrong with it.

    A scheme without a default port needs one in the URL.
    """
    if not text.isascii() or not text.isprintable() or set(text) & set(' \\"<>^`{|}'):
        raise ValueError(f"{text!r} has characters that do not belong in a URL")
    scheme, separator, _ = text.partition("://")
    if not separator or scheme not in schemes:
        raise ValueError(f"{text!r} does not begin with {' or '.join(f'{each}://' for each in schemes)}")
    parts = urlsplit(text)
    if "@" in parts.netloc:
        raise ValueError("a user or password in a URL: credentials come from the environment only")
    if "#" in text:
        raise ValueError(f"{text!r} has a fragment")
    if secret := next((name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if _SECRET.search(name)), ""):
        raise ValueError(f"{secret} in a URL: credentials come from the environment only")
    try:
        port = parts.port or (default_ports or {}).get(scheme, 0)
    except ValueError:
        port = 0
    if not port or parts.netloc.endswith(":") or parts.port == 0:
        raise ValueError(f"{text!r} has no valid port")
    host = parts.hostname or ""
    _check_host(host, bracketed="[" in parts.netloc)
    return Place(text, scheme, host, port)


def _check_host(host: str, *, bracketed: bool) -> None:
    if bracketed:
        if "%" in host:
            raise ValueError(f"{host!r} names a network interface")
        check_address(host, (), literal=True)
    elif _NUMBER.fullmatch(host.rpartition(".")[2]):
        try:
            IPv4Address(host)
        except ValueError:
            raise ValueError(f"{host!r} is a number and no plain IPv4 address") from None
        check_address(host, (), literal=True)
    elif not _NAME.fullmatch(host) or len(host) > 253:
        raise ValueError(f"{host!r} is not the name of a host")


def is_loopback(host: str) -> bool:
    """Whether a URL's host is this machine, as far as its text tells."""
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return host.lower() == "localhost"


def parse_network(text: str) -> Network:
    """A network that names may lie in, of private or loopback addresses. Raises ValueError."""
    network = ip_network(text)
    if network.is_global or network.is_link_local or network.is_multicast or network.is_unspecified:
        raise ValueError(f"{text} is not a network of private addresses")
    return network


def check_address(text: str, networks: Collection[Network], *, literal: bool = False, host: str = "") -> None:
    """Raises ValueError for an address that must not be called.

    Private and loopback ones may be where they stand in the URL itself (`literal`), where they lie in one of
    `networks`, and where "localhost" is loopback. `host` is the name that resolved to it.
    """
    try:
        address: Address = ip_address(text.partition("%")[0])
    except ValueError:
        raise ValueError(f"{text!r} is no address") from None
    where = f"{host} is {address}, " if host else f"{address} is "
    if forbidden := _forbidden(address):
        raise ValueError(f"{where}{forbidden}")
    if literal or address.is_global or any(address in network for network in networks):
        return
    if host.lower() == "localhost" and address.is_loopback:
        return
    raise ValueError(f"{where}a private address, and in none of the networks that names may lie in")


def _forbidden(address: Address) -> str:
    """Why an address is never called, whoever names it."""
    if address in _METADATA:
        return "a cloud's metadata service"
    if any(address in carrier for carrier in _CARRIERS if carrier.version == address.version):
        return "an IPv4 address in an IPv6 one"
    if address.is_link_local:
        return "link-local, where clouds have their metadata services"
    if address.is_unspecified:
        return "unspecified"
    if address.is_multicast:
        return "multicast"
    if address.is_loopback:
        return ""
    first = int(address) >> 24 if address.version == 4 else -1
    return "reserved" if address.is_reserved or first == 0 else ""
