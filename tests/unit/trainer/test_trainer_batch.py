"""Decoding, staleness and policy masks, splitting, packing."""

from dataclasses import replace

import numpy as np
import pytest
from structlog.testing import capture_logs

from polyhead.v1 import sample_pb2
from services.common import wire
from services.common.errors import InvalidArgumentError
from services.common.versions import Version
from services.trainer.batch.packing import PackItem, pack
from services.trainer.batch.plan import Batching, split_by_groups
from services.trainer.batch.prepare import prepare_step
from services.trainer.batch.samples import decode_groups
from services.trainer.batch.staleness import Clock, fresh_tokens, last_version, sample_staleness, trained_mask
from services.trainer.metrics import batch_metrics, sample_line
from tests.kit.trainer_batch import make_batch, make_group, make_sample


def decode_one(**fields):
    sample = make_sample(np.random.default_rng(0), sample_id="g0-000", prompt=[5, 6], **fields)
    return decode_groups([make_group([sample], [0.5])], vocab_size=128)[0]


def test_decoding_keeps_groups_rewards_and_arrays():
    samples = decode_groups(make_batch(0, groups=3, size=2), vocab_size=128)
    assert [sample.group_id for sample in samples] == ["g00000000"] * 2 + ["g00000001"] * 2 + ["g00000002"] * 2
    segment = samples[0].segments[0]
    assert len(segment.loss_mask) == len(segment.rollout_logprobs) == segment.completion_length
    assert not segment.token_ids.flags.owndata


def test_a_token_outside_the_vocabulary_names_its_sample():
    groups = make_batch(0, groups=1, size=2)
    with pytest.raises(InvalidArgumentError, match=r"g00000000-000: token id .* vocabulary of 4"):
        decode_groups(groups, vocab_size=4)


def test_a_sample_over_the_context_of_the_model_is_refused_by_name():
    sample = make_sample(np.random.default_rng(0), sample_id="g0-000", prompt=[5, 6], completion_length=7)
    group = make_group([sample], [0.5])
    assert len(decode_groups([group], vocab_size=128, context_length=9)) == 1
    with pytest.raises(InvalidArgumentError, match="g0-000: 9 tokens are more than the model's context of 8"):
        decode_groups([group], vocab_size=128, context_length=8)


def test_a_payload_that_is_no_sample_names_its_sample():
    groups = make_batch(0, groups=1, size=1)
    groups[0].samples[0].sample = b"\xff\xff"
    with pytest.raises(InvalidArgumentError, match="g00000000-000"):
        decode_groups(groups, vocab_size=128)


def test_a_flipped_bit_in_a_stored_payload_names_its_sample():
    groups = make_batch(0, groups=1, size=1)
    sample = sample_pb2.Sample.FromString(groups[0].samples[0].sample)
    sample.segments[0].digest = wire.segment_digest(sample.segments[0])
    groups[0].samples[0].sample = sample.SerializeToString()
    assert len(decode_groups(groups, vocab_size=128)) == 1
    tokens = sample.segments[0].token_ids
    groups[0].samples[0].sample = groups[0].samples[0].sample.replace(tokens, bytes([tokens[0] ^ 1]) + tokens[1:])
    with pytest.raises(InvalidArgumentError, match=r"g00000000-000: .*damaged"):
        decode_groups(groups, vocab_size=128)


def test_of_a_batch_only_the_unusable_sample_is_not_trained():
    groups = make_batch(0, groups=2, size=2)
    groups[0].samples[1].sample = b"\xff\xff"
    whole = decode_groups(make_batch(0, groups=2, size=2), vocab_size=128)
    with capture_logs() as logs:
        samples = decode_groups(groups, vocab_size=128)
    assert [entry["sample_id"] for entry in logs if entry["event"] == "sample_unusable"] == ["g00000000-001"]
    assert [sample.reward for sample in samples] == [sample.reward for sample in whole]
    assert [bool(sample.segments) for sample in samples] == [True, False, True, True]
    step = prepare_step(
        samples,
        Clock(Version(1, 0), {1: 0}),
        mask_above=None,
        reduction="per_sample",
        batching=Batching(1000),
    )
    assert set(step.rows.tolist()) == {0, 2, 3}
    line = batch_metrics(groups, samples, Clock(Version(1, 0), {1: 0}), None)
    assert line["samples"] == 4
    assert sample_line(1, samples[1], Clock(Version(1, 0), {1: 0}))["spans"] == []


