"""Tokens that come to nothing are counted under the reason; those that are not saved yet are a gauge."""

from __future__ import annotations

from services.common.errors import LimitError, PolyheadError
from tests.kit.rollout_rig import until

PROMPT = "3+4="


def counted(rig) -> dict[str, float]:
    return {key: value for key, value in rig.replica.stats.snapshot().items() if key.startswith("tokens_discarded")}


async def test_nothing_is_discarded_in_good_order(make_rig):
    rig = await make_rig(save_interval_s=60.0)
    rig.engine.limit_tokens = 4
    held = rig.buffer.add_group(PROMPT, 2)
    await until(lambda: rig.replica.stats.tokens_generated == 8)
    assert rig.replica.stats.snapshot()["tokens_unsaved"] == 8
    rig.engine.limit_tokens = None
    await until(lambda: all(sample.sample is not None for sample in held))
    assert rig.replica.stats.snapshot()["tokens_unsaved"] == 0
    assert counted(rig) == {"tokens_discarded": 0}


async def test_what_cannot_be_saved_before_a_release_counts_under_its_reason(make_rig):
    rig = await make_rig(save_interval_s=60.0)
    rig.buffer.releasing = False
    rig.engine.limit_tokens = 4
    held = rig.buffer.add_group(PROMPT, 2)
    rig.buffer.refuse_extending = {held[0].sample_id: LimitError("this message is too big")}
    await until(lambda: rig.replica.stats.tokens_generated == 8)
    await rig.worker.drain()
    assert counted(rig) == {"tokens_discarded": 4, "tokens_discarded.drain": 4}


async def test_tokens_at_fault_count_as_the_samples_error(make_rig):
    rig = await make_rig()
    rig.buffer.releasing = False
    rig.engine.limit_tokens = 4
    (held,) = rig.buffer.add_group(PROMPT, 1)
    rig.buffer.refuse_extending = {held.sample_id: LimitError("this message is too big")}
    await until(lambda: held.released is not None)
    await until(lambda: rig.replica.stats.tokens_discarded > 0)
    discarded = counted(rig)
    assert set(discarded) == {"tokens_discarded", "tokens_discarded.sample_error"}
    assert len(set(discarded.values())) == 1


async def test_a_lost_lease_takes_what_was_not_saved(make_rig):
    rig = await make_rig()
    rig.engine.limit_tokens = 4
    (held,) = rig.buffer.add_group(PROMPT, 1)
    rig.buffer.refuse_extending = {held.sample_id: PolyheadError("INTERNAL")}
    await until(lambda: rig.replica.stats.tokens_generated == 4)
    rig.buffer.lose_lease(held)
    rig.buffer.refuse_extending = {}
    await until(lambda: rig.worker.holding == 0)
    assert counted(rig) == {"tokens_discarded": 4, "tokens_discarded.lease_lost": 4}


async def test_a_completion_that_comes_too_late_is_lost_as_a_whole(make_rig):
    rig = await make_rig(save_interval_s=60.0)
    rig.engine.limit_tokens = 4
    (held,) = rig.buffer.add_group(PROMPT, 1)
    await until(lambda: rig.replica.stats.tokens_generated == 4)
    rig.buffer.lose_lease(held)
    rig.engine.limit_tokens = None
    await until(lambda: rig.replica.stats.tokens_discarded > 0)
    assert counted(rig) == {"tokens_discarded": 10, "tokens_discarded.completed_late": 10}
