"""Which engines a replica has, and whether a router stands in front of them."""

from __future__ import annotations

import asyncio

import pytest

from services.common.config import Config
from services.common.errors import ConfigError
from services.common.lifecycle import Process
from services.rollout.building import build_replica
from services.rollout.engines.external import ExternalKeeper
from services.rollout.engines.keeper import EngineKeeper
from services.rollout.engines.router import RouterKeeper
from tests.kit.rollout_rig import changed


def build(config: Config, index: int = 0):
    process = Process("rollout", index, f"rollout-{index}.test", asyncio.Event())
    replica, keepers = build_replica(config, process)
    assert len(replica.engines) == sum(not isinstance(keeper, RouterKeeper) for keeper in keepers)
    return replica, [type(keeper) for keeper in keepers]


@pytest.mark.parametrize(
    ("settings", "keepers"),
    [
        ({}, [EngineKeeper]),
        ({"engines": 2}, [EngineKeeper, EngineKeeper, RouterKeeper]),
        ({"engine": {"external": ["http://a:1"]}}, [ExternalKeeper]),
        ({"engine": {"external": ["http://a:1", "http://b:1"]}}, [ExternalKeeper, ExternalKeeper, RouterKeeper]),
    ],
)
def test_each_engine_has_a_keeper_and_several_have_a_router(base_config, settings, keepers):
    replica, kinds = build(changed(base_config, **settings))
    assert kinds == keepers
    assert (replica.router is not None) == (RouterKeeper in kinds)


def test_a_replica_without_a_share_of_the_external_engines_is_refused(base_config):
    config = changed(base_config, replicas=2, engine={"external": ["http://a:1"]})
    build(config, index=0)
    with pytest.raises(ConfigError, match=r"rollout\.engine\.external"):
        build(config, index=1)