def test_rewards_of_spans_stand_at_their_last_tokens():
    sample = make_sample(np.random.default_rng(0), sample_id="g0-000", prompt=[5], completion_length=4)
    sample.segments.append(
        make_sample(np.random.default_rng(1), sample_id="g0-000", prompt=[], completion_length=3).segments[0]
    )
    group = make_group([sample], [0.5])
    for start, end, reward in [(0, 7, 3.0), (0, 2, 1.0), (2, 5, 2.0)]:
        group.samples[0].score.spans.add(start=start, end=end, reward=reward)
    # Of the second segment the first token is only context: what it earned is the token's before.
    assert decode_groups([group], vocab_size=128)[0].process == ((1, 1.0), (3, 2.0), (5, 3.0))
    group.samples[0].score.spans.add(start=0, end=8, reward=1.0)
    with pytest.raises(InvalidArgumentError, match="g0-000: a reward of tokens behind its 7"):
        decode_groups([group], vocab_size=128)


def test_without_a_prompt_the_first_token_is_only_context():
    sample = make_sample(np.random.default_rng(0), sample_id="g0-000", prompt=[], completion_length=4)
    decoded = decode_groups([make_group([sample], [0.0])], vocab_size=128)[0].segments[0]
    assert (decoded.prompt_length, decoded.completion_length) == (1, 3)
    assert len(decoded.loss_mask) == len(decoded.rollout_logprobs) == 3
    assert [(span.start, span.end) for span in decoded.spans] == [(0, 3)]


def test_staleness_counts_through_the_fork_of_a_recovery():
    clock = Clock(Version(2, 12), {1: 0, 2: 10})
    assert clock.staleness(Version(2, 12)) == 0
    assert clock.staleness(Version(2, 10)) == 2
    assert clock.staleness(Version(1, 10)) == 2
    assert clock.staleness(Version(1, 13)) == 5


def test_an_epoch_that_never_recovered_changes_nothing():
    assert Clock(Version(3, 10), {1: 0, 3: 10}).staleness(Version(1, 9)) == 1


def test_the_policy_mask_takes_out_exactly_the_tokens_over_the_bound():
    sample = decode_one(completion_length=6, versions=[Version(1, 1), Version(1, 4), Version(1, 5)])
    segment, clock = sample.segments[0], Clock(Version(1, 5), {1: 0})
    assert trained_mask(segment, clock, None).tolist() == [1, 1, 1, 1, 1, 1]
    assert trained_mask(segment, clock, 3).tolist() == [0, 0, 1, 1, 1, 1]
    assert trained_mask(segment, clock, 0).tolist() == [0, 0, 0, 0, 1, 1]
    assert segment.loss_mask.tolist() == [1, 1, 1, 1, 1, 1]
    assert fresh_tokens(segment, clock).tolist() == [False] * 4 + [True] * 2
    carried = replace(segment, spans=tuple(span._replace(carried=True) for span in segment.spans))
    assert not fresh_tokens(carried, clock).any()
    assert sample_staleness(sample, clock, None) == 4
    assert sample_staleness(sample, clock, 3) == 1


def test_optimizer_steps_take_whole_groups_and_lose_none():
    samples = decode_groups(make_batch(0, groups=5, size=3), vocab_size=128)
    steps = split_by_groups(samples, 2)
    assert [len({sample.group_id for sample in step}) for step in steps] == [3, 2]
    assert [sample.sample_id for step in steps for sample in step] == [sample.sample_id for sample in samples]
    assert split_by_groups(samples[:3], 4) == [samples[:3]]


