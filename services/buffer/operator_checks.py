"""The operators' requests as records: every field is checked before the store sees it, and named when it is wrong."""

from __future__ import annotations

from collections.abc import Iterator

from polyhead.v1 import buffer_pb2 as pb
from polyhead.v1 import sample_pb2
from services.buffer import validation
from services.buffer.field_checks import MAX_NUMBER, check_name, prompt_bytes
from services.buffer.records import ImportedGroup, ImportedSample
from services.common.blobs import Blobs
from services.common.config.models import LimitsConfig
from services.common.errors import InvalidArgumentError, LimitError

# Of the others only the counts are kept.
_LISTED = frozenset(sample_pb2.SampleState.values()) - {
    sample_pb2.SAMPLE_STATE_UNSPECIFIED,
    sample_pb2.SAMPLE_STATE_RETIRED,
    sample_pb2.SAMPLE_STATE_DROPPED,
}


def page(request: pb.ListSamplesRequest, limits: LimitsConfig) -> int:
    """The place the page starts at."""
    if request.state not in _LISTED:
        raise InvalidArgumentError("must be a state whose samples are kept: not RETIRED, not DROPPED", field="state")
    if not 0 < request.limit <= limits.samples_per_rpc:
        raise InvalidArgumentError(f"is {request.limit}, not 1 to {limits.samples_per_rpc}", field="limit")
    token = request.page_token
    if not token:
        return 0
    if len(token) > 16 or not token.isascii() or not token.isdigit() or not 0 < int(token) < MAX_NUMBER:
        raise InvalidArgumentError("is not the next_page_token of a page", field="page_token")
    return int(token)


def imported(
    request: pb.ImportRequest, limits: LimitsConfig, group_size: int, blobs: Blobs | None
) -> list[ImportedGroup]:
    """Groups of exactly `group_size` samples. Checks each sample as a completion is checked."""
    check_name(request.request_id, "request_id")
    if not request.groups:
        raise InvalidArgumentError("at least one is needed", field="groups")
    count = len(request.groups) * group_size
    if count > limits.samples_per_rpc:
        raise LimitError(f"{count} samples in one call, at most {limits.samples_per_rpc}", field="groups")
    found = []
    for number, group in enumerate(request.groups):
        field = f"groups[{number}]"
        if len(group.samples) != group_size:
            raise InvalidArgumentError(
                f"{len(group.samples)}, but a group of this run has {group_size}", field=f"{field}.samples"
            )
        prompt = prompt_bytes(group.prompt, limits, f"{field}.prompt")
        found.append(ImportedGroup(prompt, list(_samples(group, limits, blobs, field))))
    return found


def _samples(
    group: pb.SampleGroup, limits: LimitsConfig, blobs: Blobs | None, group_field: str
) -> Iterator[ImportedSample]:
    for index, each in enumerate(group.samples):
        field = f"{group_field}.samples[{index}]"
        sample = sample_pb2.Sample()
        sample.CopyFrom(each.sample)
        # The store gives it ids of its own.
        sample.ClearField("sample_id")
        sample.ClearField("group_id")
        sample.index = index
        data = sample.SerializeToString()
        facts = validation.sample_facts(validation.parsed(data, limits, field))
        reward, score = None, b""
        if each.HasField("score"):
            reward, score = each.score.reward, validation.score_bytes(each.score, limits, f"{field}.score")
        yield ImportedSample(*facts, data, reward, score, validation.check_blobs(sample, blobs, field))
