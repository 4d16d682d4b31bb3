"""What the summary and `polyhead status` say of engines and of tokens that were discarded."""

from __future__ import annotations

import asyncio
import io

import pytest
from rich.console import Console

from polyhead.v1 import buffer_pb2 as pb
from services.cli.observe import Observer
from services.cli.status import replica_table
from services.cli.summary import engine_phrase, summarise
from services.cli.supervisor import Supervisor
from services.common.config import load
from services.common.versions import Version

SERVING, DEAD = pb.REPLICA_STATE_SERVING, pb.REPLICA_STATE_DEAD


def replica(replica_id, *, state=SERVING, engines=2, unsaved=0, name="sglang/0.5.23"):
    """A rollout replica; with several engines, behind a router."""
    return pb.Replica(
        replica_id=replica_id,
        role=pb.ROLE_ROLLOUT,
        state=state,
        pid=10,
        weight_version=Version(1, 7).to_proto(),
        engines=[
            pb.Engine(index=index, state=SERVING, weight_version=Version(1, 7 + index).to_proto(), name=name)
            for index in range(engines)
        ],
        stats={"tokens_unsaved": unsaved},
        child_pids={f"engine-{index}": 20 + index for index in range(engines)}
        | ({"router": 30} if engines > 1 else {}),
    )


class Buffer:
    """Answers looks with what it is told."""

    def __init__(self):
        self.replicas = []
        self.counters = {}

    async def get_ledger(self):
        return pb.GetLedgerResponse(counters=self.counters)

    async def list_replicas(self):
        return self.replicas


@pytest.fixture
def seen(tmp_path):
    observer = Observer(load(None, {"run.dir": str(tmp_path)}), Supervisor(asyncio.Event(), lambda *_: None))
    observer._buffer = Buffer()
    return observer


async def look(seen, *replicas, counters=None):
    seen._buffer.replicas = list(replicas)
    seen._buffer.counters = counters or {}
    assert await seen.look()
    seen.complete = True
    return summarise(load(None), seen, wall_s=1.0)


async def test_the_engine_that_was_seen_is_named_with_how_many_there_were(seen):
    await look(seen, replica("rollout-0.a"))
    summary = await look(seen, replica("rollout-0.a", state=DEAD, engines=0))
    assert summary["engine"] == {"name": "sglang/0.5.23", "engines": 2, "replicas": 1, "router": True}
    assert engine_phrase(summary["engine"]) == "sglang/0.5.23, 2 engines behind a router"


async def test_a_killed_replica_and_its_successor_are_one_replica(seen):
    summary = await look(seen, replica("rollout-0.a"), replica("rollout-0.b"), replica("rollout-1.c"))
    assert summary["engine"]["replicas"] == 2


async def test_engines_of_several_kinds_are_a_list(seen):
    one, other = replica("rollout-0.a", engines=1), replica("rollout-1.b", engines=1, name="sglang/0.5.24")
    summary = await look(seen, one, other)
    assert summary["engine"] == {
        "name": ["sglang/0.5.23", "sglang/0.5.24"],
        "engines": 1,
        "replicas": 2,
        "router": False,
    }
    assert engine_phrase(summary["engine"]) == "sglang/0.5.23 and sglang/0.5.24 in each of 2 replicas"


async def test_discarded_tokens_by_reason_add_up_to_their_total(seen):
    await look(seen, replica("rollout-0.a", unsaved=5), replica("rollout-1.b", unsaved=7))
    counters = {"tokens_discarded": 9, "tokens_discarded.drain": 6, "tokens_discarded.engine_lost": 3}
    farewell = replica("rollout-1.b", state=DEAD, unsaved=0)
    summary = await look(seen, farewell, counters=counters)
    assert summary["tokens_discarded_by_reason"] == {"drain": 6, "engine_lost": 3, "replica_lost": 5}
    assert summary["tokens_discarded"] == 14


async def test_nobody_seen_is_said_so(seen):
    summary = await look(seen)
    assert summary["engine"] == {"name": None, "engines": 0, "replicas": 0, "router": False}
    assert summary["tokens_discarded_by_reason"] == {}


def test_status_shows_each_engine_below_its_replica():
    out = io.StringIO()
    Console(file=out, width=160).print(replica_table([replica("rollout-0.a")]))
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert rows[1:] == [
        ["rollout-0.a", "serving", "e1.s7", "10", "router:30"],
        ["engine-0", "serving", "e1.s7", "20", "sglang/0.5.23"],
        ["engine-1", "serving", "e1.s8", "21", "sglang/0.5.23"],
    ]
