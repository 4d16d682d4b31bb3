import asyncio
import sys

import psutil
import pytest

from services.cli.supervisor import MAX_RESTARTS, Child, Supervisor
from services.common.errors import PolyheadError
from services.common.lifecycle import STOPPED_EARLY


def child(tmp_path, role, code):
    return Child(role, [sys.executable, "-c", code], tmp_path / f"{role}.log")


def supervisor():
    restarted = []
    return Supervisor(asyncio.Event(), lambda one, status: restarted.append((one.role, status))), restarted


async def test_a_child_that_dies_is_restarted_until_the_leader_is_done(tmp_path):
    watcher, restarted = supervisor()
    victim = watcher.add(child(tmp_path, "victim", "import time; time.sleep(60)"))
    leader = watcher.add(child(tmp_path, "leader", "import time; time.sleep(1.5)"))
    watching = asyncio.create_task(watcher.watch(leader))
    await asyncio.sleep(0.3)
    victim.process.kill()
    assert await watching == 0
    assert restarted == [("victim", -9)]
    assert len(victim.pids) == 2
    await watcher.end([victim], grace_s=5)
    assert not psutil.pid_exists(victim.pids[-1])


async def test_a_bad_configuration_is_not_retried_and_its_line_is_shown(tmp_path):
    watcher, restarted = supervisor()
    code = "import sys; print('polyhead reward: reward.scorer: no such function', file=sys.stderr); sys.exit(2)"
    leader = watcher.add(child(tmp_path, "reward", code))
    with pytest.raises(PolyheadError, match=r"reward failed: reward.scorer: no such function") as caught:
        await watcher.watch(leader)
    assert caught.value.exit_code == 2
    assert restarted == []


@pytest.mark.parametrize(("status", "spared"), [(2, True), (3, False), (4, False)])
async def test_a_failure_of_its_own_can_be_spared_and_is_not_started_again(tmp_path, status, spared):
    asked = []
    watcher = Supervisor(asyncio.Event(), lambda *_: None, lambda one, error: asked.append((one, error.reason)) or True)
    code = f"import sys; print('polyhead rollout: no such GPU', file=sys.stderr); sys.exit({status})"
    lost = watcher.add(child(tmp_path, "rollout", code))
    leader = watcher.add(child(tmp_path, "leader", "import time; time.sleep(1.5)"))
    if spared:
        assert await watcher.watch(leader) == 0
        assert asked == [(lost, "no such GPU")]
        assert (watcher.children, watcher.ended, len(lost.pids)) == ([leader], [lost], 1)
    else:
        with pytest.raises(PolyheadError, match="no such GPU"):
            await watcher.watch(leader)
        await watcher.end([leader], grace_s=5)


async def test_a_store_without_room_on_its_disk_is_waited_for(tmp_path):
    watcher, restarted = supervisor()
    store = child(tmp_path, "store", "print('# AOF write error. Exiting...'); raise SystemExit(1)")
    store.waits_for = {"AOF write error": "room"}
    watcher.add(store).process.wait()
    store.restarts = MAX_RESTARTS
    watcher._bring_back(store, 1)
    assert (restarted, store.waiting_for) == ([("store", 1)], "room")
    store.log_path.write_text("# Bad file format reading the append only file")
    store.restart_at, store.restarts = 0.0, MAX_RESTARTS
    with pytest.raises(PolyheadError, match="store failed"):
        watcher._bring_back(store, 1)


async def test_one_that_registers_is_up_when_the_registry_says_that_it_serves(tmp_path):
    watcher, _ = supervisor()
    slow = child(tmp_path, "rollout", "import time; time.sleep(60)")
    slow.registers, slow.stable_after_s = True, -1.0
    watcher.add(slow)
    watcher.note_serving({slow.process.pid + 1})
    assert not slow.stable
    watcher.note_serving({slow.process.pid})
    assert slow.stable
    slow.process.kill()
    slow.process.wait()
    slow.restarts = 5
    watcher._bring_back(slow, -9)
    assert slow.restarts == 1, "it was up: its restarts are counted anew"
    assert not slow.stable, "its successor has yet to register"
    slow.process.kill()
    slow.process.wait()
    watcher._bring_back(slow, -9)
    assert slow.restarts == 2, "that one never was"
    await watcher.end([slow], grace_s=5)


