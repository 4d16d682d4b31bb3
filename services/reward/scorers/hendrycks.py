r"""Answers of the MATH data set (Hendrycks et al., 2021) in one form: ``\frac12``, ``1/2`` and ``0.5`` are one text."""

from __future__ import annotations

import re

_TEXT = re.compile(r"\\text\{(.+?)\}", re.DOTALL)
_DROPPED = re.compile(r"\n|\\!|\\left|\\right|\^\{?\\circ\}?|\\\$|\\%")
_FRACTION_OF_CHARACTERS = re.compile(r"\\frac([^{])([^{])")
_FRACTION_OF_CHARACTER = re.compile(r"\\frac([^{])(?=\{)")
_ROOT_OF_CHARACTER = re.compile(r"\\sqrt([^{\[])")
_QUOTIENT = re.compile(r"(-?\d+)/(-?\d+)")
_BARE_POINT = re.compile(r"(^|[ {])\.")
_MAX_NAME = 2


def normalized(answer: str) -> str:
    """The one form. Units behind the number, per cent signs and degrees are dropped, ``x =`` before it too."""
    text = answer.strip()
    if whole := _TEXT.fullmatch(text):
        text = whole[1].strip()
    text = text.replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    text = _DROPPED.sub("", text).split("\\text{ ", 1)[0]
    text = _BARE_POINT.sub(r"\g<1>0.", text)
    name, equals, value = text.partition("=")
    if equals and "=" not in value and len(name) <= _MAX_NAME:
        text = value
    text = text.replace(" ", "")
    text = _ROOT_OF_CHARACTER.sub(r"\\sqrt{\1}", text)
    text = _FRACTION_OF_CHARACTERS.sub(r"\\frac{\1}{\2}", text)
    text = _FRACTION_OF_CHARACTER.sub(r"\\frac{\1}", text)
    if text == "0.5":
        return "\\frac{1}{2}"
    quotient = _QUOTIENT.fullmatch(text)
    return f"\\frac{{{quotient[1]}}}{{{quotient[2]}}}" if quotient else text
