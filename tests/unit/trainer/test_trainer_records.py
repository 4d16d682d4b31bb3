"""Snapshots for the wire, overlap, metrics, status."""

import orjson
import pytest
import torch

from polyhead.v1 import sample_pb2
from services.common.versions import Version
from services.trainer.backends.torch.results import StepResult
from services.trainer.batch.samples import decode_groups
from services.trainer.batch.staleness import Clock
from services.trainer.metrics import Times, batch_metrics, sample_line, step_line, training_metrics
from services.trainer.overlap import TrainIntervals
from services.trainer.records import JsonLines
from services.trainer.status import TrainerStatus
from services.trainer.weights.snapshot import Snapshot, build_manifest
from tests.kit.trainer_batch import make_batch, make_group, make_sample

CPU = torch.device("cpu")


def mixed_weights():
    return {
        "a": torch.randn(3, dtype=torch.bfloat16),
        "b": torch.randn(5, 2),
        "c": torch.randn(7),
        "d": torch.randn(400),
    }


@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
def test_buckets_are_the_concatenated_bytes_in_manifest_order(bucket_bytes):
    weights = mixed_weights()
    manifest = build_manifest(weights, bucket_bytes)
    snapshot = Snapshot(manifest, CPU)
    snapshot.fill(weights.items())
    names = [spec.name for bucket in manifest.buckets for spec in bucket.tensors]
    assert sorted(names) == sorted(weights)
    assert manifest.num_bytes == sum(w.numel() * w.element_size() for w in weights.values())
    for bucket, flat in zip(manifest.buckets, snapshot.buckets, strict=True):
        assert bucket.num_bytes <= bucket_bytes or len(bucket.tensors) == 1
        expected = b"".join(weights[spec.name].view(torch.uint8).numpy().tobytes() for spec in bucket.tensors)
        assert flat.numpy().tobytes() == expected
        for spec in bucket.tensors:
            assert (spec.dtype, list(spec.shape)) == (
                str(weights[spec.name].dtype).removeprefix("torch."),
                list(weights[spec.name].shape),
            )


def test_a_snapshot_does_not_follow_the_weights():
    weights = mixed_weights()
    snapshot = Snapshot(build_manifest(weights, 1 << 20), CPU)
    snapshot.fill(weights.items())
    before = snapshot.buckets[0].clone()
    weights["d"].zero_()
    assert torch.equal(snapshot.buckets[0], before)
    snapshot.fill(weights.items())
    assert not torch.equal(snapshot.buckets[0], before)


def test_the_layout_digest_tells_layouts_apart():
    weights = mixed_weights()
    digest = build_manifest(weights, 1 << 20).layout_digest
    assert digest == build_manifest({name: w + 1 for name, w in weights.items()}, 1 << 20).layout_digest
    assert digest != build_manifest({**weights, "d": torch.randn(20, 20)}, 1 << 20).layout_digest


def timed_sample(first, last, length):
    import numpy as np

    sample = make_sample(np.random.default_rng(0), sample_id="g0-0", prompt=[4], completion_length=length)
    sample.segments[0].first_token_unix_us, sample.segments[0].last_token_unix_us = first, last
    return decode_groups([make_group([sample], [1.0])], vocab_size=128)[0]


def test_overlap_counts_tokens_inside_training_intervals():
    intervals = TrainIntervals()
    assert intervals.overlap_tokens([timed_sample(0, 100, 11)]) == 0
    intervals.add(20, 40)
    intervals.add(60, 65)
    # Tokens at 0, 10, ..., 100: 20, 30, 40 and 60 are inside.
    assert intervals.overlap_tokens([timed_sample(0, 100, 11)]) == 4
    assert intervals.overlap_tokens([timed_sample(0, 30, 1), timed_sample(0, 50, 1)]) == 1
    assert intervals.overlap_tokens([]) == 0


