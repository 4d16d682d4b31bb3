"""Which request was served by which weights, as lines of the log."""

from __future__ import annotations

from typing import Any

import structlog

from services.rollout.engines.torch_engine.sequence import Sequence

log = structlog.get_logger()


class RequestLog:
    """One line when a request gets its slot, one when it ends. On the engine's thread."""

    def __init__(self) -> None:
        self._running: set[str] = set()

    def started(self, sequence: Sequence, weight_version: str) -> None:
        """A retracted request that gets a slot again has started already."""
        if sequence.rid not in self._running:
            self._running.add(sequence.rid)
            log.info("request_started", rid=sequence.rid, weight_version=weight_version, prompt=len(sequence.prompt))

    def ended(
        self,
        sequence: Sequence,
        weight_version: str,
        tokens: int,
        spans: list[dict[str, Any]],
        reason: dict[str, Any],
    ) -> None:
        self._running.discard(sequence.rid)
        log.info(
            "request_ended",
            rid=sequence.rid,
            weight_version=weight_version,
            tokens=tokens,
            weight_versions=spans,
            reason=reason["type"],
        )
