"""Engines as processes of their own, and the test's end of their HTTP API."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from services.common.config import Config
from services.common.process import free_port
from services.rollout.engines.launch import engine_command
from tests.kit.warm import Fork, warm

ROOT = Path(__file__).parents[2]
ADMIN_KEY = "an-admin-key"
# Of the engines that tests share.
CONTEXT = 4096
STREAM_INTERVAL = 4
SGLANG_WANTED = "POLYHEAD_SGLANG"
"""Set by `make test-sglang`, `make conformance` and `make test-long`: without it nothing is run over SGLang."""


@dataclass(frozen=True)
class EngineProcess:
    kind: str
    url: str
    process: subprocess.Popen[bytes] | Fork
    model_path: Path
    context_length: int


Start = Callable[..., contextlib.AbstractContextManager[EngineProcess]]


@contextlib.contextmanager
def start_torch_engine(
    model_path: Path, *, context_length: int, flags: tuple[str, ...] = (), log: Path | None = None
) -> Iterator[EngineProcess]:
    """The in-house engine on a free port, stopped at the end. What it writes goes to `log`."""
    port = free_port()
    arguments = ["--model-path", str(model_path), "--port", str(port), "--context-length", str(context_length)]
    arguments += ["--admin-api-key", ADMIN_KEY, *flags]
    process = warm().start(
        "services.rollout.engines.torch_engine", *arguments, environment=engine_environment(), log=log
    )
    with _running("torch", process, port, model_path, context_length) as engine:
        yield engine


@contextlib.contextmanager
def start_sglang(model_path: Path, *, context_length: int, flags: tuple[str, ...] = ()) -> Iterator[EngineProcess]:
    """Real SGLang on the CPU, as a replica starts it; skips the test where it is not wanted."""
    if not os.environ.get(SGLANG_WANTED):
        pytest.skip("make test-sglang")
    settings = {"kind": "sglang", "context_length": context_length, "max_running_requests": 16}
    # Stop strings need its tokenizer.
    rollout = {"engine": settings, "sampling": {"stop": ["\n"]}}
    with tempfile.TemporaryDirectory() as directory:
        sections = {"run": {"dir": directory}, "model": {"hf_checkpoint": model_path}, "rollout": rollout}
        launch = engine_command(Config.model_validate(sections))(port := free_port(), ADMIN_KEY)
        command = [part for part in launch.command if part != "--incremental-streaming-output"]
        environment = {**os.environ, **launch.environment}
        process = subprocess.Popen([*command, *flags], cwd=ROOT, env=environment)
        with _running("sglang", process, port, model_path, context_length) as engine:
            yield engine


# The same conformance suite runs over every engine that is started here.
STARTS: dict[str, Start] = {"torch": start_torch_engine, "sglang": start_sglang}


@contextlib.contextmanager
def _running(
    kind: str, process: subprocess.Popen[bytes] | Fork, port: int, model_path: Path, context_length: int
) -> Iterator[EngineProcess]:
    url = f"http://127.0.0.1:{port}"
    try:
        wait_healthy(url, process, within_s=300)
        yield EngineProcess(kind, url, process, model_path, context_length)
    finally:
        process.terminate()
        try:
            process.wait(10 if kind == "torch" else 1)
        except subprocess.TimeoutExpired:
            process.kill()  # SGLang takes seconds to notice the gentle way
            process.wait(10)


def engine_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'protos'}", "OMP_NUM_THREADS": "1"}


def wait_healthy(url: str, process: subprocess.Popen[bytes] | Fork, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the engine ended with status {process.returncode}")
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.05)
    raise TimeoutError(f"no healthy engine at {url} within {within_s} s")


class EngineApi:
    """HTTP calls that answer (status, JSON or text)."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url, self._session = url, session

    async def post(self, path: str, body: Any = None, *, key: str | None = ADMIN_KEY) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else orjson.dumps({} if body is None else body)
        headers = {"Content-Type": "application/json", **_bearer(key)}
        async with self._session.post(self.url + path, data=data, headers=headers) as response:
            return response.status, _content(await response.read())

    async def get(self, path: str, *, key: str | None = ADMIN_KEY) -> tuple[int, Any]:
        async with self._session.get(self.url + path, headers=_bearer(key)) as response:
            return response.status, _content(await response.read())

    async def ok(self, path: str, body: Any = None) -> Any:
        status, content = await self.post(path, body)
        assert status == 200, (path, status, content)
        return content

    async def generate(self, input_ids: list[Any], **fields: Any) -> Any:
        """Answer of a request that must succeed. Fields that are no fields of the body are sampling parameters."""
        return await self.ok("/generate", generate_body(input_ids, **fields))

    async def stream(self, input_ids: list[Any], **fields: Any) -> AsyncIterator[dict[str, Any]]:
        """Events of a stream up to [DONE]."""
        body = {**generate_body(input_ids, **fields), "stream": True}
        async with self._session.post(f"{self.url}/generate", json=body, headers=_bearer(ADMIN_KEY)) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if line.strip() == b"data: [DONE]":
                    return
                if line.startswith(b"data: "):
                    yield orjson.loads(line.removeprefix(b"data: "))
        raise AssertionError("the stream ended without [DONE]")


_BODY_FIELDS = {"rid", "stream", "return_logprob", "logprob_start_len", "top_logprobs_num", "extra_key"}


def generate_body(input_ids: list[Any], **fields: Any) -> dict[str, Any]:
    """Log-probs are asked for unless said otherwise."""
    body = {"return_logprob": True, **{key: value for key, value in fields.items() if key in _BODY_FIELDS}}
    params = {key: value for key, value in fields.items() if key not in _BODY_FIELDS}
    return {"input_ids": input_ids, "sampling_params": params, **body}


def logprobs_of(answer: dict[str, Any]) -> list[float]:
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]


def _bearer(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _content(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return data.decode()