def random_items(rng, count):
    prompts = [rng.integers(0, 99, rng.integers(1, 30)) for _ in range(3)]
    items = []
    for row in range(count):
        prompt = prompts[rng.integers(0, 3)]
        completion = rng.integers(0, 99, rng.integers(1, 60))
        tokens = np.concatenate([prompt, completion]).astype(np.int32)
        predict = np.arange(len(prompt) - 1, len(tokens) - 1)
        items.append(
            PackItem(
                token_ids=tokens[:-1],
                prompt_length=len(prompt),
                predict=predict,
                targets=tokens[predict + 1],
                rollout_logprobs=rng.uniform(-5, 0, len(predict)).astype(np.float32),
                fresh=rng.random(len(predict)) < 0.5,
                weight=1.0 / (row + 1),
                temperature=1.0 + row,
                sample_row=row,
            )
        )
    return items


@pytest.mark.parametrize("seed", range(10))
def test_a_packed_row_can_be_taken_apart_again(seed):
    items = random_items(np.random.default_rng(seed), 12)
    batch = pack(items)
    rows = [row for block in batch.blocks for row in block]
    found = sorted(batch.token_ids[row].tolist() for row in rows)
    for item, length in zip(items, map(len, items), strict=True):
        assert any(tokens[:length] == item.token_ids.tolist() for tokens in found)
    # Every token is read back from a place where it stands, at its own position in the sequence.
    flat = np.concatenate([block.reshape(-1) for block in batch.blocks])
    np.testing.assert_array_equal(flat[batch.slots], np.arange(len(batch.token_ids)))
    assert batch.lengths.tolist() == list(map(len, items))
    np.testing.assert_array_equal(batch.token_ids[batch.order], np.concatenate([item.token_ids for item in items]))
    np.testing.assert_array_equal(batch.order[batch.places], np.arange(len(batch.token_ids)))
    columns = np.concatenate([np.tile(np.arange(block.shape[1]), block.shape[0]) for block in batch.blocks])
    np.testing.assert_array_equal(columns[batch.slots], batch.position_ids)
    # Per-token arrays follow the items in order.
    np.testing.assert_array_equal(batch.targets, np.concatenate([item.targets for item in items]))
    np.testing.assert_array_equal(
        batch.token_ids[batch.predict], np.concatenate([item.token_ids[item.predict] for item in items])
    )
    np.testing.assert_array_equal(batch.sample_rows, np.repeat(np.arange(12), [len(item.targets) for item in items]))


def test_a_shared_prompt_is_there_once():
    items = random_items(np.random.default_rng(0), 12)
    batch = pack(items)
    prompts = {item.token_ids[: item.prompt_length].tobytes(): item.prompt_length for item in items}
    completions = sum(len(item) - item.prompt_length for item in items)
    assert len(batch.token_ids) == sum(prompts.values()) + completions


def test_blocks_hold_little_padding():
    rng = np.random.default_rng(0)
    batch = pack([item for seed in range(4) for item in random_items(rng, 20)])
    used = sum(len(np.unique(row)) for block in batch.blocks for row in block)
    assert used >= 0.7 * sum(block.size for block in batch.blocks)


def test_masking_what_is_off_policy_leaves_the_tokens_of_the_last_version():
    versions = [Version(1, 7), Version(2, 4), Version(2, 5)]
    sample = decode_one(completion_length=6, versions=versions, loss_mask=[1, 1, 1, 1, 0, 1])
    segment, clock = sample.segments[0], Clock(Version(2, 6), {1: 0, 2: 4})
    assert last_version(sample) == Version(2, 5)
    assert trained_mask(segment, clock, None, Version(2, 5)).tolist() == [0, 0, 0, 0, 0, 1]
    assert trained_mask(segment, clock, 0, Version(2, 5)).tolist() == [0] * 6
    (batch,) = prepare([sample], mask_offpolicy=True)
    assert batch.targets.tolist() == [segment.token_ids[-1]]
    (whole,) = prepare([decode_one(completion_length=4, versions=[Version(1, 2)])], mask_offpolicy=True)
    assert len(whole.targets) == 4