async def test_one_that_ignores_sigterm_is_killed_after_the_grace(tmp_path):
    watcher, _ = supervisor()
    stubborn = watcher.add(
        child(
            tmp_path,
            "stubborn",
            "import signal,time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)",
        )
    )
    while not stubborn.log_path.read_text():
        await asyncio.sleep(0.05)
    await watcher.end([stubborn], grace_s=0.5)
    assert stubborn.process.returncode == -9
    assert watcher.children == []
    assert watcher.ended == [stubborn]


async def test_one_that_was_told_to_end_is_not_restarted_and_not_told_twice(tmp_path):
    watcher, restarted = supervisor()
    code = (
        "import signal,sys; told=[]; signal.signal(15, lambda *_: told.append(1)); print(1, flush=True)\n"
        "while not told: signal.pause()\n"
        "print('farewell', len(told), flush=True)"
    )
    leaver = watcher.add(child(tmp_path, "leaver", code))
    leader = watcher.add(child(tmp_path, "leader", "import time; time.sleep(1.5)"))
    while not leaver.log_path.read_text():
        await asyncio.sleep(0.05)
    watcher.tell(leaver)
    assert await watcher.watch(leader) == 0
    await watcher.end([leaver], grace_s=5)
    assert leaver.log_path.read_text().split() == ["1", "farewell", "1"]
    assert (restarted, len(leaver.pids)) == ([], 1)


async def test_a_leader_that_was_told_to_stop_is_not_restarted_and_not_taken_for_done(tmp_path):
    watcher, restarted = supervisor()
    leader = watcher.add(child(tmp_path, "trainer", f"import sys; sys.exit({STOPPED_EARLY})"))
    assert await watcher.watch(leader) == STOPPED_EARLY
    assert restarted == []


async def test_a_group_starts_again_as_one(tmp_path):
    watcher, restarted = supervisor()
    first, second = (child(tmp_path, f"rank-{rank}", "import time; time.sleep(60)") for rank in range(2))
    first.group = second.group = "ranks"
    leader = child(tmp_path, "leader", "import time; time.sleep(3)")
    for one in (first, second, leader):
        watcher.add(one)
    watching = asyncio.create_task(watcher.watch(leader))
    await asyncio.sleep(0.3)
    second.process.kill()
    assert await watching == 0
    assert restarted == [("rank-1", -9)]
    assert (len(first.pids), len(second.pids)) == (2, 2)
    assert not psutil.pid_exists(first.pids[0])
    await watcher.end([first, second], grace_s=5)


async def test_a_group_whose_member_says_that_there_is_no_point_is_not_started_again(tmp_path):
    watcher, _ = supervisor()
    refused = "import sys, time; time.sleep(0.3); print('polyhead trainer: no such GPU', file=sys.stderr); sys.exit(2)"
    leader = child(tmp_path, "trainer", "import time; time.sleep(0.2); raise SystemExit(1)")
    other = child(tmp_path, "other", refused)
    leader.group = other.group = "trainer"
    for one in (leader, other):
        watcher.add(one)
    with pytest.raises(PolyheadError, match="no such GPU") as caught:
        await watcher.watch(leader)
    assert caught.value.exit_code == 2
    watcher.kill_all()


async def test_one_that_its_group_let_go_is_not_started_again(tmp_path):
    watcher, restarted = supervisor()
    leader = child(tmp_path, "leader", "import time; time.sleep(1)")
    other = child(tmp_path, "other", "pass")
    leader.group = other.group = "ranks"
    for one in (leader, other):
        watcher.add(one)
    assert await watcher.watch(leader) == 0
    assert restarted == []
