"""A user's buffer filter, in slime's signature: ``fn(args, rollout_id, buffer, num_samples) -> groups``."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.common import wire
from services.common.buffer_client import BufferClient
from services.common.plugins import load_function
from services.reward.filters import ScoredItem, WaitingItem, to_scored_sample
from services.reward.scorers.user import Sample

FIELD = "reward.buffer_filter"
# A filter that waits longer for the buffer runs out of its own time.
FETCH_S = 5.0


@dataclass
class WaitingSample(Sample):
    """An unfinished sample, or its finished sibling."""

    sample_id: str = ""
    buffer_address: str = ""

    @property
    def tokens(self) -> list[int]:
        """Fetched at each use: of a finished sample prompt and completion, of another the completion so far."""
        return _tokens(asyncio.run(_fetch(self.buffer_address, self.sample_id)))


class BufferFilter:
    """Says which waiting groups go first."""

    def __init__(self, path: str, search: Sequence[Path], args: Mapping[str, Any], buffer_address: str) -> None:
        """Raises ConfigError when the function does not import."""
        self._function = load_function(path, field=FIELD, search=search)
        self._args = SimpleNamespace(**args)
        self._buffer_address = buffer_address

    def __call__(self, waiting: WaitingItem) -> list[int]:
        """The `group_index` of what the function returns, in its order. The rollout id is None, as it is in slime."""
        buffer = [[self._sample(ScoredItem(*each)) for each in group] for group in waiting.groups]
        return [int(group[0].group_index) for group in self._function(self._args, None, buffer, waiting.num_samples)]

    def _sample(self, scored: ScoredItem) -> WaitingSample:
        plain = to_scored_sample(scored)
        return WaitingSample(**vars(plain), sample_id=scored.item[0], buffer_address=self._buffer_address)


async def _fetch(address: str, sample_id: str) -> pb.FetchedSample:
    async with BufferClient(address, retry_for_s=FETCH_S) as buffer:
        return (await buffer.fetch([sample_id])).samples[0]


def _tokens(fetched: pb.FetchedSample) -> list[int]:
    parts = [delta.token_ids for delta in fetched.partial]
    if fetched.sample:
        parts = [segment.token_ids for segment in sample_pb2.Sample.FromString(fetched.sample).segments]
    return [token for part in parts for token in wire.decode_tokens(part).tolist()]
