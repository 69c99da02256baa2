"""Words, phrases and tokens, and their positions in a prompt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfengine.tokens import PADDING, Tokens, concept_spans, find_occurrences, word_spans

PROMPT = "A red circle above a red  square, l'été art-deco 3.5!"


def texts(prompt: str, spans: list[tuple[int, int]]) -> list[str]:
    return [prompt[start:stop] for start, stop in spans]


def test_words_are_those_a_reader_would_count() -> None:
    assert texts(PROMPT, word_spans(PROMPT)) == [
        "A", "red", "circle", "above", "a", "red", "square", "l'été", "art-deco", "3.5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a cat,a dog", ["a", "cat", "a", "dog"]),
        ("a cat—a dog...and (red:1.5)", ["a", "cat", "a", "dog", "and", "red", "1.5"]),
        ("1,000 cafe\u0301s", ["1,000", "cafe\u0301s"]),
    ],
)
def test_punctuation_separates_words(prompt: str, words: list[str]) -> None:
    assert texts(prompt, word_spans(prompt)) == words


def test_all_occurrences_of_a_word_are_found() -> None:
    assert find_occurrences(PROMPT, "red") == [(2, 5), (21, 24)]
    assert find_occurrences(PROMPT, "a") == [(0, 1), (19, 20)]


def test_phrases_are_found_regardless_of_case_and_spaces() -> None:
    assert texts(PROMPT, find_occurrences(PROMPT, "RED square")) == ["red  square"]


@pytest.mark.parametrize("concept", ["circ", "ed", "red circles", "red square above", "", "  ", "été!!", "."])
def test_an_unknown_concept_is_refused_with_the_known_words(concept: str) -> None:
    with pytest.raises(ValueError, match=r"is not in .* expected one of its words \(A, red, circle, above, a, square"):
        find_occurrences(PROMPT, concept)


def test_special_characters_are_literal() -> None:
    assert find_occurrences("a cat (sitting) on 1+1", "1+1") == [(19, 22)]
    assert find_occurrences("a <cat-toy>", "<cat-toy>") == [(2, 11)]


@given(st.text())
def test_every_word_of_any_prompt_is_found_in_it(prompt: str) -> None:
    for start, stop in word_spans(prompt):
        assert (start, stop) in find_occurrences(prompt, prompt[start:stop])


#: "photo" in two pieces, and "cat" twice.
TOKENS = Tokens(
    "a photo of a cat, a cat",
    ("<s>", "a", "pho", "to", "of", "a", "cat", ",", "a", "cat", "</s>", PADDING),
    ((0, 0), (0, 1), (2, 5), (5, 7), (8, 10), (11, 12), (13, 16), (16, 17), (18, 19), (20, 23), (0, 0), (0, 0)),
)


def test_a_word_has_all_its_tokens_and_no_others() -> None:
    assert TOKENS.find("photo") == [2, 3]
    assert TOKENS.find("cat") == [6, 9]
    assert TOKENS.find("a cat") == [5, 6, 8, 9]
    assert TOKENS.find("a photo of") == [1, 2, 3, 4]


def test_special_tokens_are_excluded() -> None:
    assert TOKENS.own == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_concepts_default_to_all_words() -> None:
    assert [name for name, _ in concept_spans("a cat and a dog", None)] == ["a", "cat", "and", "a", "dog"]
    assert concept_spans("a cat and a dog", ["a", "dog"]) == [("a", [(0, 1), (10, 11)]), ("dog", [(12, 15)])]
