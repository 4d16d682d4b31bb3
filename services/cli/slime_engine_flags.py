"""slime's flags about engines: those handed through to SGLang and its router, and those that say how many there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.common.config import parse_overrides
from services.common.errors import ConfigError

# Any flag of another program, by what it begins with -> the table it goes to. The longer prefix first.
PREFIXES = {
    "--sglang-router-": "rollout.router.args",
    "--sglang-": "rollout.engine.args",
    "--router-": "rollout.router.args",
}
_NUM_GPUS = "--rollout-num-gpus"
_GPUS_PER_ENGINE = "--rollout-num-gpus-per-engine"
_EXTERNAL = "--rollout-external-engine-addrs"
_CONCURRENCY = "--sglang-server-concurrency"
_COUNTS = {
    _GPUS_PER_ENGINE: "rollout.engine.gpus",
    _NUM_GPUS: "rollout.engines, from the GPUs of one",
    _EXTERNAL: "rollout.engine.external",
    _CONCURRENCY: "rollout.max_inflight, times the engines",
}
_OWN_ROUTER = (
    "a router is started for each replica that has several engines: leave this out, or name engines that run already "
    f"with {_EXTERNAL}"
)

DESCRIPTIONS = {
    **_COUNTS,
    "--sglang-FLAG [VALUE ...]": "rollout.engine.args.FLAG",
    "--router-FLAG [VALUE ...]": "rollout.router.args.FLAG",
    "--router-policy": "rollout.router.policy",
}
KNOWN = tuple(_COUNTS)


def is_engine_flag(flag: str) -> bool:
    return flag in _COUNTS or any(flag.startswith(prefix) and flag != prefix for prefix in PREFIXES)


def engine_overrides(given: Mapping[str, list[str]], others: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides from the engine flags `given` and the keys that are set otherwise.

    slime means SGLang: with a flag that only SGLang has, it is the engine, and with GPUs counted, it runs on them.
    Raises ConfigError, naming the flag.
    """
    overrides: dict[str, Any] = {}
    for flag, values in given.items():
        if flag not in _COUNTS:
            overrides |= _passed_through(flag, values)
    if _EXTERNAL in given:
        overrides["rollout.engine.external"] = [_url(address) for address in given[_EXTERNAL]]
    overrides |= _counts(given, others)
    if any(flag in _COUNTS or _target(flag).startswith("rollout.engine.args.") for flag in given):
        overrides.setdefault("rollout.engine.kind", "sglang")
    if _NUM_GPUS in given or _GPUS_PER_ENGINE in given:
        overrides.setdefault("rollout.engine.device", "cuda")
    return {**overrides, **{key: value for key, value in others.items() if key in overrides}}


def _target(flag: str) -> str:
    """The key that a flag which is handed through sets."""
    prefix = next(prefix for prefix in PREFIXES if flag.startswith(prefix) and flag != prefix)
    name = flag.removeprefix(prefix)
    if PREFIXES[prefix] == "rollout.router.args" and name == "policy":
        return "rollout.router.policy"
    return f"{PREFIXES[prefix]}.{name}"


def _passed_through(flag: str, values: list[str]) -> dict[str, Any]:
    if flag in ("--sglang-router-ip", "--sglang-router-port"):
        raise ConfigError(_OWN_ROUTER, field=flag)
    parsed = [parse_overrides([f"--a.value={text}"])["a.value"] for text in values]
    return {_target(flag): True if not parsed else parsed[0] if len(parsed) == 1 else parsed}


def _counts(given: Mapping[str, list[str]], others: Mapping[str, Any]) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    gpus = int(others.get("rollout.engine.gpus", 1))
    if _GPUS_PER_ENGINE in given:
        gpus = overrides["rollout.engine.gpus"] = _number(given, _GPUS_PER_ENGINE)
    if _NUM_GPUS in given:
        total, replicas = _number(given, _NUM_GPUS), int(others.get("rollout.replicas", 1))
        if total % (gpus * replicas):
            among = f"{gpus} GPUs per engine" + (f" and {replicas} replicas" if replicas > 1 else "")
            raise ConfigError(f"{total} GPUs cannot be shared out among engines with {among}", field=_NUM_GPUS)
        overrides["rollout.engines"] = total // (gpus * replicas)
    if _CONCURRENCY in given:
        engines = overrides.get("rollout.engines", others.get("rollout.engines", 1))
        overrides["rollout.max_inflight"] = _number(given, _CONCURRENCY) * int(engines)
    return overrides


def _number(given: Mapping[str, list[str]], flag: str) -> int:
    text = given[flag][0] if len(given[flag]) == 1 else " ".join(given[flag])
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(f"{text!r} is not a number above 0", field=flag)
    return int(text)


def _url(address: str) -> str:
    return address if "://" in address else f"http://{address}"
