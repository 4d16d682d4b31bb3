"""The arguments of one instruction, as the data gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.reward.scorers.base import SampleError


class Arguments:
    """Reads the entries of one object of metadata's "kwargs". Each method raises SampleError naming its entry.

    What the data leaves out is an error and not drawn by lot: the prompt has said some number.
    """

    def __init__(self, instruction: str, given: Mapping[str, Any]) -> None:
        self._instruction = instruction
        self._given = given

    def number(self, name: str) -> int:
        """A whole number, 0 or more. Data sets have them as floats, too."""
        value = self._value(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 0:
            raise self._error(name, "is no whole number of 0 or more")
        return int(value)

    def text(self, name: str) -> str:
        """A text that is not blank, without the white space around it."""
        value = self._value(name)
        if not isinstance(value, str) or not value.strip():
            raise self._error(name, "is no text")
        return value.strip()

    def texts(self, name: str) -> list[str]:
        """One text or more."""
        value = self._value(name)
        if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
            raise self._error(name, "is no list of texts")
        return value

    def holds(self, count: int, relation: str, threshold: str) -> bool:
        """Whether `count` is "at least" or "less than" a number, both by the names of their entries."""
        word, number = self.text(relation), self.number(threshold)
        if word == "at least":
            return count >= number
        if word == "less than":
            return count < number
        raise self._error(relation, 'is neither "at least" nor "less than"')

    def _value(self, name: str) -> Any:
        value = self._given.get(name)
        if value is None:
            raise self._error(name, "is missing")
        return value

    def _error(self, name: str, what: str) -> SampleError:
        return SampleError(f"metadata's kwargs: {name} of {self._instruction} {what}")
