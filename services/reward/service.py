"""`RewardService`: scores for whoever asks, from the same station as the puller's."""

from __future__ import annotations

from typing import Any

from polyhead.v1 import reward_pb2, reward_pb2_grpc
from services.common.errors import InvalidArgumentError, LimitError
from services.reward.items import item_of_request, score_of
from services.reward.jobs import FailureKind, Result
from services.reward.station import Station
from services.reward.stats import Stats

FULL_NAME = reward_pb2.DESCRIPTOR.services_by_name["RewardService"].full_name


class RewardServicer(reward_pb2_grpc.RewardServiceServicer):
    """Answers each item with a score or with the reason why there is none.

    Where groups are scored as a whole, the items of a request are one.
    """

    def __init__(self, station: Station, stats: Stats, *, max_items: int) -> None:
        self._station = station
        self._stats = stats
        self._max_items = max_items

    async def Score(self, request: reward_pb2.ScoreRequest, context: Any) -> reward_pb2.ScoreResponse:  # noqa: N802 - gRPC names the method
        """Raises InvalidArgumentError for another scorer than this server's, LimitError for too many items."""
        if request.scorer not in ("", self._station.scorer):
            raise InvalidArgumentError(
                f"this server has {self._station.scorer!r}, not {request.scorer!r}", field="scorer"
            )
        if len(request.items) > self._max_items:
            raise LimitError(f"{len(request.items)} items, at most {self._max_items}", field="items")
        results = await self._station.score([item_of_request(item, place) for place, item in enumerate(request.items)])
        for result in results:
            self._stats.count(result)
        return reward_pb2.ScoreResponse(
            results=[
                _to_proto(item.sample_id, result, self._station.scorer)
                for item, result in zip(request.items, results, strict=True)
            ]
        )


def _to_proto(sample_id: str, result: Result, scorer: str) -> reward_pb2.ScoreResult:
    if result.verdict is not None:
        score = score_of(result.verdict, result, scorer)
        return reward_pb2.ScoreResult(sample_id=sample_id, score=score)
    unavailable = result.failure is FailureKind.UNAVAILABLE
    kind = reward_pb2.SCORE_ERROR_KIND_UNAVAILABLE if unavailable else reward_pb2.SCORE_ERROR_KIND_FAILED
    error = reward_pb2.ScoreError(kind=kind, message=result.reason)
    return reward_pb2.ScoreResult(sample_id=sample_id, error=error)
