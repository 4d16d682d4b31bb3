"""Instructions that a rule can check, in the manner of IFEval and IFBench: all of them, or nothing."""

from __future__ import annotations

from typing import Any

from services.reward.scorers.base import Item, SampleError, Verdict
from services.reward.scorers.instructions import CHECKS
from services.reward.scorers.instructions.arguments import Arguments
from services.reward.scorers.metadata import metadata_of


def score(item: Item) -> Verdict:
    """1 when the completion as it stands follows every instruction, else 0; part ``followed`` is the share of them.

    Read are metadata's "instruction_id_list" and "kwargs", an object for each, where null entries are as good as
    absent. A blank completion follows none. Raises SampleError naming what it cannot judge: an unknown instruction,
    an argument that is missing or of the wrong kind.
    """
    metadata = metadata_of(item)
    names = _names(metadata.get("instruction_id_list"))
    arguments = _arguments(metadata.get("kwargs"), len(names))
    followed = [
        CHECKS[name](item.completion, Arguments(name, given)) for name, given in zip(names, arguments, strict=True)
    ]
    if not item.completion.strip():
        followed = [False] * len(names)
    return Verdict(float(all(followed)), {"followed": sum(followed) / len(followed)})


def _names(given: Any) -> list[str]:
    if not isinstance(given, list) or not given:
        raise SampleError("metadata has no instruction_id_list")
    names = [str(name).strip() for name in given]
    if unknown := [name[:80] for name in names if name not in CHECKS]:
        raise SampleError(f"unknown instructions in metadata's instruction_id_list: {', '.join(unknown)}")
    return names


def _arguments(given: Any, count: int) -> list[dict[str, Any]]:
    """An object for each instruction. One alone is for all of them."""
    if given is None:
        return [{}] * count
    if isinstance(given, dict):
        return [given] * count
    if isinstance(given, list) and len(given) == count and all(isinstance(one, dict | None) for one in given):
        return [one or {} for one in given]
    raise SampleError(f"metadata's kwargs are no list of {count} objects, one for each instruction")
