"""What a client of the buffer was acknowledged, and what a replica took over, one line each.

Each process has a file of its own, which survives its SIGKILL.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import orjson
import xxhash

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import rollout_pb2 as rpb
from polyhead.v1 import sample_pb2
from services.common.splice import Spliced

# A repeated call that had been carried out is as good as the first.
_DONE = (pb.OUTCOME_OK, pb.OUTCOME_DUPLICATE)


class Witness:
    """Of one process. The page cache keeps what it has written."""

    def __init__(self, directory: Path, role: str) -> None:
        path = directory / f"{role}-{os.getpid()}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._batch: dict[str, int] = {}
        self._fetched: dict[str, list[Any]] = {}
        """Of the batch: digest and reward by sample."""

    def acknowledged(self, verb: str, request: Any, *rest: Any) -> None:
        """`rest` ends with the answer."""
        if isinstance(request, Spliced):
            request = pb.CompleteRequest.FromString(request.serialized())
        if (note := getattr(self, f"_{verb.lower()}", None)) is not None:
            for line in note(request, rest[-1]):
                self._write(line)

    def pushed(self, request: rpb.CommitUpdateRequest, _: object) -> None:
        """A replica has taken over a version."""
        self._write({"kind": "pushed", "epoch": request.epoch, "step": request.version.step})

    def _write(self, line: dict[str, Any]) -> None:
        os.write(self._file, orjson.dumps(line) + b"\n")

    def _extend(self, request: pb.ExtendRequest, answer: pb.ExtendResponse) -> list[dict[str, Any]]:
        return [
            {
                "kind": "saved",
                "id": each.sample_id,
                "lease": each.lease_id,
                "from": each.delta.from_token,
                "tokens": each.delta.token_ids.hex(),
            }
            for each, result in zip(request.samples, answer.results, strict=True)
            if each.HasField("delta") and result.outcome in _DONE
        ]

    def _complete(self, request: pb.CompleteRequest, answer: pb.CompleteResponse) -> list[dict[str, Any]]:
        lines = []
        for each, result in zip(request.samples, answer.results, strict=True):
            if result.outcome not in _DONE or each.verdict:  # a verdict is on a group, and settled by any sample
                continue
            line = {"id": each.sample_id, "lease": each.lease_id, "outcome": pb.Outcome.Name(result.outcome)}
            if request.stage == sample_pb2.STAGE_SCORE:
                lines.append({**line, "kind": "scored", "reward": each.score.reward})
                continue
            segment = sample_pb2.Sample.FromString(each.sample).segments[0]
            tokens = segment.token_ids[4 * segment.prompt_length :].hex()
            lines.append({**line, "kind": "generated", "tokens": tokens, "digest": _digest(each.sample)})
        return lines

    def _lease(self, request: pb.LeaseRequest, answer: pb.LeaseResponse) -> list[dict[str, Any]]:
        if request.stage == sample_pb2.STAGE_TRAIN and answer.groups:
            self._batch = {"epoch": request.epoch, "step": request.step}
            samples = [each for group in answer.groups for each in group.samples]
            self._fetched = {each.sample_id: ["", each.record.reward] for each in samples}
        return []

    def _fetch(self, request: pb.FetchRequest, answer: pb.FetchResponse) -> list[dict[str, Any]]:
        """A batch is leased when its last sample is there."""
        ours = [each for each in answer.samples if each.sample_id in self._fetched]
        for each in ours:
            self._fetched[each.sample_id][0] = _digest(each.sample)
        whole = ours and all(digest for digest, _ in self._fetched.values())
        return [{"kind": "leased", **self._batch, "samples": self._fetched}] if whole else []

    def _commitstep(self, request: pb.CommitStepRequest, answer: pb.CommitStepResponse) -> list[dict[str, Any]]:
        return [{"kind": "committed", "epoch": request.epoch, "step": request.step, "ids": sorted(self._fetched)}]

    def _recover(self, request: pb.RecoverRequest, answer: pb.RecoverResponse) -> list[dict[str, Any]]:
        return [{"kind": "recovered", "epoch": request.epoch, "step": request.step}]

    def _confirmcheckpoint(
        self, request: pb.ConfirmCheckpointRequest, answer: pb.ConfirmCheckpointResponse
    ) -> list[dict[str, Any]]:
        return [{"kind": "confirmed", "epoch": request.epoch, "step": request.oldest_kept_step}]


def _digest(payload: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(payload)


def read(directory: Path) -> list[dict[str, Any]]:
    """All complete lines of all witnesses, each saying by whom; those of one process in the order they were written."""
    lines = []
    for path in sorted(directory.glob("*.jsonl")):
        text = path.read_bytes()
        written = (orjson.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines())
        lines += [{**line, "by": path.stem} for line in written]
    return lines
