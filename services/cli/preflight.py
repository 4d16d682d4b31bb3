"""Everything that can be known to be wrong before a run starts, and before it has written anything."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import operator
import socket
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import redis

from services.buffer.prompts import PromptSource
from services.cli.reward_engine import reward_engine
from services.common.config import Config, load
from services.common.config.lora import FIELD as LORA
from services.common.config.lora import NEEDS_PEFT
from services.common.errors import ConfigError, PolyheadError, UnavailableError
from services.common.process import free_port


def check(config: Config) -> None:
    """Raises the ConfigError or UnavailableError of the first thing that is wrong."""
    _check_model(config.model.hf_checkpoint)
    if config.trainer.lora.rank and importlib.util.find_spec("peft") is None:
        raise ConfigError(NEEDS_PEFT, field=f"{LORA}.rank")
    PromptSource(config.data, config.buffer.limits)
    _check_addresses(config)
    _check_resumable(config)
    if config.store.url != "embedded":
        _check_store(config)
    _check_engine(config)
    _check_scorer(config)


def _check_model(directory: Path) -> None:
    field = "model.hf_checkpoint"
    if directory == Path():
        raise ConfigError("is needed: a Hugging Face model directory", field=field)
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory", field=field)
    config = directory / "config.json"
    if not config.exists():
        raise ConfigError(f"{directory} has no config.json", field=field)
    try:
        json.loads(config.read_text())
    except ValueError as error:
        raise ConfigError(f"{config} is not valid JSON: {error}", field=field) from error
    if not any(directory.glob("*.safetensors")):
        raise ConfigError(f"{directory} has no *.safetensors", field=field)
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(f"{directory} has no tokenizer", field=field)


def _check_addresses(config: Config) -> None:
    replicas = {role: getattr(config, role).replicas for role in ("buffer", "rollout", "reward")}
    for role in ("buffer", "rollout", "reward", "trainer"):
        field, addresses = f"{role}.address", getattr(config, role).address.split(",")
        if len(addresses) < replicas.get(role, 1) and not addresses[0].endswith(":0"):
            raise ConfigError(
                f"{addresses[0]} cannot serve {replicas[role]} replicas: port 0 gives each its own", field=field
            )
        for address in addresses:
            _check_port(field, address)
    if config.trainer.weights.backend != "disk":
        _check_collective(config)


def _check_collective(config: Config) -> None:
    """The trainer can listen where engines are to reach its collective, and all of them can reach that."""
    field, address = "trainer.weights.address", config.trainer.weights.address
    try:
        free_port(address)
    except OSError as error:
        raise ConfigError(f"{address} is no address of this machine: {error.strerror}", field=field) from error
    if not _is_loopback(address):
        return
    for engine in config.rollout.engine.external:
        if not _is_loopback(urlsplit(engine).hostname or ""):
            raise ConfigError(
                f"{engine} is on another host, from where {field} = {address} cannot be reached: "
                f"set {field} to this machine's address",
                field="rollout.engine.external",
            )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


# What the data already generated in a run directory depends on.
_FIXED = ("run.name", "data.prompt_data", "data.shuffle", "data.seed", "batch.n_samples_per_prompt")


def _check_resumable(config: Config) -> None:
    """What is in the run directory was made with the same data and group size."""
    path = config.run.dir / "config.toml"
    if not path.exists():
        return
    before = load(path)
    for key in _FIXED:
        had, wanted = (operator.attrgetter(key)(each) for each in (before, config))
        if had != wanted:
            raise ConfigError(f"{config.run.dir} was begun with {had!r}, not {wanted!r}", field=key)


def _check_port(field: str, address: str) -> None:
    host, _, port = address.rpartition(":")
    if address.startswith("unix:") or port == "0":
        return
    if not port.isdigit():
        raise ConfigError(f"{address!r} is not host:port", field=field)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As the server will: a port in TIME_WAIT may be taken again.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            raise ConfigError(f"{address} cannot be bound: {error.strerror}", field=field) from error


def _check_store(config: Config) -> None:
    """The server answers and takes a write."""
    password = config.store.password.get_secret_value() if config.store.password else None
    client = redis.Redis.from_url(config.store.url, password=password, socket_timeout=5, socket_connect_timeout=5)
    try:
        key = f"{{{config.run.name}}}:preflight"
        client.set(key, "1", ex=60)
        client.delete(key)
    except redis.AuthenticationError as error:
        raise ConfigError(f"refused the password: {error}", field="store.url") from error
    except redis.ConnectionError as error:
        raise UnavailableError(f"does not answer: {error}", field="store.url") from error
    except redis.RedisError as error:
        raise UnavailableError(f"refuses writes: {error}", field="store.url") from error
    finally:
        client.close()


def _check_engine(config: Config) -> None:
    """The engines' environment has been made or they answer, and their arguments are the user's to set."""
    from services.rollout.engines.external import external_addresses
    from services.rollout.engines.launch import engine_command
    from services.rollout.engines.router_launch import router_command

    if config.rollout.engine.external:
        shares = [external_addresses(config, index) for index in range(config.rollout.replicas)]
        asyncio.run(_check_external(config, shares))
        several = any(len(share) > 1 for share in shares)
    else:
        engine_command(config)
        several = config.rollout.engines > 1
    if several:
        router_command(config)


async def _check_external(config: Config, shares: Sequence[Sequence[str]]) -> None:
    """Each replica has an engine that answers. The others may still come: a replica waits for them."""
    from services.rollout.engines.client import EngineClient

    key = config.rollout.engine.admin_key
    admin_key = key.get_secret_value() if key is not None else ""

    async def reason(address: str) -> str:
        async with EngineClient(address, admin_key) as client:
            try:
                await client.server_info()
            except PolyheadError as error:
                return f"{address} does not answer: {error}"
        return ""

    for share in shares:
        reasons = await asyncio.gather(*map(reason, share))
        if all(reasons):
            raise UnavailableError("; ".join(reasons), field="rollout.engine.external")


def _check_scorer(config: Config) -> None:
    """The scorer imports, and scores the first prompt's own label without raising or hanging.

    A reward model that the run is to start can be started.
    """
    from services.reward.check import check_scorer

    if config.reward.engine.model is not None:
        if config.reward.remote.urls or config.reward.remote.token is not None:
            what = "urls" if config.reward.remote.urls else "token"
            raise ConfigError("is given by the engine that reward.engine.model starts", field=f"reward.remote.{what}")
        reward_engine(config)
        return
    asyncio.run(check_scorer(config, PromptSource(config.data, config.buffer.limits).prompt(0)))
