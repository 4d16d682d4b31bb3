"""A trainer's end of a weight push, and streams read in the background meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import torch

from services.common.process import free_port
from services.common.weight_group import WeightGroup
from tests.kit.engine_process import EngineApi, logprobs_of

GROUP_TIMEOUT_S = 20.0


class Collector:
    """Reads one stream in the background and keeps what it brought."""

    def __init__(self, api: EngineApi, prompt: list[int], **fields: Any) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.meta: dict[str, Any] = {}
        self.stated: list[tuple[int, str]] = []
        """For each event: tokens so far, and the version it states."""
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._read(api.stream(prompt, **fields)))

    async def _read(self, events: AsyncIterator[dict[str, Any]]) -> None:
        async for event in events:
            self.token_ids += event["output_ids"]
            self.logprobs += logprobs_of(event)
            self.meta = event["meta_info"]
            self.stated.append((len(self.token_ids), self.meta["weight_version"]))
            self._news.set()

    async def has(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.token_ids) < count:
                assert not self._task.done(), f"ended after {len(self.token_ids)} tokens"
                self._news.clear()
                await self._news.wait()

    async def quiet(self) -> int:
        """Waits until nothing has come for a while; returns how many tokens there are."""
        while True:
            before = len(self.token_ids)
            await asyncio.sleep(0.3)
            if len(self.token_ids) == before:
                return before

    async def ended(self) -> None:
        async with asyncio.timeout(30):
            await self._task


class Channel:
    """The trainer's end of a weight group."""

    def __init__(self, api: EngineApi) -> None:
        self._api = api
        self.name = "test_push"

    async def __aenter__(self) -> Channel:
        where: dict[str, Any] = {"address": "127.0.0.1", "port": free_port()}
        body = {
            "master_address": where["address"],
            "master_port": where["port"],
            "rank_offset": 1,
            "world_size": 2,
            "group_name": self.name,
            "backend": "gloo",
        }
        rank0 = {"backend": "gloo", "rank": 0, "world_size": 2, "name": self.name, "timeout_s": GROUP_TIMEOUT_S}
        self.group, _ = await asyncio.gather(
            asyncio.to_thread(WeightGroup, **where, **rank0), self._api.ok("/init_weights_update_group", body)
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._api.ok("/destroy_weights_update_group", {"group_name": self.name})
        self.group.close()

    async def push(
        self, model: Any, version: str, *, buckets: int = 1, flattened: bool = True, flush: bool = False
    ) -> None:
        """All weights of a Hugging Face model, within a session of its own. `flush` goes with the last bucket."""
        tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        names = list(tensors)
        size = -(-len(names) // buckets)
        await self._api.ok("/begin_weight_update")
        for start in range(0, len(names), size):
            last = start + size >= len(names)
            part = {name: tensors[name] for name in names[start : start + size]}
            status, answer = await self.send(part, version if last else None, flattened=flattened, flush=last and flush)
            assert status == 200, answer
        await self._api.ok("/end_weight_update")

    async def send(
        self, tensors: dict[str, torch.Tensor], version: str | None, *, flattened: bool = True, flush: bool = False
    ) -> tuple[int, Any]:
        body = self._body(tensors, version, flattened=flattened, flush=flush)
        parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors.values()]
        messages = [torch.cat(parts)] if flattened else parts
        answer = asyncio.create_task(self._api.post("/update_weights_from_distributed", body))
        for message in messages:
            await asyncio.to_thread(self.group.broadcast, message)
        return await answer

    async def send_refused(self, tensors: dict[str, torch.Tensor]) -> tuple[int, Any]:
        """A bucket that the engine refuses while it is on the wire."""
        sent, answer = await asyncio.gather(
            asyncio.to_thread(
                self.group.broadcast, torch.cat([tensor.view(torch.uint8) for tensor in tensors.values()])
            ),
            self._api.post("/update_weights_from_distributed", self._body(tensors, None, flattened=True)),
            return_exceptions=True,
        )
        assert sent is None or isinstance(sent, RuntimeError)  # a small one is gone before the engine closes
        assert not isinstance(answer, BaseException)
        return answer

    def _body(
        self, tensors: dict[str, torch.Tensor], version: str | None, *, flattened: bool, flush: bool = False
    ) -> dict[str, Any]:
        return {
            "names": list(tensors),
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
            "shapes": [list(tensor.shape) for tensor in tensors.values()],
            "group_name": self.name,
            "load_format": "flattened_bucket" if flattened else None,
            "flush_cache": flush,
            "weight_version": version,
        }
