"""Instructions of IFBench (Pyatkin et al., 2025): those that need no model, dictionary or emoji table.

Their checks count as IFBench's published code does, with sentences found by rules (`sentences`).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

from services.reward.scorers.instructions.arguments import Arguments
from services.reward.scorers.instructions.sentences import count_words, sentences, words

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_EDGES = string.punctuation + " "
_CONJUNCTIONS = frozenset({"and", "but", "for", "nor", "or", "so", "yet"})
_MARKS = frozenset(".,!?;:")
_CONSONANTS = re.compile(r"[b-df-hj-np-tv-z]{2}")
_PRIMES = frozenset({2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97})
_CLOSES = {")": "(", "]": "[", "}": "{"}
_LETTERED = re.compile(r"\W*a\W*b\W*c\W*", re.IGNORECASE)
_BRACKET_LEVELS, _QUOTE_LEVELS, _VOWELS = 5, 3, 3
_PALINDROMES, _PALINDROME_LENGTH = 10, 5


def _word_count_range(response: str, given: Arguments) -> bool:
    return given.number("min_words") <= count_words(response) <= given.number("max_words")


def _unique_word_count(response: str, given: Arguments) -> bool:
    return len({word.strip(_EDGES) for word in response.lower().split()}) >= given.number("N")


def _numbers(response: str, given: Arguments) -> bool:
    return len(re.findall(r"\d+", response.translate(_PUNCTUATION))) == given.number("N")


def _conjunctions(response: str, given: Arguments) -> bool:
    used = {word.strip(_EDGES).lower() for word in response.split()}
    return len(used & _CONJUNCTIONS) >= given.number("small_n")


def _punctuation(response: str, _: Arguments) -> bool:
    """Every mark, and an interrobang that is none of them."""
    if not any(mark in response for mark in ("?!", "!?", "‽")):
        return False
    rest = response.replace("?!", "", 1) if "?!" in response else response.replace("!?", "", 1)
    return set(rest) >= _MARKS


def _alphabet(response: str, _: Arguments) -> bool:
    initials = [word[0] for word in words(response)]
    if not initials or initials[0] not in string.ascii_lowercase:
        return False
    first = string.ascii_lowercase.index(initials[0])
    return all(initial == string.ascii_lowercase[(first + place) % 26] for place, initial in enumerate(initials))


def _vowel(response: str, _: Arguments) -> bool:
    text = response.strip().lower()
    return "\n" not in text and len(set(text) & set("aeiou")) <= _VOWELS


def _consonants(response: str, _: Arguments) -> bool:
    return all(_CONSONANTS.search(word) for word in response.lower().split())


def _palindrome(response: str, _: Arguments) -> bool:
    found = [word for word in words(response) if len(word) >= _PALINDROME_LENGTH and word == word[::-1]]
    return len(found) >= _PALINDROMES


def _prime_lengths(response: str, _: Arguments) -> bool:
    return all(len(word) in _PRIMES for word in words(response))


def _repeats(response: str, given: Arguments) -> bool:
    limit = given.number("small_n")
    return all(count <= limit for count in Counter(words(response)).values())


def _no_consecutive(response: str, _: Arguments) -> bool:
    initials = [word[0] for word in words(response)]
    return all(one != other for one, other in pairwise(initials))


def _last_first(response: str, _: Arguments) -> bool:
    said = [words(sentence) for sentence in sentences(response)]
    return all(one and other and one[-1] == other[0] for one, other in pairwise(said))


def _paragraph_last_first(response: str, _: Arguments) -> bool:
    paragraphs = [line.lower().strip().strip(_EDGES).split() for line in response.split("\n")]
    return all(said[0] == said[-1] for said in paragraphs if said)


def _sentence_keyword(response: str, given: Arguments) -> bool:
    said, place = sentences(response), given.number("N")
    keyword = re.compile(rf"\b{re.escape(given.text('word'))}\b", re.IGNORECASE)
    return 1 <= place <= len(said) and keyword.search(said[place - 1]) is not None


def _sentence_increment(response: str, given: Arguments) -> bool:
    counts, more = [len(words(sentence)) for sentence in sentences(response)], given.number("small_n")
    return all(other == one + more for one, other in pairwise(counts))


def _ends(response: str) -> Counter[str]:
    return Counter(sentence.rstrip("\"'”’)]*_")[-1:] for sentence in sentences(response))


def _sentence_type(response: str, _: Arguments) -> bool:
    ends = _ends(response)
    return ends["."] == 2 * ends["?"]


def _sentence_balance(response: str, _: Arguments) -> bool:
    ends = _ends(response)
    return ends["."] == ends["?"] == ends["!"]


def _parentheses(response: str, _: Arguments) -> bool:
    opened: list[str] = []
    for character in response:
        if character in "([{":
            opened.append(character)
        elif character in _CLOSES:
            if not opened or opened[-1] != _CLOSES[character]:
                opened.clear()
            elif len(opened) >= _BRACKET_LEVELS:
                return True
            else:
                opened.pop()
    return False


def _quotes(response: str, _: Arguments) -> bool:
    opened: list[str] = []
    deepest = 0
    for character in response:
        if opened and character == opened[-1]:
            opened.pop()
            if deepest - len(opened) >= _QUOTE_LEVELS:
                return True
        elif character in "\"'":
            opened.append(character)
            deepest = max(deepest, len(opened))
    return False


def _options(response: str, given: Arguments) -> bool:
    text = given.text("options")
    separator = next((separator for separator in ("/", "or") if separator in text), ",")
    options = [option.strip() for option in text.split(separator)]
    if _LETTERED.match(text):
        return response in options
    said = response.strip(_EDGES).lower()
    return any(option.strip(_EDGES).lower() == said for option in options)


def _newline(response: str, _: Arguments) -> bool:
    lines = response.translate(_PUNCTUATION).strip().split("\n")
    return all(len(line.split()) <= 1 for line in lines)


def _line_indent(response: str, _: Arguments) -> bool:
    depths = [len(line) - len(line.lstrip(" ")) for line in response.split("\n") if line.strip()]
    return all(one < other for one, other in pairwise(depths))


def _list(response: str, given: Arguments) -> bool:
    return response.count(given.text("sep")) >= 2


def _no_whitespace(response: str, _: Arguments) -> bool:
    return not any(character.isspace() for character in response)


CHECKS: dict[str, Callable[[str, Arguments], bool]] = {
    "count:word_count_range": _word_count_range,
    "count:unique_word_count": _unique_word_count,
    "count:numbers": _numbers,
    "count:conjunctions": _conjunctions,
    "count:punctuation": _punctuation,
    "words:alphabet": _alphabet,
    "words:vowel": _vowel,
    "words:consonants": _consonants,
    "words:palindrome": _palindrome,
    "words:prime_lengths": _prime_lengths,
    "words:repeats": _repeats,
    "words:no_consecutive": _no_consecutive,
    "words:last_first": _last_first,
    "words:paragraph_last_first": _paragraph_last_first,
    "sentence:keyword": _sentence_keyword,
    "sentence:increment": _sentence_increment,
    "ratio:sentence_type": _sentence_type,
    "ratio:sentence_balance": _sentence_balance,
    "format:parentheses": _parentheses,
    "format:quotes": _quotes,
    "format:options": _options,
    "format:newline": _newline,
    "format:line_indent": _line_indent,
    "format:list": _list,
    "format:no_whitespace": _no_whitespace,
}
