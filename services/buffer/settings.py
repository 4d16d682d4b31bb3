"""The run's settings as the store takes them."""

from __future__ import annotations

from services.buffer.prompts import PromptSource
from services.buffer.records import RunParams
from services.common.config import Config

NEVER = 1 << 30
"""Groups that no filter comes to drop in one step."""


def run_params(config: Config, source: PromptSource | None) -> RunParams:
    """Times in milliseconds, defaults resolved."""
    batch, staleness = config.batch, config.staleness
    round_groups = batch.over_sampling_batch_size or batch.rollout_batch_size
    return RunParams(
        group_size=batch.n_samples_per_prompt,
        min_group_size=batch.min_group_size or batch.n_samples_per_prompt,
        batch_groups=batch.rollout_batch_size,
        surplus_groups=round_groups - batch.rollout_batch_size,
        max_staleness=staleness.max_staleness,
        on_stale=staleness.on_stale,
        drop_zero_variance=batch.dynamic_sampling_filter.startswith("nonzero_std"),
        judged=bool(batch.user_filter),
        zero_variance_fallback=batch.dynamic_sampling_filter == "nonzero_std_with_fallback",
        # Which groups would be kept after so many depends on which of them were judged first.
        refill_groups=NEVER if config.run.deterministic else batch.max_refill_rounds * round_groups,
        max_attempts=config.buffer.max_attempts,
        lease_ttl_ms=int(config.buffer.lease_ttl_s * 1000),
        dataset_digest=source.digest if source else "",
        seed=source.seed if source else 0,
        scored_whole=config.reward.group_rm,
        leases_from_clock=True,
    )
