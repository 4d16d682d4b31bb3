"""The program in a completion, and the tests in a sample's data."""

from __future__ import annotations

from typing import Any, NamedTuple

import orjson

from services.reward.scorers.base import Item, SampleError
from services.reward.scorers.metadata import after_thinking, metadata_of

_FENCE = "```"
_LANGUAGES = frozenset({"", "python", "py", "python3"})
_MAX_TESTS = 1000


class Case(NamedTuple):
    """What the program reads, and what it has to write."""

    text: str
    output: str


class Tests(NamedTuple):
    """One of the two is empty."""

    asserts: list[str]
    """Texts of Python, each run after the program in its namespace."""
    cases: list[Case]


def program_of(completion: str) -> str:
    """The last fenced block of Python behind the thinking, to the end when it is not closed; all of it without one."""
    text = after_thinking(completion)
    last: list[str] | None = None
    block: list[str] | None = None
    for line in text.split("\n"):
        if not line.lstrip().startswith(_FENCE):
            if block is not None:
                block.append(line)
        elif block is None:
            language = line.strip().removeprefix(_FENCE).strip().lower()
            block = []
            last = block if language in _LANGUAGES else last
        else:
            block = None
    return text if last is None else "\n".join(last)


def tests_of(item: Item) -> Tests:
    """The tests in metadata's "tests", else in the label. Raises SampleError when they are none that we know.

    A text of Python, a list of such texts, a list of ``{"input", "output"}``, ``{"inputs": […], "outputs": […]}``;
    or JSON of one of these.
    """
    given = metadata_of(item).get("tests")
    where = "label" if given is None else "metadata's tests"
    tests = _read(_unpacked(item.label if given is None else given), where)
    if not 0 < len(tests.asserts) + len(tests.cases) <= _MAX_TESTS:
        raise SampleError(f"{where}: there are no tests, or more than {_MAX_TESTS}")
    return tests


def _unpacked(given: Any) -> Any:
    """A text that is JSON of an object or a list is taken for that."""
    if isinstance(given, str) and given.lstrip()[:1] in ("{", "["):
        try:
            return orjson.loads(given)
        except orjson.JSONDecodeError:
            pass
    return given


def _read(given: Any, where: str) -> Tests:
    if isinstance(given, str):
        return Tests([given] if given.strip() else [], [])
    if isinstance(given, dict) and given.get("fn_name"):
        raise SampleError(f"{where}: tests that call fn_name are not supported; write them as asserts")
    if isinstance(given, dict):
        inputs, outputs = given.get("inputs"), given.get("outputs")
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise SampleError(f"{where}: inputs and outputs are no lists of one length")
        return Tests([], [Case(_text(one, where), _text(two, where)) for one, two in zip(inputs, outputs, strict=True)])
    if isinstance(given, list) and all(isinstance(one, str) for one in given):
        return Tests(given, [])
    if isinstance(given, list) and all(isinstance(one, dict) for one in given):
        return Tests([], [Case(_text(one.get("input"), where), _text(one.get("output"), where)) for one in given])
    raise SampleError(f"{where}: neither Python, nor a list of asserts, nor inputs with outputs")


def _text(given: Any, where: str) -> str:
    """Some data sets have lists of lines."""
    if isinstance(given, list) and all(isinstance(line, str) for line in given):
        return "\n".join(given)
    if not isinstance(given, str):
        raise SampleError(f"{where}: an input or output is a {type(given).__name__}, not a text")
    return given
