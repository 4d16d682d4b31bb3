"""What a computer algebra system is not given to read, and for how long it may work."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from types import FrameType

from services.reward.scorers.base import SampleError

MAX_CHARACTERS = 1000
"""The longest answer of MATH-500 has 159."""
_MAX_DEPTH = 10
_MAX_POWER = 100_000
_MAX_RANGE = 100
_TOWER = 10**9
_BRACKET = re.compile(r"[({\[]|[)}\]]")
_BRACKET_OR_POWER = re.compile(r"[({\[]|[)}\]]|(?:\^|\*\*)\s*")
_ALONE = re.compile(r"[-+]?(?:\d[\d.,]*|\w)?(?:\s*(?:\^|\*\*|!))?")
_DIGITS = re.compile(r"\d+")
# Of a large number, a factorial, or a power; or raised to a large power.
_GRAND_FACTORIAL = re.compile(
    r"\d{5}\s*!|!\s*[)}\]]*\s*!|\d\s*(?:\^|\*\*)[^!()]*[)}\]]\s*!|!\s*[)}\]]*\s*(?:\^|\*\*)\s*[{(]?\s*\d\d"
)
# A power or a factorial of numbers alone; with letters in it, it stays as it is written.
_LARGE_EXPONENT = re.compile(r"\d[)}]?\s*(?:\^|\*\*)\s*(?:[-+{(]*\d|\Z)|\d\s*!")
# What nothing large is made without. Most answers have none of it.
_GROWING = re.compile(r"[\^!]|\*\*|sum|prod|binom|choose|amma|factorial")
# The upper bound of a sum or product, and the numbers that something is chosen from.
_COUNTED = re.compile(r"\\(?:sum|prod)[^^]{0,60}\^\s*(?:\{\s*)?(\d+)")
_CHOSEN = re.compile(r"binom\s*\{[^{}]*\d{5}|binom\s*\{[^{}]*\}\s*\{[^{}]*\d{5}|\d{5}\s*\\choose|amma\s*\W{0,6}\d{5}")
_PROSE = re.compile(r"[^$\\]*")


def is_too_large(answer: str) -> bool:
    """Whether `answer` is longer than answers are, or explodes."""
    return len(answer) > MAX_CHARACTERS or explodes(answer)


def explodes(text: str, *, prose: bool = False) -> bool:
    """Whether reading `text` as mathematics may take more time or memory than an answer is worth.

    Towers of powers, factorials of factorials and the like make numbers of millions of digits in one step, which no
    clock can interrupt; deep brackets take a parser seconds each. In `prose`, exclamation marks outside LaTeX are none.
    """
    if sum(map(text.count, "({[")) > _MAX_DEPTH and _depth(text) > _MAX_DEPTH:
        return True
    return _GROWING.search(text) is not None and (
        _largest_power(text) > _MAX_POWER
        or (_GRAND_FACTORIAL.search(text) is not None and not (prose and _PROSE.fullmatch(text)))
        or any(_value(bound) > _MAX_RANGE for bound in _COUNTED.findall(text))
        or _CHOSEN.search(text) is not None
    )


def _depth(text: str) -> int:
    """Of brackets of any kind, matching or not."""
    depth = deepest = 0
    for bracket in _BRACKET.finditer(text):
        depth = max(0, depth + (1 if bracket[0] in "({[" else -1))
        deepest = max(deepest, depth)
    return deepest


def _largest_power(text: str) -> int:
    """The largest exponent, where those of brackets multiply what stands in them; that of a tower is without end."""
    largest = [1]
    """Within each of the brackets that are open."""
    closed = 1
    place = 0
    while token := _BRACKET_OR_POWER.search(text, place):
        place = token.end()
        if token[0] in ("(", "{", "["):
            largest.append(1)
        elif token[0] in (")", "}", "]"):
            closed = largest.pop() if len(largest) > 1 else 1
            largest[-1] = max(largest[-1], closed)
        else:
            exponent = _operand(text, place)
            if _LARGE_EXPONENT.search(exponent):
                return _TOWER
            place += len(exponent)
            of_brackets = text[: token.start()].rstrip()[-1:] in (")", "}", "]")
            size = prod(map(_value, _DIGITS.findall(exponent))) * (closed if of_brackets else 1)
            largest[-1] = max(largest[-1], size)
    return max(largest)


def _operand(text: str, start: int) -> str:
    """The exponent at `start`: a group with all it holds, or a word and what is joined to it by powers."""
    if text[start : start + 1] not in ("{", "("):
        alone = _ALONE.match(text, start)
        return alone[0] if alone else ""
    depth = 0
    for bracket in _BRACKET.finditer(text, start):
        depth += 1 if bracket[0] in "({[" else -1
        if not depth:
            return text[start : bracket.end()]
    return text[start:]


def _value(digits: str) -> int:
    """Of a run of digits, as far as it matters."""
    return int(digits) if len(digits) < 9 else _TOWER


class UndecidedError(SampleError):
    """It takes longer than a score may."""


class _TooLong(BaseException):
    """No Exception: what the library would catch as a failure of its own passes it by."""


@contextmanager
def processor_time(seconds: float) -> Iterator[None]:
    """Raises UndecidedError in what takes more than `seconds` of this process's own time, however busy the machine.

    Only between two steps of the interpreter; and only in the main thread, elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGVTALRM, _interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds / 10)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except _TooLong:
        raise UndecidedError(f"not decided within {seconds:g} s of processor time") from None
    finally:
        signal.signal(signal.SIGVTALRM, previous)


def _interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise _TooLong
