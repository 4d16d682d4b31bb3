"""What the reward service never calls: refused by its text, or by what its name resolves to."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from services.common.config import load
from services.common.config.remote import RemoteConfig
from services.common.errors import ConfigError
from services.common.outbound import parse_network
from services.reward.jobs import FailureKind
from services.reward.remote.resolving import CheckedResolver, resolve
from tests.kit.reward_items import item
from tests.kit.reward_servers import GrpcServer, HttpServer, remote

# By the text alone, before anything starts.
REFUSED_URLS = [
    ("http://169.254.169.254/latest/meta-data/", "link-local"),
    ("http://169.254.170.2/v2/credentials", "link-local"),
    ("http://[fe80::1]:8000/", "link-local"),
    ("http://[fe80::1%25eth0]:8000/", "names a network interface"),
    ("http://[fd00:ec2::254]/latest/meta-data/", "metadata service"),
    ("http://100.100.100.200/latest/", "metadata service"),
    ("http://168.63.129.16/machine", "metadata service"),
    ("http://192.0.0.192/opc/", "metadata service"),
    ("http://0.0.0.0:8000/", "unspecified"),
    ("http://[::]:8000/", "unspecified"),
    ("http://0.1.2.3/", "reserved"),
    ("http://224.0.0.1/", "multicast"),
    ("http://[ff02::1]/", "multicast"),
    ("http://255.255.255.255/", "reserved"),
    ("http://240.0.0.1/", "reserved"),
    ("http://[::ffff:169.254.169.254]/", "an IPv4 address in an IPv6 one"),
    ("http://[::ffff:127.0.0.1]:8000/", "an IPv4 address in an IPv6 one"),
    ("http://[::127.0.0.1]/", "reserved"),
    ("http://[64:ff9b::a9fe:a9fe]/", "an IPv4 address in an IPv6 one"),
    ("http://[2002:a9fe:a9fe::1]/", "an IPv4 address in an IPv6 one"),
    ("http://2852039166/", "no plain IPv4 address"),
    ("http://0xa9fea9fe/", "no plain IPv4 address"),
    ("http://0xa9.0xfe.0xa9.0xfe/", "no plain IPv4 address"),
    ("http://0251.0376.0251.0376/", "no plain IPv4 address"),
    ("http://127.1/", "no plain IPv4 address"),
    ("http://010.0.0.1/", "no plain IPv4 address"),
    ("http://127.0.0.1.:8000/", "not the name of a host"),
    ("http://reward.example@169.254.169.254/", "credentials come from the environment only"),
    ("http://user:word@reward.example/", "credentials come from the environment only"),
    ("http://reward.example/?api_key=abc", "credentials come from the environment only"),
    ("http://reward.example\\@169.254.169.254/", "characters that do not belong"),
    ("http://reward.example#@169.254.169.254/", "fragment"),
    ("http://reward.example/\r\nHost: other", "characters that do not belong"),
    ("http://①②⑦.⓪.⓪.①/", "characters that do not belong"),
    ("http://reward。example/", "characters that do not belong"),
    ("http://%31%36%39.254.169.254/", "no plain IPv4 address"),
    ("http://reward%2eexample/", "not the name of a host"),
    ("http://reward..example/", "not the name of a host"),
    ("http:///score", "no"),
    ("http://reward.example:0/", "no valid port"),
    ("http://reward.example:99999/", "no valid port"),
    ("http://reward.example:/", "no valid port"),
    ("file:///etc/passwd", "does not begin with http:// or https://"),
    ("gopher://reward.example/_x", "does not begin with http:// or https://"),
    ("unix:///var/run/docker.sock", "does not begin with http:// or https://"),
    ("ftp://reward.example/", "does not begin with http:// or https://"),
    ("HTTP+unix://reward.example/", "does not begin with http:// or https://"),
    ("//reward.example/score", "does not begin with http:// or https://"),
    ("reward.example:8000", "does not begin with http:// or https://"),
]

# By what a name resolves to: a harmless name, or one whose answer changed after it had been looked at.
REFUSED_ANSWERS = [
    ("169.254.169.254", "link-local"),
    ("0.0.0.0", "unspecified"),
    ("::", "unspecified"),
    ("224.0.0.1", "multicast"),
    ("::ffff:10.0.0.1", "an IPv4 address in an IPv6 one"),
    ("64:ff9b::7f00:1", "an IPv4 address in an IPv6 one"),
    ("fe80::1", "link-local"),
    ("fd00:ec2::254", "metadata service"),
    ("127.0.0.1", "a private address"),
    ("::1", "a private address"),
    ("10.1.2.3", "a private address"),
    ("192.168.0.1", "a private address"),
    ("172.16.0.1", "a private address"),
    ("100.64.0.1", "a private address"),
    ("fd12::1", "a private address"),
    ("240.0.0.1", "reserved"),
]


def test_the_table_has_forty_urls():
    assert len({url for url, _ in REFUSED_URLS}) >= 40


@pytest.mark.parametrize(("url", "reason"), REFUSED_URLS, ids=[url for url, _ in REFUSED_URLS])
def test_a_url_is_refused_with_the_reason(url, reason):
    with pytest.raises(ConfigError) as caught:
        load(None, {"reward.scorer": "remote", "reward.remote.urls": [url]})
    assert reason in str(caught.value)
    assert caught.value.field == "reward.remote"


@pytest.mark.parametrize(
    "url",
    [
        "http://reward.example/score",
        "https://reward.example:8443/v1?model=7",
        "http://127.0.0.1:8000/",
        "http://10.0.0.7:8000/score",
        "http://[fd12::7]:8000/score",
        "http://[::1]:8000/score",
        "http://localhost:8000/score",
        "http://reward_model.team-a.svc.cluster.local:8000/",
        "http://8.8.8.8/",
    ],
)
def test_what_an_operator_may_mean_is_let_pass(url):
    assert RemoteConfig(urls=[url]).places[0].url == url


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What every name resolves to."""
    found: list[str] = []

    async def getaddrinfo(self: Any, host: str, port: int, **_: Any) -> list[Any]:
        family = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(family[":" in each], socket.SOCK_STREAM, 6, "", (each, port)) for each in found]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return found


