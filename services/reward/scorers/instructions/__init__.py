"""Instructions whose following can be checked by rule: what each is called, and its check."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from services.reward.scorers.instructions.arguments import Arguments
from services.reward.scorers.instructions.ifbench import CHECKS as IFBENCH
from services.reward.scorers.instructions.ifeval import CHECKS as IFEVAL

Check = Callable[[str, Arguments], bool]

CHECKS: Mapping[str, Check] = {**IFEVAL, **IFBENCH}
"""By instruction id. A check gets a response that is not blank; it raises SampleError for its arguments only."""
