"""The life of an engine, without any I/O."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyhead.v1 import buffer_pb2 as pb
from services.common.errors import FencedError, PreconditionError
from services.common.versions import Version
from services.rollout.fleet import EngineLife, Fence

V1, V2 = Version(1, 1), Version(1, 2)


def serving(version: Version = V1) -> EngineLife:
    life = EngineLife()
    life.engine_ready()
    life.begin_update(version)
    life.commit_update()
    return life


def test_an_engine_begins_suspect_and_joins_when_it_answers():
    life = EngineLife()
    assert life.state == pb.REPLICA_STATE_SUSPECT
    with pytest.raises(PreconditionError, match="SUSPECT"):
        life.begin_update(V1)
    life.engine_ready()
    assert (life.state, life.version, life.may_generate) == (pb.REPLICA_STATE_JOINING, None, False)


def test_a_complete_update_leads_to_serving():
    life = EngineLife()
    life.engine_ready()
    life.begin_update(V1)
    assert life.state == pb.REPLICA_STATE_SYNCING
    assert life.commit_update() == V1
    assert (life.state, life.version, life.may_generate) == (pb.REPLICA_STATE_SERVING, V1, True)


def test_a_serving_engine_stays_serving_while_it_is_updated():
    life = serving()
    life.begin_update(V2)
    assert (life.state, life.version, life.may_generate) == (pb.REPLICA_STATE_SERVING, V1, False)
    life.commit_update()
    assert life.version == V2


@pytest.mark.parametrize("version", [V1, Version(1, 0), Version(0, 9)])
def test_versions_only_grow(version):
    with pytest.raises(PreconditionError, match="not newer"):
        serving().begin_update(version)


def test_a_newer_epoch_may_go_back_in_steps():
    life = serving(Version(1, 9))
    life.begin_update(Version(2, 3))
    assert life.commit_update() == Version(2, 3)


def test_an_update_that_touched_nothing_changes_nothing():
    life = serving()
    life.begin_update(V2)
    life.abort_update(torn=False)
    assert (life.state, life.version, life.may_generate) == (pb.REPLICA_STATE_SERVING, V1, True)


def test_a_torn_update_quarantines_until_a_complete_one():
    life = serving(V2)
    life.begin_update(Version(1, 3))
    life.abort_update(torn=True)
    assert (life.state, life.version) == (pb.REPLICA_STATE_QUARANTINED, None)
    life.begin_update(V2)  # a repair may bring any version
    life.abort_update(torn=False)
    assert life.state == pb.REPLICA_STATE_QUARANTINED
    life.begin_update(V2)
    life.commit_update()
    assert life.version == V2


def test_a_lost_engine_takes_version_and_update_with_it():
    life = serving()
    life.begin_update(V2)
    life.engine_lost()
    assert (life.state, life.version, life.updating) == (pb.REPLICA_STATE_SUSPECT, None, None)
    with pytest.raises(PreconditionError, match="no update"):
        life.commit_update()


def test_a_fence_lets_the_newest_epoch_through():
    fence = Fence()
    for epoch in (1, 1, 3):
        fence.check(epoch)
    with pytest.raises(FencedError, match="2 is older than 3"):
        fence.check(2)


def test_weights_that_were_given_up_come_back_with_a_complete_update_only():
    life = serving()
    life.put_to_sleep()
    assert (life.state, life.version, life.may_generate) == (pb.REPLICA_STATE_YIELDED, None, False)
    life.begin_update(V1)
    with pytest.raises(PreconditionError, match="running"):
        life.put_to_sleep()
    life.abort_update(torn=False)
    assert life.state == pb.REPLICA_STATE_YIELDED
    life.wake()
    assert (life.state, life.version) == (pb.REPLICA_STATE_JOINING, None)
    life.begin_update(V1)
    life.commit_update()
    life.wake()
    assert (life.state, life.version) == (pb.REPLICA_STATE_SERVING, V1)


EVENTS = ["ready", "lost", "begin", "commit", "abort", "tear", "sleep", "wake"]


@given(st.lists(st.sampled_from(EVENTS), max_size=30))
def test_nothing_is_generated_without_a_complete_update_of_this_process(events):
    """A reference in one boolean: whole weights, of a version, with no update under way."""
    life, whole, before, step = EngineLife(), False, False, 0
    for event in events:
        step += 1
        try:
            match event:
                case "ready":
                    life.engine_ready()
                    whole = False
                case "lost":
                    life.engine_lost()
                    whole = False
                case "begin":
                    life.begin_update(Version(1, step))
                    before, whole = whole, False
                case "commit":
                    life.commit_update()
                    whole = True
                case "abort":
                    life.abort_update(torn=False)
                    whole = before
                case "tear":
                    life.abort_update(torn=True)
                    whole = False
                case "sleep":
                    life.put_to_sleep()
                    whole = False
                case "wake":
                    life.wake()
        except PreconditionError:
            continue
        assert life.may_generate == whole
        assert not life.may_generate or life.version is not None