@pytest.mark.parametrize(("address", "reason"), REFUSED_ANSWERS)
async def test_a_name_that_resolves_elsewhere_is_refused_with_the_reason(answers, address, reason):
    answers += ["8.8.8.8", address]
    with pytest.raises(OSError) as caught:
        await CheckedResolver([]).resolve("reward.example", 80)
    assert reason in str(caught.value)
    assert "reward.example is" in str(caught.value)


async def test_a_name_may_lie_in_a_network_that_the_operator_names(answers):
    answers += ["10.1.2.3"]
    found = await resolve("reward.example", 80, [parse_network("10.1.0.0/16")])
    assert [each["host"] for each in found] == ["10.1.2.3"]
    answers[:] = ["169.254.169.254"]
    with pytest.raises(OSError):
        await resolve("reward.example", 80, [parse_network("10.0.0.0/8")])


async def test_localhost_is_this_machine_and_nothing_else(answers):
    answers += ["127.0.0.1"]
    assert await resolve("localhost", 80, [])
    answers[:] = ["10.0.0.1"]
    with pytest.raises(OSError):
        await resolve("localhost", 80, [])


@pytest.mark.parametrize("kind", ["http", "grpc"])
async def test_what_was_checked_is_what_is_called(answers, kind):
    answers += ["127.0.0.1"]
    server: Any = HttpServer(lambda body: 1) if kind == "http" else GrpcServer(lambda asked: 1.0)
    await server.start()
    # Plaintext gRPC is for names of this machine only.
    name = "reward.example" if kind == "http" else "localhost"
    url = server.url.replace("127.0.0.1", name)
    async with remote(kind, url) as station:
        [result] = await station.score([item("ok")])
    if kind == "http":
        assert result.failure is FailureKind.UNAVAILABLE
        assert "reward.example is 127.0.0.1, a private address" in result.reason
    else:
        assert result.verdict == (1.0, {}, ())
    async with remote(kind, url, networks=["127.0.0.0/8"]) as station:
        assert (await station.score([item("ok")]))[0].verdict == (1.0, {}, ())
    answers[:] = ["169.254.169.254"]
    async with remote(kind, url, networks=["127.0.0.0/8"]) as station:
        [result] = await station.score([item("ok")])
    assert f"{name} is 169.254.169.254, link-local" in result.reason
    await server.stop()


@pytest.mark.parametrize("network", ["0.0.0.0/0", "8.8.8.0/24", "169.254.0.0/16", "fe80::/10", "224.0.0.0/4", "::/0"])
def test_a_network_of_names_is_private(network):
    with pytest.raises(ConfigError) as caught:
        load(None, {"reward.remote.networks": [network]})
    assert "is not a network of private addresses" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"urls": []}, "needs remote.urls"),
        ({"kind": "grpc", "urls": "grpc://reward.example:9000"}, "plaintext gRPC is for loopback addresses only"),
        ({"kind": "grpc", "urls": "grpc://127.0.0.1"}, "no valid port"),
        ({"kind": "grpc", "urls": "dns:///reward.example:9000"}, "does not begin with grpc:// or grpcs://"),
        ({"urls": "http://reward.example/", "cert": "mine.pem"}, "cert and key belong together"),
        ({"urls": "http://reward.example/", "token": "x"}, "POLYHEAD_REWARD__REMOTE__TOKEN"),
        ({"urls": "http://reward.example/", "concurency": 3}, "did you mean reward.remote.concurrency?"),
        ({"urls": "http://reward.example/", "breaker_reset_s": 60}, "breaker_max_reset_s = 30 is below"),
        ({"kind": "judge", "urls": "https://reward.example/v1"}, "judge.model and judge.prompt"),
        ({"kind": "judge", "judge": {"pattern": "(a)(b)"}}, "has 2 groups"),
        ({"kind": "judge", "judge": {"low": 2, "high": 1}}, "low = 2 is not below high = 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, reason):
    overrides = {f"reward.remote.{key}": value for key, value in settings.items()}
    with pytest.raises(ConfigError) as caught:
        load(None, {"reward.scorer": "remote", **overrides})
    assert reason in str(caught.value)


def test_a_token_does_not_travel_in_plaintext(monkeypatch):
    monkeypatch.setenv("POLYHEAD_REWARD__REMOTE__TOKEN", "a-secret")
    wanted = {"reward.scorer": "remote", "reward.remote.urls": "http://reward.example/"}
    with pytest.raises(ConfigError, match="a token in plaintext is for loopback addresses only"):
        load(None, wanted)
    config = load(None, {**wanted, "reward.remote.urls": "https://reward.example/"})
    assert config.reward.remote.token.get_secret_value() == "a-secret"


def test_urls_are_for_the_remote_scorer():
    with pytest.raises(ConfigError, match=r'remote\.urls is for scorer = "remote"'):
        load(None, {"reward.remote.urls": "http://reward.example/"})
