"""A child process that answers a JSON object a line with one of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

_LINE_MAX = 256 << 20
_END_S = 20.0


class JsonProcess:
    """What it writes to its standard error goes to ours."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self._process, self._name = process, name
        self._asked = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> AsyncIterator[JsonProcess]:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            limit=_LINE_MAX,
        )
        try:
            yield cls(process, command[2])
        finally:
            assert process.stdin is not None
            process.stdin.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _END_S)
            if process.returncode is None:
                process.kill()

    async def ask(self, question: Mapping[str, Any], timeout_s: float = 60.0) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._asked += 1
        self._process.stdin.write(json.dumps({**question, "id": self._asked}).encode() + b"\n")
        async with asyncio.timeout(timeout_s):
            while True:
                answer = await self.answer(timeout_s)
                if answer.pop("id") == self._asked:  # an earlier one may come late
                    return answer

    async def answer(self, timeout_s: float = 60.0) -> dict[str, Any]:
        """The next line; what is none of the conversation is passed over."""
        assert self._process.stdout is not None
        async with asyncio.timeout(timeout_s):
            while line := await self._process.stdout.readline():
                if line.startswith(b"{"):
                    answer: dict[str, Any] = json.loads(line)
                    return answer
        raise RuntimeError(f"{self._name} has ended")
