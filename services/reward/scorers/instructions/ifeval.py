"""The instructions of IFEval (Zhou et al., 2023), but for the language of the response.

Their checks count as IFEval's published code does, with these differences: keywords are texts, not patterns; sentences
and capital words are found by rules (`sentences`) instead of trained models; "in English" is not judged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from services.reward.scorers.instructions.arguments import Arguments
from services.reward.scorers.instructions.sentences import count_words, sentences

_PLACEHOLDER = re.compile(r"\[[^\[\]\n]*\]")
_ONE_STAR = re.compile(r"\*[^\n*]*\*")
_TWO_STARS = re.compile(r"\*\*[^\n*]*\*\*")
_CAPITAL_WORD = re.compile(r"\w+(?:[-'’.]\w+)*")
_POSTSCRIPTS = {"P.S.": re.compile(r"p\.\s?s\."), "P.P.S": re.compile(r"p\.\s?p\.\s?s")}
_FENCES = ("```json", "```Json", "```JSON", "```")
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_FIRST_WORD = re.compile(r"[^\s.,?!'\"]*")
_MAX_JSON_DEPTH = 200


def _occurrences(keyword: str, response: str) -> int:
    return len(re.findall(re.escape(keyword), response, re.IGNORECASE))


def _existence(response: str, given: Arguments) -> bool:
    return all(_occurrences(keyword, response) for keyword in given.texts("keywords"))


def _frequency(response: str, given: Arguments) -> bool:
    return given.holds(_occurrences(given.text("keyword"), response), "relation", "frequency")


def _forbidden_words(response: str, given: Arguments) -> bool:
    return not any(
        re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in given.texts("forbidden_words")
    )


def _letter_frequency(response: str, given: Arguments) -> bool:
    letter = given.text("letter").lower()
    return given.holds(response.lower().count(letter), "let_relation", "let_frequency")


def _number_sentences(response: str, given: Arguments) -> bool:
    return given.holds(len(sentences(response)), "relation", "num_sentences")


def _number_words(response: str, given: Arguments) -> bool:
    return given.holds(count_words(response), "relation", "num_words")


def _number_paragraphs(response: str, given: Arguments) -> bool:
    paragraphs = [paragraph.strip() for paragraph in response.split("***")]
    inner = paragraphs[1:-1]
    return all(inner) and sum(map(bool, paragraphs)) == given.number("num_paragraphs")


def _nth_paragraph_first_word(response: str, given: Arguments) -> bool:
    paragraphs = response.split("\n\n")
    count, place = sum(1 for paragraph in paragraphs if paragraph.strip()), given.number("nth_paragraph")
    word = given.text("first_word").lower()
    if count != given.number("num_paragraphs") or not 1 <= place <= count:
        return False
    first = _FIRST_WORD.match(paragraphs[place - 1].strip().lstrip("'").lstrip('"'))
    return first is not None and first[0].lower() == word


def _number_placeholders(response: str, given: Arguments) -> bool:
    return len(_PLACEHOLDER.findall(response)) >= given.number("num_placeholders")


def _postscript(response: str, given: Arguments) -> bool:
    marker = given.text("postscript_marker")
    if pattern := _POSTSCRIPTS.get(marker):
        return pattern.search(response.lower()) is not None
    return marker.lower() in response.lower()


def _number_bullet_lists(response: str, given: Arguments) -> bool:
    lines = [line.strip() for line in response.splitlines()]
    bullets = [line for line in lines if line.startswith("-") or (line.startswith("*") and line[1:2] not in ("*", ""))]
    return len(bullets) == given.number("num_bullets")


def _constrained_response(response: str, _: Arguments) -> bool:
    return any(answer in response for answer in _ANSWERS)


def _number_highlighted_sections(response: str, given: Arguments) -> bool:
    found = [*_ONE_STAR.findall(response), *_TWO_STARS.findall(response)]
    return sum(1 for section in found if section.strip("*").strip()) >= given.number("num_highlights")


def _multiple_sections(response: str, given: Arguments) -> bool:
    heads = re.findall(re.escape(given.text("section_spliter")) + r"\s?\d+", response)
    return len(heads) >= given.number("num_sections")


def _json_format(response: str, _: Arguments) -> bool:
    text = response.strip()
    fence = next((fence for fence in _FENCES if text.startswith(fence)), "")
    text = text.removeprefix(fence).removesuffix("```").strip()
    if sum(text.count(bracket) for bracket in "[{") > _MAX_JSON_DEPTH and _depth(text) > _MAX_JSON_DEPTH:
        return False
    try:
        json.loads(text, parse_int=float)
    except ValueError:
        return False
    return True


def _depth(text: str) -> int:
    depth = deepest = 0
    for bracket in re.findall(r"[\[{\]}]", text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _title(response: str, _: Arguments) -> bool:
    for line in response.split("\n"):
        begin, end = line.find("<<"), line.rfind(">>")
        if begin >= 0 and begin + 2 < end and line[begin + 2 : end].lstrip("<").rstrip(">").strip():
            return True
    return False


def _two_responses(response: str, _: Arguments) -> bool:
    parts = [part.strip() for part in response.split("******")]
    said = [part for part in parts if part]
    return all(parts[1:-1]) and len(said) == 2 and said[0] != said[1]


def _repeat_prompt(response: str, given: Arguments) -> bool:
    return response.strip().lower().startswith(given.text("prompt_to_repeat").lower())


def _end_checker(response: str, given: Arguments) -> bool:
    return response.strip().strip('"').lower().endswith(given.text("end_phrase").lower())


def _quotation(response: str, _: Arguments) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] == '"' and text[-1] == '"'


def _capital_word_frequency(response: str, given: Arguments) -> bool:
    capitals = sum(1 for word in _CAPITAL_WORD.findall(response) if word.isupper())
    return given.holds(capitals, "capital_relation", "capital_frequency")


def _english_capital(response: str, _: Arguments) -> bool:
    return response.isupper()


def _english_lowercase(response: str, _: Arguments) -> bool:
    return response.islower()


def _no_comma(response: str, _: Arguments) -> bool:
    return "," not in response


CHECKS: dict[str, Callable[[str, Arguments], bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": _number_words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "detectable_content:number_placeholders": _number_placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _number_bullet_lists,
    "detectable_format:constrained_response": _constrained_response,
    "detectable_format:number_highlighted_sections": _number_highlighted_sections,
    "detectable_format:multiple_sections": _multiple_sections,
    "detectable_format:json_format": _json_format,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _end_checker,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_word_frequency,
    "change_case:english_capital": _english_capital,
    "change_case:english_lowercase": _english_lowercase,
    "punctuation:no_comma": _no_comma,
}
