"""One HTTP session to one server: no redirects, no proxies, no cookies, short answers, typed failures."""

from __future__ import annotations

import ssl
from typing import Any

import aiohttp
import orjson

from services.common.config.remote import RemoteConfig
from services.common.errors import ConfigError
from services.common.outbound import parse_network
from services.reward.remote.outcomes import BadAnswerError, BrokenCallError, RefusedError, UnreachableError
from services.reward.remote.resolving import CheckedResolver

# Below the 5 s after which common servers close an idle connection, which would look like a call that broke.
_KEEPALIVE_S = 2.0
_EXCERPT = 200
# These say nothing about the sample, and will not pass by themselves.
_NOT_FOR_US = {401: "unauthorised", 403: "forbidden", 404: "no such route", 405: "no such route", 407: "a proxy"}
# Nor do these, but they may pass.
_BUSY = (408, 421, 425, 429, 502, 503, 504)


class HttpSession:
    """`start` first, `close` last."""

    def __init__(self, config: RemoteConfig) -> None:
        """Raises ConfigError for certificates that cannot be read."""
        self._config = config
        self._ssl = tls_context(config)
        self._token = config.token.get_secret_value() if config.token is not None else ""
        self._max_bytes = config.max_response_kb << 10
        self._timeout = aiohttp.ClientTimeout(total=config.timeout_s, connect=config.connect_timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        # An answer that unpacks to more than its own size would pass under the cap.
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        networks = [parse_network(each) for each in self._config.networks]
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,
                keepalive_timeout=_KEEPALIVE_S,
                resolver=CheckedResolver(networks),
                use_dns_cache=False,
                ssl=self._ssl,
            ),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=self._timeout,
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def post(self, url: str, body: dict[str, Any]) -> Any:
        """The JSON of the answer. Raises CallError."""
        assert self._session is not None
        try:
            async with self._session.post(url, data=orjson.dumps(body), allow_redirects=False) as response:
                content = await self._read(response)
        except (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError) as error:
            raise UnreachableError(f"cannot be connected to: {_why(error)}") from error
        except TimeoutError as error:
            raise BrokenCallError(f"timed out after {self._config.timeout_s:g} s", timed_out=True) from error
        except (aiohttp.InvalidURL, ValueError) as error:
            raise UnreachableError(f"cannot be called: {error}", retry=False) from error
        except (aiohttp.ClientError, OSError) as error:
            raise BrokenCallError(f"broke off: {_why(error)}") from error
        self._check_status(response, content)
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise BadAnswerError(f"the answer is not JSON ({error}): {self._excerpt(content)}") from None

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        content = bytearray()
        async for chunk in response.content.iter_any():
            content += chunk
            if len(content) > self._max_bytes:
                response.close()
                raise BadAnswerError(f"the answer is longer than {self._config.max_response_kb} KiB")
        return bytes(content)

    def _check_status(self, response: aiohttp.ClientResponse, content: bytes) -> None:
        status = response.status
        if 200 <= status < 300:
            return
        if status < 400:
            raise UnreachableError(f"HTTP {status}: redirects are not followed", retry=False)
        if status in _NOT_FOR_US:
            raise UnreachableError(f"HTTP {status}: {_NOT_FOR_US[status]}", retry=False)
        said = f"HTTP {status}: {self._excerpt(content)}"
        if status in _BUSY:
            raise UnreachableError(said)
        if status >= 500:
            raise BrokenCallError(said)
        raise RefusedError(said)

    def _excerpt(self, content: bytes) -> str:
        text = content[: 2 * _EXCERPT].decode(errors="replace")
        if self._token:
            text = text.replace(self._token, "***")
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:_EXCERPT]


def tls_context(config: RemoteConfig) -> ssl.SSLContext:
    """Raises ConfigError for certificates that cannot be read."""
    try:
        context = ssl.create_default_context(cafile=config.ca)
        if config.cert is not None:
            context.load_cert_chain(config.cert, config.key)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"the certificates cannot be used: {error}", field="reward.remote") from error
    return context


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
