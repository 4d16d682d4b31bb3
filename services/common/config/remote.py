"""The settings of a reward model that is served elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator, model_validator

from services.common.config.section import Positive, Seconds, Section
from services.common.outbound import Place, is_loopback, parse_network, parse_url

Kind = Literal["http", "grpc", "judge", "classify"]
_HTTP_PORTS = {"http": 80, "https": 443}
_GRPC = ("grpc", "grpcs")


class JudgeConfig(Section):
    """A language model that is asked for a number, over OpenAI's chat completions."""

    model: str = ""
    """Its name on the server."""
    system: str = ""
    """The system message; none when empty."""
    prompt: str = ""
    """The user message. {prompt}, {response} and {label} stand for the sample's; other braces for themselves."""
    prompt_file: Path | None = None
    """The user message as a file, instead of `prompt`."""
    pattern: str = r"(?i)score\s*[:=]\s*(-?\d+(?:\.\d+)?)"
    """A regular expression with one group, the number. Of several matches in the answer the last counts."""
    low: float = 0.0
    high: float = 10.0
    """A number outside of these bounds is no score."""
    body: dict[str, Any] = Field(default_factory=lambda: {"temperature": 0, "max_tokens": 256})
    """Further fields of the request."""

    @field_validator("pattern")
    @classmethod
    def _pattern_has_one_group(cls, value: str) -> str:
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"has {groups} groups, not one: write (?:...) for those that are not the number")
        return value

    @model_validator(mode="after")
    def _fits(self) -> JudgeConfig:
        if self.low >= self.high:
            raise ValueError(f"low = {self.low:g} is not below high = {self.high:g}")
        if self.prompt and self.prompt_file is not None:
            raise ValueError("prompt and prompt_file are both given")
        return self


class ClassifyConfig(Section):
    """A sequence-classification model in an SGLang engine: --is-embedding, POST /classify."""

    input: Literal["tokens", "text"] = "tokens"
    """"tokens" sends the sample's own token ids, for a reward model with the policy's tokenizer; what has none, a
    direct call of RewardService for one, goes as text."""
    text: str = "{prompt}{response}"
    """The text to classify, by the same placeholders as a judge's prompt."""
    label: Annotated[int, Field(ge=0)] = 0
    """Which of the model's logits is the reward."""


class RemoteConfig(Section):
    kind: Kind = "http"
    """"http" is slime's remote_rm: POST {"prompt", "response", "label"}, answered by a number or an object with "score"
    or "reward". "grpc" is any server of polyhead.v1.RewardService. "judge" and "classify" are described in their own
    tables."""
    urls: list[str] = Field(default_factory=list)
    """One server or several, which share the work (slime: --rm-url). http://, https://; for "grpc" grpc://host:port on
    this machine and grpcs://host:port (TLS) anywhere. For "judge" what /chat/completions is appended to, for "classify"
    what /classify is."""
    token: SecretStr | None = None
    """Sent as bearer token. Only from the environment: POLYHEAD_REWARD__REMOTE__TOKEN."""
    ca: Path | None = None
    """Certificates (PEM) to trust instead of the system's."""
    cert: Path | None = None
    key: Path | None = None
    """This side's own certificate and key (PEM), for servers that ask for them."""
    networks: list[str] = Field(default_factory=list)
    """Private networks that the names in `urls` may resolve into: "10.0.0.0/8". Addresses in the URLs need none."""
    timeout_s: Seconds = 30.0
    """Deadline of one call."""
    connect_timeout_s: Seconds = 5.0
    concurrency: Positive = 64
    """Calls in flight to one server."""
    batch_size: Positive = 32
    """Samples in one call, for "grpc" and "classify"."""
    batch_delay_s: Annotated[float, Field(ge=0)] = 0.01
    """A call waits this long for more samples to fill its batch."""
    attempts: Positive = 4
    """Calls for one sample before it goes back to the buffer."""
    backoff_s: Seconds = 0.5
    """Before the n-th repetition, a random time of up to backoff_s x 2^n, at most max_backoff_s."""
    max_backoff_s: Seconds = 10.0
    breaker_failures: Positive = 10
    """After so many calls in a row without a score a server is left alone."""
    breaker_reset_s: Seconds = 2.0
    """For this long, and twice as long each time that a single call afterwards fails too, up to breaker_max_reset_s."""
    breaker_max_reset_s: Seconds = 30.0
    max_response_kb: Positive = 1024
    """A longer answer is none."""
    scorer: str = ""
    """"grpc": which of the server's scorers; its default when empty."""
    judge: JudgeConfig = Field(default_factory=JudgeConfig)
    classify: ClassifyConfig = Field(default_factory=ClassifyConfig)

    @field_validator("urls", mode="before")
    @classmethod
    def _one_url_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("networks")
    @classmethod
    def _networks_are_private(cls, value: list[str]) -> list[str]:
        for text in value:
            parse_network(text)
        return value

    @property
    def places(self) -> list[Place]:
        schemes = _GRPC if self.kind == "grpc" else tuple(_HTTP_PORTS)
        return [parse_url(url, schemes, _HTTP_PORTS) for url in self.urls]

    @model_validator(mode="after")
    def _can_be_called(self) -> RemoteConfig:
        places = self.places
        for place in places:
            plain = place.scheme == "grpc" or (place.scheme == "http" and self.token is not None)
            if plain and not is_loopback(place.host):
                what = "a token in plaintext" if self.token else "plaintext gRPC"
                raise ValueError(f"{place.url}: {what} is for loopback addresses only; use {place.scheme}s://")
        if len({(place.host, place.port) for place in places}) < len(places) and self.kind in ("grpc", "classify"):
            raise ValueError("urls names a server twice")
        if self.breaker_max_reset_s < self.breaker_reset_s:
            limits = self.breaker_max_reset_s, self.breaker_reset_s
            raise ValueError("breaker_max_reset_s = {:g} is below breaker_reset_s = {:g}".format(*limits))
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key belong together")
        judge = self.judge
        if self.kind == "judge" and self.urls and not (judge.model and (judge.prompt or judge.prompt_file)):
            raise ValueError("judge.model and judge.prompt (or judge.prompt_file) are needed")
        return self
