"""Words, phrases and tokens, and their positions in a prompt."""

import json
import unicodedata
from types import SimpleNamespace

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dfengine import Job
from dfengine.models.tokenizers import check_prompt, tokens_of
from dfengine.prompts import Prompt
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
        (
            "cafe\u0301's rock'n'roll, 90's: style:anime 10m²",
            ["cafe\u0301's", "rock'n'roll", "90's", "style", "anime", "10m²"],
        ),
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


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("बिल्ली और कुत्ता", ["बिल्ली", "और", "कुत्ता"]),  # Devanagari: vowel signs and viramas
        ("แมวสีแดง บนเสื่อ", ["แมวสีแดง", "บนเสื่อ"]),  # Thai divides phrases with spaces, not words
        ("قِطَّةٌ حَمْرَاءُ", ["قِطَّةٌ", "حَمْرَاءُ"]),  # Arabic with vowel marks
        ("고양이와 개", ["고양이와", "개"]),
        ("一只红色的猫", ["一", "只", "红", "色", "的", "猫"]),
        ("赤い猫とコーヒー、犬", ["赤", "い", "猫", "と", "コーヒー", "犬"]),
        ("a 🐱 and 👩\u200d🔬 ☀\ufe0f", ["a", "🐱", "and", "👩\u200d🔬", "☀\ufe0f"]),
        ("\u0901 \u0301", []),  # marks alone
    ],
)
def test_words_of_all_scripts(prompt: str, words: list[str]) -> None:
    assert texts(prompt, word_spans(prompt)) == words


@pytest.mark.parametrize(
    ("prompt", "concept", "found"),
    [
        ("一只红色的猫", "猫", [(5, 6)]),
        ("一只红色的猫", "红色", [(2, 4)]),
        ("红cat猫", "cat", [(1, 4)]),
        ("クロネコ", "ネコ", [(2, 4)]),
        ("แมวสีแดง", "แมว", [(0, 3)]),
        ("a cafe\u0301 in café", "café", [(2, 7), (11, 15)]),
        ("a cafe\u0301 in café", "CAFE\u0301", [(2, 7), (11, 15)]),
        ("die STRASSE, Straße", "straße", [(4, 11), (13, 19)]),
        ("3🐱 cats", "🐱", [(1, 2)]),
        ("a 👩\u200d🔬", "👩\u200d🔬", [(2, 5)]),
    ],
)
def test_phrases_of_all_scripts_are_found(prompt: str, concept: str, found: list[tuple[int, int]]) -> None:
    assert find_occurrences(prompt, concept) == found


@pytest.mark.parametrize(
    ("prompt", "concept"),
    [
        ("बिल्ली", "ल"),
        ("बिल्ली", "बिल"),
        ("เสื่อ", "เส"),  # the consonant has marks
        ("cafe\u0301s", "cafe"),
        ("cafe\u0301", "cafe"),
        ("고양이와", "고양이"),
        ("a 👩\u200d🔬", "👩"),
        ("ＣＡＴＳ", "ＣＡＴ"),
        ("10m²", "10m"),
    ],
)
def test_parts_of_words_and_of_graphemes_are_not_found(prompt: str, concept: str) -> None:
    with pytest.raises(ValueError, match="is not in the prompt"):
        find_occurrences(prompt, concept)


#: Letters, marks and punctuation of many scripts, and any other character.
PIECES = st.sampled_from(
    [*"aeéß猫犬ーのネ3½²'’.-:, \u0301\u0323ิ", "e\u0301", "คำ", "ल्", "बि", "가", "ᄀ", "ᅡ", "👩\u200d🔬", "🇩🇪"]
)
PROMPTS = st.lists(PIECES | st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12).map("".join)


def graphemes(prompt: str) -> set[int]:
    return {0} | {match.end() for match in regex.finditer(r"\X", prompt)}


@given(PROMPTS)
def test_every_word_of_any_prompt_is_found_in_it(prompt: str) -> None:
    for start, stop in word_spans(prompt):
        occurrences = find_occurrences(prompt, prompt[start:stop])
        assert (start, stop) in occurrences
        assert {place for span in occurrences for place in span} <= graphemes(prompt)


@given(PROMPTS, st.sampled_from(["NFC", "NFD"]))
def test_canonically_equivalent_prompts_have_the_same_words(prompt: str, form: str) -> None:
    other = unicodedata.normalize(form, prompt)

    def canonical(text: str, spans: list[tuple[int, int]]) -> list[str]:
        return [unicodedata.normalize("NFC", one) for one in texts(text, spans)]

    assert canonical(other, word_spans(other)) == canonical(prompt, word_spans(prompt))
    for start, stop in word_spans(prompt):
        word = prompt[start:stop]
        assert canonical(other, find_occurrences(other, word)) == canonical(prompt, find_occurrences(prompt, word))


def test_a_lone_surrogate_is_refused() -> None:
    makers = (Prompt, lambda text: Job(text, (1,)), lambda text: Job("a", (1,), negative_prompt=text))
    for make in makers:
        with pytest.raises(ValueError, match=r"'a \\udcff' is not possible: expected text without lone surrogates"):
            make("a \udcff")
    with pytest.raises(ValueError, match="lone surrogate"):
        find_occurrences("a \ud800 cat", "cat")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    """CLIP's own tokenizer with a small vocabulary: every byte, and the words "red", "cat" and "café"."""
    folder, letters = tmp_path_factory.mktemp("clip"), list(bytes_to_unicode().values())
    merges = ["r e", "re d</w>", "c a", "ca t</w>", "ca f", "Ã ©</w>", "caf Ã©</w>"]
    words = [*letters, *(f"{one}</w>" for one in letters), *(one.replace(" ", "") for one in merges)]
    vocabulary = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


@pytest.mark.parametrize(
    ("prompt", "concept", "characters"),
    [
        ("a cafe\u0301 RED", "café", ["cafe"]),  # the tokenizer reads é, which begins at the prompt's e
        ("a cafe\u0301 RED", "red", ["RED"]),
        ("一只红色的猫 cat", "猫", ["猫", "猫", "猫"]),  # a token for each byte
        ("一只红色的猫 cat", "cat", ["cat"]),
        ("बि  cat", "बि", ["ब", "ब", "ब", "ि", "ि", "ि"]),
        ("👩\u200d🔬 cat", "cat", ["cat"]),
    ],
)
def test_concepts_have_the_tokens_of_clips_own_tokenizer(
    tokenizer: CLIPTokenizer, prompt: str, concept: str, characters: list[str]
) -> None:
    pipeline = SimpleNamespace(maybe_convert_prompt=lambda text, _: text)
    tokens = tokens_of(pipeline, tokenizer, prompt)
    assert [prompt[slice(*tokens.spans[index])] for index in tokens.find(concept)] == characters
    with pytest.raises(ValueError, match="lone surrogate"):
        check_prompt(tokenizer, f"{prompt} \udcff")


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
