"""A sample's metadata, as the scorers read it."""

from __future__ import annotations

from typing import Any

import orjson

from services.reward.scorers.base import Item, SampleError


def metadata_of(item: Item) -> dict[str, Any]:
    """The metadata of the item, empty when it has none. Raises SampleError when it is no JSON object."""
    if not item.metadata_json:
        return {}
    try:
        metadata = orjson.loads(item.metadata_json)
    except orjson.JSONDecodeError as error:
        raise SampleError(f"metadata is no JSON: {error}") from None
    if not isinstance(metadata, dict):
        raise SampleError(f"metadata is a {type(metadata).__name__}, not an object")
    return metadata


def rm_type_of(item: Item) -> Any:
    """What the metadata asks for as the item's scorer; None when it does not. Raises SampleError as `metadata_of`."""
    if '"rm_type"' not in item.metadata_json and "\\" not in item.metadata_json:
        return None
    return metadata_of(item).get("rm_type")


def after_thinking(completion: str) -> str:
    """What follows the last ``</think>``; all of it without one."""
    return completion.rpartition("</think>")[2]