def test_a_metrics_line_has_every_documented_key():
    groups = make_batch(0, groups=2, size=3)
    samples = decode_groups(groups, vocab_size=128)
    clock = Clock(Version(1, 2), {1: 0})
    results = [
        StepResult(loss=1.0, grad_norm=2.0, lr=3e-4, applied=True, tokens=4, entropy=2.0, ratio=4.0, micro_batches=2),
        StepResult(loss=float("nan"), grad_norm=float("nan"), lr=3e-4, tokens=4, entropy=float("nan")),
    ]
    batch = batch_metrics(groups, samples, clock, None)
    line = step_line(3, Version(1, 3), batch, training_metrics(results), 5, Times(step_s=0.5))
    parsed = orjson.loads(orjson.dumps(line))
    wanted = {
        *("step", "time", "epoch", "version", "reward_mean", "reward_std", "loss", "grad_norm", "entropy", "lr"),
        *("ratio_mean", "clip_fraction", "mismatch_kl", "mismatch_kl_fresh", "staleness", "staleness_max", "samples"),
        *(
            "groups",
            "groups_of_one",
            "group_ids",
            "prompt_ordinals",
            "completion_tokens",
            "prompt_tokens",
            "mean_completion_length",
            "completion_lengths",
            "truncated_fraction",
        ),
        *("multi_span_samples", "overlap_tokens", "wait_s", "train_s", "commit_s", "publish_wait_s", "step_s"),
        "micro_batches",
    }
    assert wanted <= parsed.keys()
    assert parsed["version"] == "e1.s3"
    assert (parsed["groups"], parsed["group_ids"]) == (2, ["g00000000", "g00000001"])
    assert len(parsed["prompt_ordinals"]) == 2
    assert parsed["staleness"] == {"2": 6}
    assert parsed["loss"] is None
    assert (parsed["entropy"], parsed["ratio_mean"], parsed["optimizer_steps_skipped"]) == (0.5, 1.0, 1)
    assert parsed["mismatch_kl_fresh"] is None
    assert parsed["reward_mean"] == pytest.approx(sum(s.reward for s in samples) / 6)


def test_an_empty_batch_has_metrics_too():
    line = {**batch_metrics([], [], Clock(Version(1, 0), {}), None), **training_metrics([])}
    assert line["samples"] == 0
    assert line["mismatch_kl"] == 0.0


def test_a_sample_line_shows_spans_as_the_wire_names_them():
    import numpy as np

    sample = make_sample(
        np.random.default_rng(0),
        sample_id="g0-0",
        prompt=[4],
        completion_length=4,
        versions=[Version(1, 1), Version(1, 3)],
    )
    (decoded,) = decode_groups([make_group([sample], [1.0])], vocab_size=128)
    line = sample_line(4, decoded, Clock(Version(1, 3), {1: 0}))
    assert line["spans"] == [["e1.s1", 0, 2], ["e1.s3", 2, 4]]
    assert (line["staleness"], line["finish_reason"], line["prompt"], line["label"]) == (2, "stop", "1+1=", "2")


def test_json_lines_are_appended(tmp_path):
    path = tmp_path / "a" / "m.jsonl"
    for value in (1.0, float("inf")):
        with JsonLines(path) as lines:
            lines.write({"value": value})
    assert [orjson.loads(line) for line in path.read_bytes().splitlines()] == [{"value": 1.0}, {"value": None}]


def test_status_separates_work_from_waiting():
    status = TrainerStatus()
    with status.waiting("waiting"):
        assert status.phase == "waiting"
    with status.busy("training"):
        assert status.busy_seconds > 0
        during = status.busy_seconds
    assert status.busy_seconds >= during
    status.report(Version(1, 4), {"loss": 0.5, "version": "e1.s4", "staleness": {}, "time": 1.0, "groups": 8})
    assert status.metrics == {"loss": 0.5, "groups": 8.0}


def test_rewards_are_reported_by_the_data_set_that_metadata_names():
    batch = make_batch(0, groups=3, size=2)
    for group, metadata, rewards in zip(
        batch,
        ['{"data_source": "b"}', '{"data_source": "a", "level": 3}', ""],
        [(1.0, 0.0), (0.25, 0.25), (9.0, 9.0)],
        strict=True,
    ):
        for leased, reward in zip(group.samples, rewards, strict=True):
            sample = sample_pb2.Sample.FromString(leased.sample)
            sample.prompt.metadata_json = metadata
            leased.sample = sample.SerializeToString()
            leased.score.reward = reward
    clock = Clock(Version(1, 0), {1: 0})
    metrics = batch_metrics(batch, decode_groups(batch, vocab_size=128), clock, None)
    assert metrics["reward_by_source"] == {"a": 0.25, "b": 0.5}
    bare = batch[2:]
    assert "reward_by_source" not in batch_metrics(bare, decode_groups(bare, vocab_size=128), clock, None)
