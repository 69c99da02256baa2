"""Texts of figures in all scripts: widths, line breaks, fonts, and what is said of letters that no font has."""

import io
import textwrap
import unicodedata
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from marks import soak
from matplotlib.text import Text
from test_figures import check_texts, random_result

from dfengine import figures
from dfengine.figures import lettering
from dfengine.figures.lettering import columns, fill, shorten
from dfengine.figures.panels import Figure

CHINESE = (
    "一只红色的猫坐在蓝色的垫子上，背景是灰色的，远处有一座白雪皑皑的山，天空中有两个明亮的月亮，黎明时分光线柔和。"
)


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ("cat", 3),
        ("猫", 2),
        ("ｃａｔ", 6),
        ("cafe\u0301", 4),
        ("बि", 2),
        ("कि\u0902", 2),
        ("a\u200db", 2),
        ("한국", 4),
        ("🐱", 2),
    ],
)
def test_wide_letters_have_two_columns_and_marks_none(text: str, width: int) -> None:
    assert columns(text) == width


def test_lines_break_between_ideographs_but_not_before_punctuation() -> None:
    assert fill("一只红色的猫，坐着。", 10) == "一只红色的\n猫，坐着。"
    assert fill("一只红色的，猫", 10) == "一只红色\n的，猫"
    assert fill("a cat 一只猫 sits", 8) == "a cat 一\n只猫\nsits"
    assert shorten(CHINESE, 20) == "一只红色的猫坐在蓝 …"
    assert columns(shorten(CHINESE, 20)) <= 20


@given(st.text(alphabet="ab \u00e9", max_size=60), st.integers(2, 20))
def test_narrow_text_is_wrapped_and_shortened_as_by_textwrap(text: str, width: int) -> None:
    text = " ".join(text.split())
    ours, expected = (filled.split("\n") for filled in (fill(text, width), textwrap.fill(text, width)))
    assert list(map(str.rstrip, ours)) == list(map(str.rstrip, expected))
    if max(map(len, text.split()), default=0) <= width - 2:  # a longer word is cut, which textwrap leaves out
        assert shorten(text, width) == textwrap.shorten(text, width, placeholder=" …")


@given(st.text(alphabet="a 猫，e\u0301🐱ネค", max_size=60), st.integers(8, 20))
def test_no_line_is_wider_than_asked_and_no_letter_is_lost(text: str, width: int) -> None:
    text = unicodedata.normalize("NFC", text)
    filled = fill(text, width)
    assert "".join(filled.split()) == "".join(text.split())
    # A run of closing punctuation alone, which stays with its letter, may be wider.
    if "，，，" not in text.replace(" ", ""):
        assert all(columns(line) <= width for line in filled.split("\n"))


@pytest.fixture
def no_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No installed font has any letter that matplotlib's own lack."""
    monkeypatch.setattr(lettering, "_letters_by_family", lambda letters: {})
    lettering._fallbacks.cache_clear()
    yield
    lettering._fallbacks.cache_clear()


@pytest.mark.usefixtures("no_fonts")
@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_letters_that_no_font_has_are_named_in_one_warning(kind: str) -> None:
    """matplotlib has a warning for each letter and each time that it draws it."""
    figure = Figure()
    figure.text(0.1, 0.5, "猫 and 犬\x07")
    figure.suptitle("犬猫 cat", parse_math=False)
    named = (
        r"^no installed font has '\\x07' 犬 猫, drawn as boxes: install one that does, such as Noto Sans \(for Chinese"
    )
    with pytest.warns(UserWarning, match=named) as caught:
        figure.savefig(io.BytesIO(), format=kind)
    assert len(caught) == 1
    figure.savefig(io.BytesIO(), format=kind)  # says nothing: a warning would be an error


def test_letters_are_drawn_in_an_installed_font_that_has_them() -> None:
    """matplotlib comes with STIXGeneral, which has letters that DejaVu Sans lacks."""
    figure = Figure()
    text, plain = figure.text(0.1, 0.5, "ᶁ ᶄ の"), figure.text(0.1, 0.2, "café")
    for kind in ("png", "pdf", "svg"):
        figure.savefig(io.BytesIO(), format=kind)
    families = text.get_fontfamily()
    assert families[0] == plain.get_fontfamily()[0] == "sans-serif"
    assert len(plain.get_fontfamily()) == 1
    letters = lettering._letters_by_family(frozenset("ᶁᶄの"))
    assert set().union(*(letters[name] for name in families[1:])) == set("ᶁᶄの")


def test_the_fewest_fonts_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    fonts = {"A": frozenset("一"), "B": frozenset("一二"), "C": frozenset("三"), "D": frozenset()}
    monkeypatch.setattr(
        lettering, "_letters_by_family", lambda letters: {name: fonts[name] & letters for name in fonts}
    )
    assert lettering._fallbacks.__wrapped__(frozenset("一二三")) == (("B", "C"), frozenset())


@pytest.mark.slow
@pytest.mark.usefixtures("no_fonts")
@pytest.mark.filterwarnings("ignore:no installed font")
@pytest.mark.parametrize("method", ["rise", soak("attention")])
def test_figures_of_chinese_prompts_have_texts_that_fit(method: str) -> None:
    """Measured in letters as wide as those of a Chinese font, one em."""
    result = random_result(CHINESE, steps=6)
    figure = figures.draw(result, method)
    for text in figure.findobj(Text):
        text.set_text("".join("—" if one in CHINESE else one for one in text.get_text()))
    check_texts(figure)
