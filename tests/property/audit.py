"""Recounts a run from what lies in Redis, past all scripts of the store: every sample is in exactly one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgpack
import redis

PENDING, GENERATING, GENERATED, SCORING, SCORED, READY, TRAINING = range(1, 8)
DEAD = 11
# Places in a sample's record (common.lua).
_STATE, _LEASE = 0, 1
_OPEN = ("fresh", "live", "bound", "rejected")
_INDEXES = (*_OPEN, "ready", "pending", "scorable", "lease:1", "lease:2", "dead", "letters")

_READ = """
local P, out = KEYS[1], {}
out[1] = redis.call('GET', P .. 'meta')
local found, groups, bits = {}, {}, {}
for k, index in ipairs({
  'fresh', 'live', 'bound', 'rejected', 'ready', 'pending', 'scorable', 'lease:1', 'lease:2', 'dead'
}) do
  found[k] = redis.call('ZRANGE', P .. index, 0, -1)
end
found[11] = redis.call('HKEYS', P .. 'letters')
for k = 1, 4 do
  for _, m in ipairs(found[k]) do groups[#groups + 1] = redis.call('GET', P .. 'g:' .. tonumber(m)) or '' end
end
local meta = cmsgpack.unpack(out[1])
for name in pairs(meta.sums) do
  bits[#bits + 1] = name
  bits[#bits + 1] = redis.call('GET', P .. 'b:' .. name) or ''
end
out[2], out[3], out[4] = found, groups, bits
return out
"""


@dataclass(slots=True)
class Found:
    """What lies in the store. `closed` holds sets of serial numbers, as bits."""

    accepted: int
    group_size: int
    indexes: dict[str, list[int]]
    groups: dict[int, list[int]]
    """States of the open groups' samples, by order."""
    scored_whole: bool
    closed: dict[str, int] = field(default_factory=dict)

    @property
    def trained(self) -> int:
        return self.closed.get("consumed", 0) | self.closed.get("retired", 0)


def read(client: redis.Redis, run_name: str) -> Found:
    meta, found, groups, bits = client.eval(_READ, 1, f"{{{run_name}}}:")
    run = msgpack.unpackb(meta, strict_map_key=False)
    indexes = {name: [int(each) for each in members] for name, members in zip(_INDEXES, found, strict=True)}
    states: dict[int, list[int]] = {}
    for order, packed in zip((order for name in _OPEN for order in indexes[name]), groups, strict=True):
        assert packed, f"group {order} is listed, but has no record"
        assert order not in states, f"group {order} is listed twice"
        record: dict[str, Any] = msgpack.unpackb(packed, strict_map_key=False)
        assert (record["order"], record["closed"]) == (order, "")
        states[order] = [sample[_STATE] for sample in record["samples"]]
    closed = {name.decode(): _bits(bitmap) for name, bitmap in zip(bits[::2], bits[1::2], strict=True)}
    return Found(run["accepted"], run["group_size"], indexes, states, run["scored_whole"], closed)


def _bits(bitmap: bytes) -> int:
    """Bit n of the number for offset n of a Redis bitmap, whose first offset is the highest bit of the first byte."""
    return int.from_bytes(bitmap.translate(_REVERSED), "little")


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def check(found: Found) -> None:
    """I1 and I2 as they stand in the store."""
    size = found.group_size
    places = dict(found.closed)
    for order, states in found.groups.items():
        for index, state in enumerate(states):
            if state != DEAD:
                name = f"open:{state}"
                places[name] = places.get(name, 0) | 1 << (order * size + index)
    seen = 0
    for name, members in places.items():
        twice = seen & members
        assert not twice, f"samples {_members(twice)} are {name} and something else"
        seen |= members
    lost = ((1 << found.accepted) - 1) ^ seen
    assert not lost, f"samples {_members(lost)} are nowhere, or were never accepted"
    _check_indexes(found)


def _check_indexes(found: Found) -> None:
    size, leases = found.group_size, {GENERATING: set[int](), SCORING: set[int]()}
    listed = {name: set(found.indexes[name]) for name in ("ready", "pending", "scorable", "bound", "fresh", "rejected")}
    for order, states in found.groups.items():
        alive = [state for state in states if state != DEAD]
        whole = {state for state in alive if state in (READY, TRAINING)}
        assert alive, f"group {order} is open, and all its samples are dead"
        assert not whole or (set(alive) == whole and len(whole) == 1), f"group {order} is torn: {states}"
        assert (order in listed["ready"]) == (alive[0] == READY and order not in listed["bound"]), (order, states)
        assert (order in listed["pending"]) == (PENDING in alive and order not in listed["fresh"]), (order, states)
        waits = found.scored_whole and {PENDING, GENERATING, SCORING} & set(alive)
        generated = GENERATED in alive and not waits
        scorable = order not in listed["rejected"] and (generated or set(alive) == {SCORED})
        assert (order in listed["scorable"]) == scorable, (order, states)
        for index, state in enumerate(states):
            if state in leases:
                leases[state].add(order * size + index)
    for stage, state in ((1, GENERATING), (2, SCORING)):
        assert set(found.indexes[f"lease:{stage}"]) == leases[state], f"leases of stage {stage}"
    assert set(found.indexes["dead"]) == set(found.indexes["letters"])


def _members(bits: int) -> list[int]:
    return [at for at in range(bits.bit_length()) if bits >> at & 1]