def prepare(samples, *, mask_above=None, mask_offpolicy=False, reduction="per_sample", max_tokens=4096):
    return prepare_step(
        samples,
        Clock(Version(1, 5), {1: 0}),
        mask_above=mask_above,
        mask_offpolicy=mask_offpolicy,
        reduction=reduction,
        batching=Batching(max_tokens),
    ).batches


def test_only_trained_tokens_are_predicted_and_nothing_behind_the_last_is_fed():
    sample = decode_one(completion_length=6, loss_mask=[0, 1, 0, 1, 0, 0])
    (batch,) = prepare([sample])
    tokens = sample.segments[0].token_ids
    assert batch.targets.tolist() == [tokens[3], tokens[5]]
    assert batch.predict.tolist() == [2, 4]
    assert batch.token_ids.tolist() == tokens[:5].tolist()
    assert batch.weights.tolist() == [0.5, 0.5]


def test_samples_without_a_trained_token_count_in_the_mean_of_samples():
    trained = decode_one(completion_length=2)
    empty = decode_one(completion_length=3, loss_mask=[0, 0, 0])
    (batch,) = prepare([trained, empty])
    assert batch.weights.tolist() == [0.25, 0.25]
    assert batch.sample_rows.tolist() == [0, 0]
    assert prepare([empty]) == []


def test_segments_of_one_sample_share_its_weight():
    sample = make_sample(np.random.default_rng(0), sample_id="g0-000", prompt=[5], completion_length=3)
    sample.segments.append(sample.segments[0])
    (decoded,) = decode_groups([make_group([sample], [1.0])], vocab_size=128)
    (batch,) = prepare([decoded])
    np.testing.assert_allclose(batch.weights, np.full(6, 1 / 6), rtol=1e-6)


def test_weights_do_not_depend_on_the_number_of_micro_batches():
    samples = decode_groups(make_batch(3), vocab_size=128)
    for reduction in ("per_sample", "per_token"):
        (whole,) = prepare(samples, reduction=reduction)
        parts = prepare(samples, reduction=reduction, max_tokens=1)
        assert len(parts) == len(samples)
        by_row = {int(part.sample_rows[0]): part for part in parts}
        for row in by_row:
            np.testing.assert_array_equal(by_row[row].weights, whole.weights[whole.sample_rows == row])


def test_however_packed_each_token_finds_its_flat_place():
    samples = decode_groups(make_batch(3), vocab_size=128)
    clock = Clock(Version(1, 5), {1: 0})
    flat = np.concatenate([segment.rollout_logprobs for sample in samples for segment in sample.segments])
    for batching in (Batching(4096), Batching(30), Batching(30, micro_batch_size=3), Batching(1)):
        step = prepare_step(samples, clock, mask_above=None, reduction="per_sample", batching=batching)
        np.testing.assert_array_equal(step.flat([batch.rollout_logprobs for batch in step.batches]), flat)


def test_fixed_micro_batches_hold_so_many_samples_in_order():
    samples = decode_groups(make_batch(3, groups=5, size=2), vocab_size=128)
    step = prepare_step(
        samples,
        Clock(Version(1, 5), {1: 0}),
        mask_above=None,
        reduction="per_sample",
        batching=Batching(1, micro_batch_size=4),
    )
    rows = [np.unique(batch.sample_rows).tolist() for batch in step.batches]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_finish_reason_survives_decoding():
    assert decode_one(completion_length=1).message.finish_reason == sample_pb2.FINISH_REASON_STOP
