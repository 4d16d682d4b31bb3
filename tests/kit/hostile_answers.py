"""Texts that a scorer has to survive, whether they come as completion, as label or in metadata."""

from __future__ import annotations

MB = 1 << 20


def _nested(opening: str, inside: str, closing: str, depth: int) -> str:
    return opening * depth + inside + closing * depth


HOSTILE = {
    "empty": "",
    "blank": " \t\n\r\u00a0\u2028 ",
    "NUL": "\x00\x00\\boxed{4\x002}\x00",
    "lone surrogate": "\ud800\\boxed{\udfff}",
    "control": "".join(map(chr, range(1, 32))),
    "right to left": "\u202e\\boxed{24}\u202c",
    "combining": "\\boxed{4" + "\u0301" * 5000 + "2}",
    "unicode digits": "\\boxed{٤٢} ４２ ² ½ ⅷ Ⅻ 四十二",
    "percent": "\\boxed{50\\%} 50% 50\\% 50 percent %%% \\%",
    "units": "\\boxed{12\\text{ cm}^2} 12 \\mathrm{km/h} 5^\\circ \\$5",
    "a megabyte of a": "a" * MB,
    "a megabyte of digits": "9" * MB,
    "a megabyte in a box": "\\boxed{" + "7" * MB + "}",
    "a megabyte of spaces": "answer" + " " * MB + "C",
    "a megabyte of answers": "Answer: " * (MB // 8),
    "a megabyte of letters": "A " * (MB // 2),
    "a megabyte of stars": "*" * MB,
    "a megabyte of brackets": "[<<(" * (MB // 4),
    "a megabyte of points": "." * MB,
    "a megabyte of lines": "\n" * MB,
    "a megabyte of fences": "```\n" * (MB // 4),
    "a megabyte of thoughts": "</think>" * (MB // 8),
    "boxes in boxes": _nested("\\boxed{", "1", "}", 3000),
    "boxes left open": "\\boxed{" * 20_000,
    "boxes closed only": "}" * 20_000,
    "an escaped box": "\\boxed{\\}",
    "braces": "\\boxed{" + _nested("{", "1", "}", 3000) + "}",
    "brackets": "\\boxed{" + _nested("(", "1", ")", 60) + "}",
    "fractions": "\\boxed{" + _nested("\\frac{1}{", "1", "}", 300) + "}",
    "roots": "\\boxed{" + _nested("\\sqrt{", "2", "}", 100) + "}",
    "a tower": "\\boxed{9^{9^{9^{9}}}}",
    "a tower of brackets": "\\boxed{((9^{9999})^{9999})^{9999}}",
    "a tower in text": "So it is $9^{9^{9^{9}}}$",
    "a tower of stars": "\\boxed{9**9**9**9}",
    "a large power": "\\boxed{9^{99999999}}",
    "a factorial": "\\boxed{99999999!}",
    "factorials": "\\boxed{((9!)!)!}",
    "a binomial": "\\boxed{\\binom{99999999}{4999999}}",
    "a sum": "\\boxed{\\sum_{n=1}^{10^{9}} n^{n}}",
    "a product": "\\boxed{\\prod_{i=1}^{1000000} i}",
    "an exponent": "\\boxed{1e999999999}",
    "a polynomial": "\\boxed{(x+y+z)^{100}}",
    "a list": "\\boxed{" + ",".join(map(str, range(20_000))) + "}",
    "a matrix": "\\boxed{\\begin{pmatrix}" + "\\\\".join(["1&2&3"] * 500) + "\\end{pmatrix}}",
    "decimals": "\\boxed{0." + "1" * 100_000 + "}",
    "dollars": "$" * 100_000,
    "a division by zero": "\\boxed{\\frac{1}{0}}",
    "not a number": "\\boxed{\\text{NaN}} nan inf -inf",
    "braces that format": "\\boxed{{0}{answer}{!r}}",
    "code in words": "\\boxed{__import__('os').system('true')}",
    "JSON": '{"inputs": [' + "[" * 5000,
    "a fence": "```python\nprint(1)\n",
}
