"""What becomes of leased samples: scores and verdicts go to the outbox, or the samples go back with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import structlog

from polyhead.v1 import buffer_pb2 as pb
from services.reward.items import score_of
from services.reward.jobs import FailureKind, Result, each_of
from services.reward.outbox import Outbox
from services.reward.scorers.base import SampleError, check_spans
from services.reward.stats import Stats

log = structlog.get_logger()


class Settler:
    """`scorer` is written into scores; `is_held` says whether a lease is still this replica's."""

    def __init__(self, outbox: Outbox, stats: Stats, *, scorer: str, is_held: Callable[[int], bool]) -> None:
        self._outbox = outbox
        self._stats = stats
        self._scorer = scorer
        self._is_held = is_held

    def on_judged(self, group: pb.LeasedGroup, result: Result) -> None:
        self._stats.count_judged(result)
        if result.failure is FailureKind.UNAVAILABLE:
            self.give_back_group(group, result.reason)
        elif result.judgement is None:
            # A filter only chooses: without its word nothing speaks against the group.
            log.warning("filter_failed", group_id=group.group_id, why=result.failure, reason=result.reason)
            self.settle_group(group, pb.GROUP_VERDICT_FILTER_FAILED)
        elif result.judgement.keep:
            self.settle_group(group, pb.GROUP_VERDICT_KEEP)
        elif result.judgement.keep_when_insufficient:
            self.settle_group(group, pb.GROUP_VERDICT_KEEP_IF_INSUFFICIENT, result.judgement.reason)
        else:
            self.settle_group(group, pb.GROUP_VERDICT_DROP, result.judgement.reason)

    def settle_group(self, group: pb.LeasedGroup, verdict: pb.GroupVerdict, reason: str = "") -> None:
        for leased in group.samples:
            self._outbox.complete(
                pb.CompletedSample(
                    sample_id=leased.sample_id, lease_id=leased.lease_id, verdict=verdict, verdict_reason=reason
                )
            )

    def give_back_group(self, group: pb.LeasedGroup, reason: str) -> None:
        for leased in group.samples:
            self.give_back(leased.sample_id, leased.lease_id, pb.RELEASE_REASON_UNAVAILABLE, reason)

    def on_result(self, leased: pb.LeasedSample, result: Result) -> None:
        self._settle([(leased, result)])

    def on_whole(self, members: Sequence[pb.LeasedSample], result: Result) -> None:
        """Each leased sample gets its own score; siblings that were scored before keep theirs."""
        results = each_of(result, len(members))
        self._settle([pair for pair in zip(members, results, strict=True) if self._is_held(pair[0].lease_id)])

    def _settle(self, scored: Iterable[tuple[pb.LeasedSample, Result]]) -> None:
        """Sends the scores of samples that belong together, and gives back those that have none."""
        completed: list[pb.CompletedSample] = []
        for leased, scored_as in scored:
            result = _checked(scored_as, leased)
            self._stats.count(result)
            if result.verdict is not None:
                score = score_of(result.verdict, result, self._scorer)
                completed.append(pb.CompletedSample(sample_id=leased.sample_id, lease_id=leased.lease_id, score=score))
            elif result.failure is FailureKind.UNAVAILABLE:
                self.give_back(leased.sample_id, leased.lease_id, pb.RELEASE_REASON_UNAVAILABLE, result.reason)
            else:
                log.warning("sample_not_scored", sample_id=leased.sample_id, attempt=leased.attempt, why=result.failure)
                self.give_back(leased.sample_id, leased.lease_id, pb.RELEASE_REASON_SAMPLE_ERROR, result.reason)
        if completed:
            self._outbox.complete(*completed)

    def give_back(self, sample_id: str, lease_id: int, reason: pb.ReleaseReason, error: str) -> None:
        self._outbox.release(pb.ReleasedSample(sample_id=sample_id, lease_id=lease_id, reason=reason, error=error))


def _checked(result: Result, leased: pb.LeasedSample) -> Result:
    """The result, or a failure where rewards are given to spans that the completion does not have."""
    if result.verdict is None:
        return result
    try:
        check_spans(result.verdict, leased.record.completion_tokens)
    except SampleError as error:
        return Result(None, result.seconds, FailureKind.RAISED, str(error))
    return result
