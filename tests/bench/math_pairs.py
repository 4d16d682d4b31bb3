"""The thousand pairs of completion and label that the math scorer is measured on: `python -m tests.bench.math_pairs`.

Writes `math_pairs.jsonl`: kind, label (each one once), completion, and the reward that follows from how it was made.
Half of the answers are wrong: of the label's form and another value. The right ones are of the label's value and often
of another form. A third of the completions has no box.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).with_name("math_pairs.jsonl")
SEED = 20260
COUNT = 1000


class Problem(NamedTuple):
    label: str
    right: list[str]
    """Answers equal to the label."""
    wrong: list[str]
    work: str
    """What the completion says before it comes to the answer."""


def integer(rng: random.Random) -> Problem:
    a, b, c = rng.randint(12, 99), rng.randint(12, 99), rng.randint(2, 400)
    n = a * b - c
    work = (
        f"First I multiply the number of rows by the number of seats in a row: ${a} \\times {b} = {a * b}$. "
        f"Of these, {c} seats are taken before the doors open, so they have to be subtracted from the total. "
        f"That is ${a * b} - {c} = {n}$, and as a check, ${n} + {c} = {a * b}$, as it has to be.\n\n"
        "No seat is counted twice, because every row has its own numbers, and the balcony was left out by the question."
    )
    right = [str(n), str(n), f"{n:,}", f"\\frac{{{3 * n}}}{{3}}", f"{n}.0", f"{n} \\text{{ seats}}"]
    swapped = str(n)[:-2] + str(n)[-1] + str(n)[-2]
    wrong = [str(n + 1), str(n - 10), str(-n), f"{n + 100:,}", f"{n}.5", f"\\frac{{{n}}}{{3}}", swapped]
    return Problem(str(n), right, [each for each in wrong if each.lstrip("0") != str(n)], work)


def fraction(rng: random.Random) -> Problem:
    value = Fraction(rng.randint(1, 60), rng.randint(3, 60)) * rng.choice([1, 1, 1, -1])
    while value.denominator < 3 or value.denominator == abs(value.numerator):
        value += Fraction(1, rng.randint(5, 40))
    p, q, k = value.numerator, value.denominator, rng.randint(2, 7)
    sign, size = "-" if p < 0 else "", abs(p)
    work = (
        f"Write the two probabilities with a common denominator. The slope of the line through the points is "
        f"$\\frac{{\\Delta y}}{{\\Delta x}}$, where $\\Delta y = {k * p}$ and $\\Delta x = {k * q}$.\n"
        f"\\[ m = \\frac{{{k * p}}}{{{k * q}}} \\]\n"
        f"Both are divisible by ${k}$. Since $\\gcd({size}, {q}) = 1$, nothing more can be cancelled after that, and "
        "the sign stays what it is. Substituting the point back into the equation confirms the intercept as well."
    )
    right = [
        f"{sign}\\frac{{{size}}}{{{q}}}",
        f"{sign}\\dfrac{{{k * size}}}{{{k * q}}}",
        f"{p}/{q}",
        f"\\frac{{{k * p}}}{{{k * q}}}",
        f"{sign}\\tfrac{{{size}}}{{{q}}}",
    ]
    wrong = [
        f"{sign}\\frac{{{q}}}{{{size}}}",
        f"{sign}\\frac{{{size + 1}}}{{{q}}}",
        f"{-p}/{q}",
        f"{sign}\\dfrac{{{k * size}}}{{{k * q + 1}}}",
        f"{float(value) + 0.01:.2f}",
    ]
    return Problem(f"{sign}\\frac{{{size}}}{{{q}}}", right, wrong, work)


def root(rng: random.Random) -> Problem:
    a, b = rng.randint(2, 60), rng.choice([2, 3, 5, 6, 7, 10, 11, 13, 14, 15, 17, 19, 21, 22, 23])
    work = (
        f"By the Pythagorean theorem the square of the diagonal is $d^2 = {a * a * b}$, so that $d = "
        f"\\sqrt{{{a * a * b}}}$. We look for the largest square that divides ${a * a * b}$: it is ${a}^2 = {a * a}$ "
        f"because ${b}$ has no square factor.\n\nA length is positive, so of the two solutions of the equation one "
        "remains. The numerical value agrees with the figure, in which the side is a little shorter than the diagonal."
    )
    right = [f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{a * a * b}}}", f"\\frac{{{2 * a}\\sqrt{{{b}}}}}{{2}}"]
    right.append(f"\\frac{{{a * b}}}{{\\sqrt{{{b}}}}}")
    wrong = [f"{a}\\sqrt{{{b + 1}}}", f"{a + 1}\\sqrt{{{b}}}", f"\\sqrt{{{a * a * b + 1}}}", f"-{a}\\sqrt{{{b}}}"]
    wrong += [f"\\frac{{{a}\\sqrt{{{b}}}}}{{2}}", f"{b}\\sqrt{{{a}}}" if a * a * b != b * b * a else f"{a}"]
    return Problem(f"{a}\\sqrt{{{b}}}", right, wrong, work)


def sum_with_root(rng: random.Random) -> Problem:
    a, b, c = rng.randint(1, 40), rng.randint(2, 9), rng.choice([2, 3, 5, 6, 7, 10, 11, 13])
    work = (
        f"The quadratic equation $x^2 - {2 * a}x + {a * a - b * b * c} = 0$ has the discriminant "
        f"$D = {4 * a * a} - 4 \\cdot ({a * a - b * b * c}) = {4 * b * b * c}$. Its root is $\\sqrt{{D}} = "
        f"{2 * b}\\sqrt{{{c}}}$, and half of everything gives the two solutions. The larger one is asked for, because "
        "the other one would make the side of the rectangle shorter than the strip that is cut off."
    )
    right = [f"{a}+{b}\\sqrt{{{c}}}", f"{b}\\sqrt{{{c}}} + {a}", f"{a} + \\sqrt{{{b * b * c}}}"]
    wrong = [f"{a}-{b}\\sqrt{{{c}}}", f"{a + 1}+{b}\\sqrt{{{c}}}", f"{a} + \\sqrt{{{b * b * c + 1}}}"]
    return Problem(f"{a}+{b}\\sqrt{{{c}}}", right, wrong, work)


def percentage(rng: random.Random) -> Problem:
    eighths = rng.randint(9, 790)
    value = Fraction(eighths, 8)
    text = f"{float(value):g}"
    fraction_of_one = value / 100
    work = (
        f"Let $N$ be the number of members at the beginning of the year. After the first change there are $1.2N$, and "
        f"after the second one ${float(1 + fraction_of_one):g}N$. The change is measured against the beginning, not "
        f"against the number in between, so the base is $N$ and cancels.\n\nA common mistake is to add the two "
        "percentages, which forgets that the second one is taken from a larger number than the first one was."
    )
    of_one = f"\\frac{{{fraction_of_one.numerator}}}{{{fraction_of_one.denominator}}}"
    right = [f"{text}\\%", f"{text}%", f"{float(fraction_of_one):g}", of_one]
    wrong = [f"{float(value + 1):g}\\%", f"{float(value / 10):g}\\%", f"{float(fraction_of_one / 10):g}"]
    wrong += [f"{float(100 - value):g}\\%" if value != 50 else "51\\%", f"{float(value + 2):g}%"]
    return Problem(f"{text}\\%", right, wrong, work)


def finite_set(rng: random.Random) -> Problem:
    elements = sorted(rng.sample(range(-30, 60), rng.randint(2, 4)))
    product = "".join(f"(x {'-' if e >= 0 else '+'} {abs(e)})" for e in elements)
    work = (
        f"The polynomial factors as $p(x) = {product}$, which can be checked by multiplying it out. A product "
        "is zero exactly when one of its factors is, so that each bracket gives one solution. None of them makes the "
        "denominator of the original equation vanish, so all of them are kept, and there are no others.\n\n"
        f"Their sum is ${sum(elements)}$, which agrees with Vieta's formula for the coefficient of the second term."
    )
    shuffled, changed = rng.sample(elements, len(elements)), [*elements[:-1], elements[-1] + 1]
    right = [_braces(elements), _braces(shuffled), _listed(shuffled)]
    wrong = [_braces(changed), _braces([-elements[0] or 99, *elements[1:]]), _listed(changed), _braces([*elements, 77])]
    if {-elements[0] or 99, *elements[1:]} == set(elements):
        wrong.pop(1)
    return Problem(_braces(elements), right, wrong, work)


def interval(rng: random.Random) -> Problem:
    left = rng.randint(-40, 40)
    right_end = left + rng.randint(2, 30)
    opening, closing = rng.choice("(["), rng.choice(")]")
    other = {"(": "[", "[": "("}[opening]
    work = (
        f"Both conditions have to hold at once. The first one says that $x$ is not below ${left}$, the second one that "
        f"it is not above ${right_end}$. The radicand is positive exactly between the two, and the logarithm in the "
        "denominator decides which of the ends belong to the domain.\n\nA number in the middle, put into the function, "
        f"shows that the sign is right: for $x = {left + 1}$ everything is defined."
    )
    right = [f"{opening}{left},{right_end}{closing}", f"\\left{opening}{left}, {right_end}\\right{closing}"]
    wrong = [f"{other}{left},{right_end}{closing}", f"{opening}{left - 1}, {right_end}{closing}"]
    wrong += [f"{opening}{left},{right_end + 1}{closing}", f"{opening}{left}, \\infty)"]
    return Problem(f"{opening}{left}, {right_end}{closing}", right, wrong, work)


def point(rng: random.Random) -> Problem:
    x, y, z = rng.randint(-30, 30), rng.randint(-30, 30), rng.randint(1, 20)
    work = (
        f"Subtracting the second equation from the first one leaves $2z = {2 * z}$, hence $z = {z}$. With that, the "
        f"third one becomes $x + y = {x + y}$, and the difference of the other two is $x - y = {x - y}$. Adding and "
        f"halving gives $x = {x}$, and the rest is $y = {y}$.\n\nPutting the three numbers into the original system "
        "makes every equation true, so that this is the only solution: the determinant is not zero."
    )
    right = [f"({x},{y},{z})", f"\\left({x}, {y}, {z}\\right)", f"(\\frac{{{3 * x}}}{{3}}, {y}, {z})"]
    wrong = [f"({x},{y},{z + 1})", f"({x + 1}, {y}, {z})", f"({z},{x},{y + 40})", f"\\left({x}, {y - 1}, {z}\\right)"]
    return Problem(f"({x}, {y}, {z})", right, wrong, work)


def _braces(elements: list[int]) -> str:
    return "\\{" + ", ".join(map(str, elements)) + "\\}"


def _listed(elements: list[int]) -> str:
    return ", ".join(map(str, elements))


KINDS: list[tuple[Callable[[random.Random], Problem], int]] = [
    (integer, 280),
    (fraction, 200),
    (root, 140),
    (sum_with_root, 40),
    (percentage, 140),
    (finite_set, 80),
    (interval, 60),
    (point, 60),
]
BOXED = [
    "Therefore the answer is $\\boxed{%s}$.",
    "So we get\n\\[ \\boxed{%s} \\]",
    "**Final Answer:** \\boxed{%s}",
    "Hence the result is \\boxed{%s}, as claimed.",
]
UNBOXED = [
    "Therefore the answer is $%s$.",
    "Putting this together, we find $%s$.",
    "Answer: $%s$",
    "The final answer is $%s$. I hope it is correct.",
    "Hence the result:\n\\[%s\\]",
]
OPENINGS = ["Let me work through this step by step.\n\n", "We proceed directly.\n", "", "**Solution.** ", "Okay. "]


def pairs() -> list[dict[str, str | float]]:
    """`kind`, `label`, `completion` and `reward` of each pair, the kinds mixed."""
    rng = random.Random(SEED)
    made: list[dict[str, str | float]] = []
    seen: set[str] = set()
    for kind, count in KINDS:
        for number in range(count):
            problem = kind(rng)
            while problem.label in seen:
                problem = kind(rng)
            seen.add(problem.label)
            answer = rng.choice(problem.wrong if number % 2 else problem.right)
            closing = rng.choice(UNBOXED if number % 6 in (0, 3) else BOXED) % answer
            completion = f"{rng.choice(OPENINGS)}{problem.work}\n\n{closing}"
            right = float(number % 2 == 0)
            made.append({"kind": kind.__name__, "label": problem.label, "completion": completion, "reward": right})
    rng.shuffle(made)
    return made


def load() -> list[dict[str, str | float]]:
    return [json.loads(line) for line in PATH.read_text().splitlines()]


if __name__ == "__main__":
    PATH.write_text("".join(json.dumps(pair) + "\n" for pair in pairs()))
