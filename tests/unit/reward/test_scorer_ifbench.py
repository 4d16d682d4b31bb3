"""Instructions and responses that follow them or do not. Verdicts are IFEval's and IFBench's published checks'."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.reward.scorers.base import SampleError
from services.reward.scorers.ifbench import score
from services.reward.scorers.instructions import CHECKS
from services.reward.scorers.instructions.sentences import sentences
from tests.kit.reward_items import item

PALINDROMES = "noon level radar civic kayak refer rotor stats tenet madam solos"
# instruction, its arguments, a response that follows it, one that does not
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["river", "Mona Lisa"]}, "The RIVER and mona lisa", "The river"),
    ("keywords:existence", {"keywords": ["a.b"]}, "a.b", "axb"),
    ("keywords:frequency", {"keyword": " key ", "frequency": 3, "relation": "at least"}, "key Key KEY", "key Key"),
    ("keywords:frequency", {"keyword": "key", "frequency": 3, "relation": "less than"}, "key key", "key key key"),
    ("keywords:forbidden_words", {"forbidden_words": ["gene", "(x)"]}, "Generative", "The GENE."),
    ("keywords:letter_frequency", {"letter": "T", "let_frequency": 4, "let_relation": "at least"}, "tTtt", "ttt"),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "less than"}, "#", "##"),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        "Dr. Who came. He left! Why?",
        "Dr. Who came, e.g. at 3.14 p.m. yes. He left",
    ),
    ("length_constraints:number_words", {"num_words": 4, "relation": "less than"}, "one two-three", "it's one two"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\na\n***\nb", "a\n***\n\n***\nb"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Really"},
        'One.\n\n"really?! Two.',
        "Really.\n\nTwo.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b c]", "[a] and [b"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye. p. s. hi", "Bye. PS: hi"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye. P.P.S. hi", "Bye. P.S. hi"),
    ("detectable_content:postscript", {"postscript_marker": "N.B."}, "n.b. hi", "nxb. hi"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "x\n* a\n - b", "* a\n** b"),
    ("detectable_format:constrained_response", {}, " My answer is no.\n", "My answer is perhaps."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* *b*", "*a* * *"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1 SECTION 2",
        "Section 1",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": [1, null]}\n```', '{"a": 1'),
    ("detectable_format:title", {}, "x\n<<A title>>", "<< >>\n<<a\nb>>"),
    ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Do it."}, "do IT. Done", "Done. Do it."),
    ("startend:end_checker", {"end_phrase": "The End"}, 'So. the end" ', "The end, so."),
    ("startend:quotation", {}, ' "all of it" ', '"half" of it'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "ONE TWO-THREE",
        "ONE Two",
    ),
    ("change_case:english_capital", {}, "ALL OF IT. 1!", "ALL of it"),
    ("change_case:english_lowercase", {}, "all of it. 1!", "all Of it"),
    ("punctuation:no_comma", {}, "one; two", "one, two"),
    ("count:word_count_range", {"min_words": 2, "max_words": 3}, "one two", "one"),
    ("count:unique_word_count", {"N": 2}, "One, one two", "one One one!"),
    ("count:numbers", {"N": 2}, "3.14 and 1,000", "3 and 4 and 5"),
    ("count:conjunctions", {"small_n": 2}, "this and that or", "this and that And"),
    ("count:punctuation", {}, ". , ! ? ; : ?!", ". , ! ? ; :"),
    ("words:alphabet", {}, "yes zebra, a bee", "a c"),
    ("words:vowel", {}, "a bee is", "a bee is on\n"),
    ("words:vowel", {}, "try", "a bee is on us"),
    ("words:consonants", {}, "strong crypts", "strong one"),
    ("words:palindrome", {}, PALINDROMES, "noon level"),
    ("words:prime_lengths", {}, "to the prime", "to the four"),
    ("words:repeats", {"small_n": 1}, "one two", "One two one"),
    ("words:no_consecutive", {}, "one two one", "two Three"),
    ("words:last_first", {}, "I saw it. It saw me. Me!", "I saw it. You saw it."),
    ("words:paragraph_last_first", {}, "me and me\n\nyou or you.", "me and you"),
    ("sentence:keyword", {"word": "it", "N": 2}, "No. It is.", "It is. No item."),
    ("sentence:increment", {"small_n": 1}, "One. One two. One two three.", "One. One two three."),
    ("ratio:sentence_type", {}, "Yes. No. Why?", "Yes. Why?"),
    ("ratio:sentence_balance", {}, "Yes. Why? Oh!", "Yes. Yes. Why? Oh!"),
    ("format:parentheses", {}, "(a [b {c (d [e])}])", "(a [b {c (d)}])"),
    ("format:quotes", {}, '"a \'b "c" d\' e"', "\"a 'b' c\""),
    ("format:options", {"options": "yes/no/maybe"}, "Yes.", "yes/no"),
    ("format:options", {"options": "I know or I don't know"}, "i don't know", "I do know"),
    ("format:options", {"options": "a), b), c)"}, "a)", "A"),
    ("format:newline", {}, "one\n\ntwo!", "one two"),
    ("format:line_indent", {}, "a\n b\n  c", "a\n b\n c"),
    ("format:list", {"sep": "..."}, "...a\n...b", "...a\nb"),
    ("format:no_whitespace", {}, "allofit", "all of it"),
]
# instruction, arguments, what the error names
BAD = [
    ("keywords:existence", {}, "keywords of keywords:existence is missing"),
    ("keywords:existence", {"keywords": "word"}, "keywords of keywords:existence is no list of texts"),
    ("keywords:existence", {"keywords": []}, "is no list of texts"),
    (
        "keywords:frequency",
        {"keyword": "a", "frequency": 1, "relation": "at most"},
        'neither "at least" nor "less than"',
    ),
    (
        "keywords:frequency",
        {"keyword": "", "frequency": 1, "relation": "at least"},
        "keyword of keywords:frequency is no text",
    ),
    ("count:numbers", {"N": -1}, "N of count:numbers is no whole number"),
    ("count:numbers", {"N": 1.5}, "is no whole number"),
    ("count:numbers", {"N": True}, "is no whole number"),
    ("count:numbers", {"N": "1"}, "is no whole number"),
    ("count:numbers", {"N": None}, "N of count:numbers is missing"),
]


def of(response: str, names: list[str], arguments: Any) -> tuple[float, dict[str, float]]:
    metadata = {"instruction_id_list": names, "kwargs": arguments}
    return score(item(response, "", metadata_json=json.dumps(metadata)))


@pytest.mark.parametrize(("name", "arguments", "followed", "ignored"), CASES)
def test_an_instruction(name: str, arguments: dict[str, Any], followed: str, ignored: str) -> None:
    assert of(followed, [name], [arguments]) == (1.0, {"followed": 1.0}, ())
    assert of(ignored, [name], [arguments]) == (0.0, {"followed": 0.0}, ())


def test_every_instruction_has_a_case() -> None:
    assert {name for name, *_ in CASES} == set(CHECKS)


def test_all_or_nothing() -> None:
    names = ["punctuation:no_comma", "count:numbers", "detectable_format:title"]
    nulls = {"N": 1, "keywords": None}
    assert of("<<One 1>>", names, [{}, nulls, None]) == (1.0, {"followed": 1.0}, ())
    assert of("<<One, 1>>", names, [{}, nulls, None]) == (0.0, {"followed": 2 / 3}, ())


@pytest.mark.parametrize("response", ["", "  \n\t\u00a0"])
def test_a_blank_response_follows_nothing(response: str) -> None:
    assert of(response, ["punctuation:no_comma"], None) == (0.0, {"followed": 0.0}, ())


def test_arguments_as_floats_and_once_for_all() -> None:
    assert of("one 1", ["count:numbers", "words:repeats"], {"N": 1.0, "small_n": 1}) == (1.0, {"followed": 1.0}, ())


@pytest.mark.parametrize(("name", "arguments", "message"), BAD)
def test_a_bad_argument_is_named(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SampleError, match=message):
        of("some text", [name], [arguments])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["punctuation:no_comma", "language:response_language", "x"],
            "unknown instructions .*: language:response_language, x",
        ),
        ([], "no instruction_id_list"),
        ("punctuation:no_comma", "no instruction_id_list"),
        (None, "no instruction_id_list"),
        ([None], "unknown instructions .*: None"),
    ],
)
def test_what_cannot_be_judged_is_named(names: Any, message: str) -> None:
    with pytest.raises(SampleError, match=message):
        of("some text", names, None)


@pytest.mark.parametrize("arguments", [[], [{}, {}], ["x"], "x", 7])
def test_arguments_that_do_not_fit(arguments: Any) -> None:
    with pytest.raises(SampleError, match="kwargs are no list of 1 objects"):
        of("some text", ["punctuation:no_comma"], arguments)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three?", 3),
        ("Mr. Smith and Dr. J. Doe met at 3.30 p.m. today.", 1),
        ("What?! No... Yes.", 3),
        ("1. First item\n2. Second item", 1),
        ('He said "no." Then he left.', 2),
        ("no end mark", 1),
        ("It was I. We left.", 2),
        ("", 0),
        ("?", 1),
        ("www.example.com/a.b is fine.", 1),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert len(sentences(text)) == count
