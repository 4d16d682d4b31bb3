"""The rows of the crash matrix that a campaign strikes, by the points at which it does (docs/chaos.md)."""

from __future__ import annotations

from collections.abc import Mapping

from tests.kit.faults import clocks, links, points


def _both(*stems: str) -> tuple[str, ...]:
    return tuple(f"{stem}.{when}" for stem in stems for when in ("before", "after"))


# Each row by its stages: one is hit when any of its points was.
ROWS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "1-4 rollout killed": {
        "mid-generation": _both("rollout.Extend"),
        "generated, not delivered": ("rollout.Complete.before",),
        "delivered, answer not read": ("rollout.Complete.after",),
        "leased": ("rollout.Lease.after",),
    },
    "5 reward killed": {
        "scoring": ("reward.Lease.after", *_both("reward.Fetch")),
        "scored, not delivered": ("reward.Complete.before",),
        "delivered, answer not read": ("reward.Complete.after",),
    },
    "7-9 buffer killed": {
        "during put": _both("buffer.complete_generate", "buffer.complete_score", "buffer.extend"),
        "during lease": _both("buffer.lease_generate", "buffer.lease_score", "buffer.lease_train"),
        "during commit": _both("buffer.commit_step"),
    },
    "10-13 trainer killed": {
        "after lease": ("trainer.Lease.after", *_both("trainer.Fetch")),
        "after backward": ("trainer.gradient_clip.before",),
        "after optimizer, before commit": ("trainer.optimizer_step.after", "trainer.CommitStep.before"),
        "after commit, before checkpoint": ("trainer.CommitStep.after", "trainer.checkpoint_tensors.before"),
    },
    "14 trainer killed during a checkpoint write": {
        "tensors": ("trainer.checkpoint_tensors.after",),
        "manifest": ("trainer.checkpoint_files.after",),
        "on disk, not renamed": _both("trainer.checkpoint_fsync"),
        "renamed": ("trainer.checkpoint_rename.after",),
        "verified, not confirmed": ("trainer.checkpoint_verified.after", "trainer.ConfirmCheckpoint.before"),
        "confirmed": ("trainer.ConfirmCheckpoint.after",),
    },
    "15 store killed, fsync always": {
        "during put": tuple(f"store@{each}" for each in _both("buffer.complete_generate", "buffer.extend")),
        "during lease": tuple(f"store@{each}" for each in _both("buffer.lease_generate", "buffer.lease_train")),
        "during commit": tuple(f"store@{each}" for each in _both("buffer.commit_step")),
        "during recovery": tuple(f"store@{each}" for each in _both("buffer.acquire_epoch", "buffer.recover")),
    },
    "19 disk full": {"the store's, in the middle of a command": ("store.full",)},
    "20-23 partitions": {link: tuple(f"{link}.{fault}" for fault in links.CUTS) for link in links.LINKS},
    "24 bad networks": {
        fault: tuple(f"{link}.{fault}" for link in links.LINKS) for fault in links.FAULTS if fault not in links.CUTS
    },
    "25 two trainers": {"the first froze, the second took over": ("rivals",)},
    "31-33 weight push": {
        "sender killed mid-bucket": _both("trainer.push_bucket"),
        "replica killed between begin and commit": ("rollout.push_begin.after", *_both("rollout.push_load")),
        "engine killed mid-load": ("engine.push_receive.after", *_both("engine.push_load")),
        "engine killed while paused": ("engine.pause.after",),
    },
    "35 clocks": {role: (f"clock.{role}.ahead", f"clock.{role}.behind") for role in clocks.ROLES},
    "36 SIGTERM": {role: (f"stop.{role}",) for role in ("store", "buffer", "rollout", "reward", "engine")},
}


def hits(counts: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """How often each stage of each row was hit. `counts` are by point."""
    return {
        row: {stage: sum(counts.get(point, 0) for point in at) for stage, at in stages.items()}
        for row, stages in ROWS.items()
    }


def points_of(victim: str) -> list[str]:
    """Names under which strikes at points are counted; the store is killed at those of the buffer."""
    if victim == "store":
        return [f"store@{name}" for name in points.names("buffer")]
    if victim == "link":
        return [f"{link}.{fault}" for link in links.LINKS for fault in links.FAULTS]
    if victim == "clock":
        return [f"clock.{role}.{way}" for role in clocks.ROLES for way in ("ahead", "behind")]
    return points.names(victim)
