"""What is made of an engine's version: too old to be used, or too old to say which version a token is of."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from services.common.errors import ConfigError
from services.rollout.engines.messages import check_version, warn_of_inexact_versions
from services.rollout.engines.self_report import read_server_info


@pytest.mark.parametrize("version", ["0.5.9", "0.4.10", "unknown"])
def test_an_sglang_that_is_too_old_is_refused(version: str) -> None:
    with pytest.raises(ConfigError, match=rf"SGLang {version} is too old: 0\.5\.10 or newer"):
        check_version(read_server_info({"version": version}))


@pytest.mark.parametrize(
    ("said", "warned"),
    [
        ({"version": "0.5.16", "stream_interval": 8}, True),
        ({"version": "0.5.16"}, True),
        ({"version": "0.5.16.post1", "stream_interval": 1}, False),
        ({"version": "0.5.23", "stream_interval": 8}, False),
        ({"version": "0.10.0", "stream_interval": 8}, False),
        ({"version": "0.1.0", "kind": "torch_engine", "stream_interval": 8}, False),
    ],
)
def test_versions_that_have_to_be_told_by_the_stream_are_warned_of(said: dict[str, object], warned: bool) -> None:
    with capture_logs() as logs:
        warn_of_inexact_versions(read_server_info(said))
    assert [line["event"] for line in logs] == ["token_versions_inexact"] * warned
    assert all("stream_interval = 1" in line["reason"] for line in logs)
