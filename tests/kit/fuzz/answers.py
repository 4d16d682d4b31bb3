"""Random completions, labels and metadata: pieces of what scorers look for, in any order, cut, repeated and nested."""

from __future__ import annotations

import json
import random
from typing import Any

from services.reward.scorers.base import Item
from services.reward.scorers.instructions import CHECKS
from tests.kit.hostile_answers import HOSTILE

_PIECES = (
    *(
        "42",
        "-3",
        "0.5",
        ".5",
        "1/2",
        "1,234",
        "1e5",
        "1e999",
        "50%",
        "50\\%",
        "٤٢",
        "４２",
        "½",
        "²",
        "∞",
        "nan",
        "inf",
    ),
    *(
        "x",
        "y",
        "n",
        "e",
        "i",
        "\\pi",
        "\\infty",
        "A",
        "B",
        "(C)",
        "yes",
        "no",
        "the",
        "answer",
        "option",
        "is correct",
    ),
    *(
        "+",
        "-",
        "*",
        "/",
        "=",
        "^",
        "_",
        "!",
        "<",
        "\\le",
        "\\cup",
        "\\in",
        ",",
        ";",
        ":",
        ".",
        "?",
        "|",
        "&",
        "\\\\",
        "%",
    ),
    *(
        "\\boxed{",
        "\\boxed",
        "\\fbox{",
        "\\frac",
        "\\dfrac{",
        "\\sqrt",
        "\\sqrt[3]{",
        "\\text{",
        "\\mathrm{",
        "\\binom{",
    ),
    *(
        "\\sum_{n=1}^{10}",
        "\\int_0^1",
        "\\lim_{x\\to 0}",
        "\\sin",
        "\\log_2",
        "\\left(",
        "\\right)",
        "\\{",
        "\\}",
        "\\begin{",
    ),
    *(
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "<<",
        ">>",
        "$",
        "$$",
        "\\(",
        "\\)",
        "\\[",
        "\\]",
        '"',
        "'",
        "```",
        "```python\n",
        "***",
    ),
    *(
        "</think>",
        "<think>",
        "###Response",
        "Answer:",
        "Answer: ",
        "P.S.",
        "Section 1",
        "* ",
        "- ",
        "\n",
        "\n\n",
        " ",
        "\t",
    ),
    *(
        "\x00",
        "\ud800",
        "\u202e",
        "\u0301",
        "\u00a0",
        "\\",
        "{,}",
        "cm",
        "^\\circ",
        "\\$",
        "{}{}",
        "{0}",
        "%s",
        "def f():",
        "print(42)",
    ),
)
_NAMES = tuple(CHECKS)
_ARGUMENTS = (
    *("keywords", "keyword", "frequency", "relation", "forbidden_words", "letter", "let_frequency", "let_relation"),
    *("num_sentences", "num_words", "num_paragraphs", "nth_paragraph", "first_word", "num_placeholders", "num_bullets"),
    *("postscript_marker", "num_highlights", "section_spliter", "num_sections", "prompt_to_repeat", "end_phrase", "N"),
    *("capital_frequency", "capital_relation", "min_words", "max_words", "small_n", "word", "options", "sep"),
)
_MAX_LENGTH = 1 << 20


class Answers:
    """Items from a generator of random numbers: the same generator gives the same items."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def item(self, name: str) -> Item:
        """For the scorer called `name`: most of the time one that it can read."""
        completion, label = self._text(), self._label(name)
        if self._rng.random() < 0.3:
            completion = f"{completion}</think>Answer: \\boxed{{{label if self._rng.random() < 0.5 else self._text()}}}"
        return Item(
            f"g{self._rng.randrange(1000)}", "?", "", completion, label, self._metadata(name), "completed", 0, 0, 0
        )

    def _text(self) -> str:
        if self._rng.random() < 0.04:
            text = self._rng.choice(list(HOSTILE.values()))
        else:
            text = "".join(self._rng.choices(_PIECES, k=int(self._rng.paretovariate(0.8)) % 200))
        if self._rng.random() < 0.1:
            opening, closing = self._rng.choice(
                (("\\frac{1}{", "}"), ("(", ")"), ("{", "}"), ("\\sqrt{", "}"), ("2^{", "}"))
            )
            depth = self._rng.randrange(12)
            text = opening * depth + text + closing * depth
        if self._rng.random() < 0.02:
            text *= self._rng.randrange(1, 2000)
        if self._rng.random() < 0.1:
            text = text[: self._rng.randrange(len(text) + 1)]
        return text[:_MAX_LENGTH]

    def _label(self, name: str) -> str:
        if self._rng.random() < 0.1:
            return self._text()
        if name.endswith("code"):
            tests: Any = (
                [{"input": "1", "output": "42\n"}] if self._rng.random() < 0.5 else ["assert f() == 42", "True"]
            )
            return json.dumps(tests)
        if name.endswith("dapo"):
            return "42"
        return self._rng.choice(
            ("42", "1/2", "\\frac{1}{2}", "C", "yes", "x^2+1", "\\{1,2\\}", "(1,2)", "50\\%", "the end")
        )

    def _metadata(self, name: str) -> str:
        if self._rng.random() < 0.05:
            return self._rng.choice(("", "{", "[]", "null", self._text()))
        metadata: dict[str, Any] = {}
        if name.endswith("ifbench"):
            names = self._rng.choices(_NAMES, k=self._rng.randrange(1, 4))
            metadata = {"instruction_id_list": names, "kwargs": [self._arguments() for _ in names]}
        elif name.endswith("gpqa") and self._rng.random() < 0.5:
            metadata = {"choices": [self._text()[:100] for _ in range(self._rng.randrange(6))], "correct_letter": "B"}
        if self._rng.random() < 0.05:
            metadata["rm_type"] = self._rng.choice(
                ("math", "f1", "boxed_gpqa", "", "os.system", 7, None, [], self._text())
            )
        return json.dumps(metadata)

    def _arguments(self) -> dict[str, Any]:
        return {name: self._argument(name) for name in _ARGUMENTS if self._rng.random() < 0.95}

    def _argument(self, name: str) -> Any:
        if self._rng.random() < 0.05:
            return self._rng.choice((None, -1, 1.5, "", [], {}, True, 10**30, float("inf"), self._text()))
        if name.endswith("relation"):
            return self._rng.choice(("at least", "less than"))
        if name in ("keywords", "forbidden_words"):
            return [self._rng.choice(_PIECES) for _ in range(2)]
        if name in (
            "keyword",
            "letter",
            "first_word",
            "postscript_marker",
            "section_spliter",
            "word",
            "options",
            "sep",
        ):
            return self._rng.choice((*_PIECES, "yes/no/maybe", "a), b), c)"))
        if name in ("prompt_to_repeat", "end_phrase"):
            return self._rng.choice(_PIECES)
        return self._rng.randrange(6)
