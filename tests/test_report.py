"""The HTML report of a run: its data, its errors, and its behaviour in a browser."""

import base64
import dataclasses
import io
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marks import soak
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from scipy.ndimage import map_coordinates
from store_example import PLAN, fill, trajectory
from test_cli import error_line as error_line  # a fixture
from test_figures import LONG, random_result

import dfengine
from dfengine import Attention, Cam, Engine, Relevance, Rise, figures, report, store
from dfengine.result import COMBINED, Result, heatmap

#: Contains a word twice.
PROMPT = "a red circle and a red square"
CAPTION = "a red circle above a blue square on a gray background"
NASTY = """</script><b>bold</b> & "one" 'two' {{style}} <!-- {{images}} \\u003c"""
LAYER = "down_blocks.1.attentions.0"
#: The labels of the methods of `random_result` on the page.
LABELS = {"rise": "DF-RISE", "cam": "DF-CAM"}
#: The step at which the page of `make_result` opens: its map has the largest variance beside its errors.
START = 3
OPENS_AT = f"step {START}, t = {50 - 10 * START}"
#: The only URL that a page contains.
SVG = "http://www.w3.org/2000/svg"


def make_result(steps: int = 6, size: tuple[int, int] = (8, 12), **changes: Any) -> Result:
    """A random result with standard errors of the DF-RISE maps."""
    step_errors = np.random.default_rng(2).random(size=(steps, 2, 3)).astype(np.float32)
    return random_result(PROMPT, steps, size, **{"errors": {"rise": step_errors}, **changes})


def rise_only(steps: int = 5, **changes: Any) -> dict[str, Any]:
    """Changes that reduce a result to DF-RISE maps: no relevance, no words, no previews."""
    maps = {"rise": make_result(steps).maps["rise"]}
    unavailable = {"maps": maps, "tokens": None, "relevance": None, "words": (), "word_maps": None, "previews": None}
    return {**unavailable, "settings": {"rise": Rise()}, **changes}


def interrupted(result: Result) -> Result:
    """The result with only the first two steps computed."""

    def cut(maps: np.ndarray) -> np.ndarray:
        maps = maps.copy()
        maps[2:] = np.nan
        return maps

    assert result.relevance is not None
    maps = {name: cut(maps) for name, maps in result.maps.items() if name != "cam"}
    layers = {layer: cut(maps) for layer, maps in result.maps["cam"].items()}
    errors = {name: cut(maps) for name, maps in result.errors.items()}
    relevance = cut(result.relevance.T).T
    return dataclasses.replace(result, maps={**maps, "cam": layers}, errors=errors, relevance=relevance)


def read_page(page: Path) -> tuple[dict[str, Any], list[bytes]]:
    """The data of a page and the binary payload of each image."""
    text = page.read_text(encoding="utf-8")
    data = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    payloads = re.findall(r'<script type="text/plain" id="bytes-\d+">(.*?)</script>', text)
    return json.loads(data[0]), [base64.b64decode(payload, validate=True) for payload in payloads]


def bytes_of(reference: dict[str, Any], payload: bytes) -> bytes:
    return payload[reference["at"] :][: reference["bytes"]]


def decode_maps(reference: dict[str, Any], payload: bytes) -> np.ndarray:
    """Maps stored in a page, float32 [steps, h, w]; steps marked as not computed are NaN."""
    raw, shape = zlib.decompress(bytes_of(reference, payload)), reference["shape"]
    if reference["type"] == "f4":
        return np.frombuffer(raw, np.uint8).reshape(4, -1).T.copy().view("<f4").reshape(shape)
    ends = np.array([pair or [np.nan, np.nan] for pair in reference["ends"]])[..., None, None]
    levels = np.frombuffer(raw, np.uint8).reshape(shape)
    return ends[:, 0] + (ends[:, 1] - ends[:, 0]) * levels / 255


def variants(page: Path, method: str) -> dict[str, np.ndarray]:
    """The maps of a method on a page of one image, by name."""
    data, (payload,) = read_page(page)
    (method_data,) = (variant for variant in data["items"][0]["methods"] if variant["name"] == method)
    return {variant["name"]: decode_maps(variant, payload) for variant in method_data["variants"]}


def one_map(values: np.ndarray, errors: np.ndarray | None = None) -> Result:
    """A result whose maps have one value in each of their two rows, and perhaps such errors."""

    def rows(values: np.ndarray) -> dict[str, np.ndarray]:
        return {"rise": np.repeat(values[:, :, None], 3, axis=2).astype(np.float32)}

    return random_result(PROMPT, len(values), maps=rows(values), errors={} if errors is None else rows(errors))


NONE = np.nan


@pytest.mark.parametrize(
    ("values", "errors", "step"),
    [
        # Variances 4, 9, 1, 4.
        ([[0, 4], [0, 6], [0, 2], [4, 0]], [[1, 1], [3, 3], [0, 0], [1, 1]], 0),  # less errors: 3, 0, 1, 3
        ([[0, 4], [0, 6], [0, 2], [4, 0]], [[1, 1], [2, 1], [0, 0], [1, 1]], 1),  # 9 - 2.5
        ([[0, 4], [0, 6], [0, 2], [4, 0]], [[9, 9], [9, 9], [0, np.inf], [9, 9]], 2),  # infinite errors do not count
        ([[0, 4], [0, 6], [0, 2], [4, 0]], None, 3),  # of the later half
        ([[0, 4], [0, 6], [0, 2], [NONE, NONE]], None, 2),
        ([[0, 4], [0, 6], [NONE, NONE], [NONE, NONE]], None, 1),  # the later half is not computed yet
        ([[NONE, NONE]] * 4, None, 0),
        ([[0, 0]] * 4, None, 2),
    ],
)
def test_the_page_opens_where_the_first_map_says_most(
    values: list[list[float]], errors: list[list[float]] | None, step: int, tmp_path: Path
) -> None:
    result = one_map(np.array(values), None if errors is None else np.array(errors))
    data, _ = read_page(report.write([result], tmp_path / "page.html"))
    assert data["items"][0]["start"] == step


def test_the_page_of_an_image_without_maps_opens_at_its_last_step(tmp_path: Path) -> None:
    data, _ = read_page(report.write([make_result(maps={}, errors={})], tmp_path / "page.html"))
    assert data["items"][0]["start"] == 5


def test_maps_of_methods_are_stored_exactly(tmp_path: Path) -> None:
    result = interrupted(make_result())
    page = report.write([result], tmp_path / "page.html")
    for method in ("rise", "relevance", "attention"):
        np.testing.assert_array_equal(variants(page, method)[""], result.maps[method])
    np.testing.assert_array_equal(variants(page, "cam")[""], result.maps["cam"][COMBINED])
    data, (payload,) = read_page(page)
    error = data["items"][0]["methods"][0]["variants"][0]["error"]
    np.testing.assert_array_equal(decode_maps(error, payload), result.errors["rise"])


def test_layers_and_words_are_stored_with_256_levels(tmp_path: Path) -> None:
    result = interrupted(make_result())
    assert result.word_maps is not None
    page = report.write([result], tmp_path / "page.html")
    layers, words = variants(page, "cam"), variants(page, "attention")
    assert list(layers) == ["", *(name for name in result.maps["cam"] if name != COMBINED)]
    assert list(words) == ["", "a", "red", "circle", "and", "a (2)", "red (2)", "square"]
    pairs = [(layers[name], result.maps["cam"][name]) for name in layers if name]
    pairs += zip(list(words.values())[1:], result.word_maps, strict=True)
    for stored, original in pairs:
        span = np.ptp(original, axis=(1, 2), keepdims=True)
        assert (np.isnan(stored) == np.isnan(original)).all()
        assert (np.isnan(original) | (abs(stored - original) <= 0.501 * span / 255)).all()
        np.testing.assert_allclose(stored[:2].min((1, 2)), original[:2].min((1, 2)), rtol=1e-6)
        np.testing.assert_allclose(stored[:2].max((1, 2)), original[:2].max((1, 2)), rtol=1e-6)


@pytest.mark.parametrize(("size", "form"), [((256, 40), "PNG"), ((40, 260), "WEBP")])
def test_images_up_to_256_pixels_are_stored_losslessly(tmp_path: Path, size: tuple[int, int], form: str) -> None:
    slope = np.add.outer(np.arange(size[0]), np.arange(size[1]))[..., None] * np.array([0.5, 0.3, 0.8])
    previews = np.stack([slope, slope[::-1]]).astype(np.uint8)
    result = random_result(PROMPT, 2, size, image=previews[1], previews=previews)
    data, (payload,) = read_page(report.write([result], tmp_path / "page.html"))
    item = data["items"][0]
    assert item["size"] == [*size]
    for reference, original in zip([item["image"], *item["previews"]], [previews[1], *previews], strict=True):
        with Image.open(io.BytesIO(bytes_of(reference, payload))) as picture:
            assert (picture.format, f"image/{form.lower()}") == (form, reference["type"])
            difference = abs(np.asarray(picture.convert("RGB")).astype(int) - original)
        assert difference.max() == 0 if form == "PNG" else 0 < difference.mean() < 3


def test_lines_are_the_relevance_of_concepts(tmp_path: Path) -> None:
    result = interrupted(make_result())
    assert result.relevance is not None
    result.relevance[2, 1] = np.inf  # leaves this step without min–max scaled values
    data, _ = read_page(report.write([result], tmp_path / "page.html"))
    lines = {line["word"]: line for line in data["items"][0]["lines"]}
    assert list(lines) == ["a", "red", "circle", "and", "square"]
    shares = figures.concept_lines(result, list(lines))
    for word, line in lines.items():
        raw = [
            None if not np.isfinite(displayed_value) else pytest.approx(displayed_value, rel=1e-6)
            for displayed_value in result.concept(word)
        ]
        assert line["raw"] == raw
        assert line["normalised"] == [pytest.approx(shares[word][0], rel=1e-6), *[None] * 5]
    assert [word for word, line in lines.items() if line["shown"]] == ["red", "circle", "square"]


def test_eight_lines_are_drawn_initially(tmp_path: Path) -> None:
    result = random_result(LONG)
    data, _ = read_page(report.write([result], tmp_path / "page.html"))
    means = {word: line.mean() for word in figures.concept_lines(result) for line in [result.concept(word)]}
    shown = {line["word"] for line in data["items"][0]["lines"] if line["shown"]}
    assert shown == set(sorted(means, key=lambda word: -means[word])[:8])


class Tags(HTMLParser):
    """The tags of a page with their attributes, and their texts."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = [("", {})]
        self.texts: dict[str, str] = {}
        self.feed(page.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts[self.tags[-1][0]] = self.texts.get(self.tags[-1][0], "") + data


def test_markup_in_prompt_title_and_model_is_escaped(tmp_path: Path) -> None:
    harmless, harmful = (
        report.write([random_result(text, model=text)], tmp_path / "page.html", title=text).read_text("utf-8")
        for text in ("a circle", NASTY)
    )
    (tmp_path / "harmless.html").write_text(harmless, encoding="utf-8")
    (tmp_path / "page.html").write_text(harmful, encoding="utf-8")
    tags, expected = Tags(tmp_path / "page.html"), Tags(tmp_path / "harmless.html")
    assert [tag for tag, _ in tags.tags] == [tag for tag, _ in expected.tags]
    assert tags.texts["title"].strip() == tags.texts["h1"].strip() == NASTY
    data, _ = read_page(tmp_path / "page.html")
    assert (data["items"][0]["prompt"], data["items"][0]["model"]) == (NASTY,) * 2


def test_the_path_to_a_model_folder_is_not_published(tmp_path: Path) -> None:
    page = report.write(make_result(model="/home/me/models/sd15"), tmp_path / "page.html")
    data, _ = read_page(page)
    assert (data["items"][0]["model"], dict(data["items"][0]["facts"])["model"]) == ("sd15", "sd15")
    assert "/home/me" not in page.read_text("utf-8")


def test_a_page_of_several_prompts_is_titled_by_their_number(tmp_path: Path) -> None:
    page = report.write([make_result(), random_result("a blue square", 2)], tmp_path / "page.html")
    assert Tags(page).texts["title"].strip() == "2 images"


def test_a_page_loads_nothing_external(tmp_path: Path) -> None:
    page = report.write(make_result(), tmp_path / "page.html")
    parsed = Tags(page)
    assert set(re.findall(r"\w+://[^\s\"'`]+", page.read_text(encoding="utf-8"))) == {SVG}
    loading = {"src", "href", "srcset", "data", "action", "poster", "background"}
    assert not [tag for tag, attributes in parsed.tags if tag == "link" or loading & set(attributes)]
    assert not re.search(r"url\(|@import|\bimport\b|fetch\(|XMLHttp|WebSocket", page.read_text(encoding="utf-8"))
    (policy,) = (a["content"] for tag, a in parsed.tags if tag == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none';")


@pytest.mark.parametrize(
    ("items", "name", "message"),
    [
        (1, "page.png", r"page.png' ends in '.png': expected .html"),
        (1, "page", "ends in ''"),
        (1, "nowhere/page.html", "nowhere' does not exist: create it first"),
        (0, "page.html", "no image to show"),
    ],
)
def test_invalid_output_is_rejected_and_nothing_is_written(tmp_path: Path, items: int, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report.write([make_result(1)] * items, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_page_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    page = report.write([make_result(1)], tmp_path / "page.html", title="the first")
    before = page.read_bytes()

    def failing() -> Iterator[Result]:
        yield make_result(2)
        raise OSError("the disk is gone")

    for items, message in ((failing(), "the disk is gone"), (iter([]), "no image")):
        with pytest.raises((OSError, ValueError), match=message):
            report.write(items, page)
        assert (page.read_bytes(), list(tmp_path.iterdir())) == (before, [page])
    report.write([make_result(1)], page, title="the second")
    assert (page.read_bytes() == before, list(tmp_path.iterdir())) == (False, [page])


# The command line.


@pytest.fixture
def run_report(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Run `dfengine report` and return its stdout and stderr."""

    def run(*arguments: str) -> tuple[str, str]:
        monkeypatch.setattr("sys.argv", ["dfengine", "report", *arguments])
        with pytest.raises(SystemExit) as raised:
            dfengine.cli.main()
        captured = capfd.readouterr()
        assert not raised.value.code, captured.err
        return captured.out, captured.err

    return run


@pytest.fixture
def unfinished_run(tmp_path: Path) -> Path:
    """A file of two images, the second of which is not generated yet."""
    writer = store.Writer.create(tmp_path / "half.h5", PLAN)
    writer.trajectory(0, **trajectory(PLAN, 0))
    writer.close(publish=False)
    return tmp_path / "half.part.h5"


@pytest.mark.slow
def test_the_page_is_written_next_to_the_run(tmp_path: Path, run_report: Callable[..., tuple[str, str]]) -> None:
    with store.Writer.create(tmp_path / "run.v2.h5", PLAN) as writer:
        fill(writer)
    size = r", 0\.\d MB\n"
    out, err = run_report(str(tmp_path / "run.v2.h5"))
    page = tmp_path / "run.v2.html"
    assert (re.fullmatch(re.escape(f"{page}: 2 images") + size, out) is not None, err) == (True, "")
    data, payloads = read_page(page)
    assert ([item["number"] for item in data["items"]], len(payloads)) == ([0, 1], 2)
    assert {item["source"] for item in data["items"]} == {"run.v2.h5"}
    assert str(tmp_path) not in page.read_text("utf-8")  # a page may be shared
    assert Tags(page).texts["title"].strip() == "run.v2.h5"  # its two images have different prompts
    facts = dict(data["items"][1]["facts"])
    assert (facts["negative prompt"], facts["seed"], facts["key"]) == ("blurry", str(2**64 - 1), "k1")
    assert {"torch", "dfengine", "device"} < set(facts)
    _, err = run_report(str(tmp_path / "run.v2.h5"), "--limit", "1")
    assert err == "dfengine: note: 1 of 2 images; --limit or --item for others\n"
    out, err = run_report(str(tmp_path / "run.v2.h5"), "--item", "1", "-o", str(tmp_path / "b.html"), "--title", "<i>")
    assert (out.startswith(f"{tmp_path / 'b.html'}: 1 image, "), err) == (True, "")
    assert [item["number"] for item in read_page(tmp_path / "b.html")[0]["items"]] == [1]
    assert Tags(tmp_path / "b.html").texts["title"].strip() == "<i>"


def test_command_line_errors_are_one_line(unfinished_run: Path, error_line: Callable[..., str]) -> None:
    run = str(unfinished_run)
    assert "item 2 is not in" in error_line("report", run, "--item", "2")
    assert "item 1 is not generated yet" in error_line("report", run, "--item", "0", "--item", "1")
    assert "--limit" in error_line("report", run, "--limit", "0")
    assert "expected .html" in error_line("report", run, "-o", "page.pdf")
    assert "does not exist: create it first" in error_line("report", run, "-o", "nowhere/page.html")
    assert "does not exist" in error_line("report", str(unfinished_run.parent / "none.h5"))
    assert [path.name for path in unfinished_run.parent.iterdir()] == ["half.part.h5"]


def test_images_that_are_not_generated_yet_are_left_out(
    unfinished_run: Path, run_report: Callable[..., tuple[str, str]]
) -> None:
    assert run_report(str(unfinished_run))[0].startswith(f"{unfinished_run.with_name('half.html')}: 1 image, ")


def test_a_run_without_generated_images_is_an_error(tmp_path: Path, error_line: Callable[..., str]) -> None:
    with store.Writer.create(tmp_path / "run.h5", PLAN) as writer:
        assert "there is no image to show" in error_line("report", str(tmp_path / "run.part.h5"))
        assert not list(tmp_path.glob("*.html*"))
        fill(writer)


# In a browser.

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
#: Opens a page, given its file, the fragment of its address, and browser options.
Visit = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    paths = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not paths:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=paths[0], args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Open pages in the browser; fail if one logs a message, raises an error or requests anything but itself."""
    opened: list[Page] = []
    problems: list[str] = []

    def visit(page: Path, address: str = "", **options: Any) -> Page:
        tab = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        opened.append(tab)
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        own = (page.as_uri(), "blob:null/")
        tab.on("request", lambda request: None if request.url.startswith(own) else problems.append(request.url))
        tab.goto(page.as_uri() + address)
        tab.wait_for_selector("html[data-ready]")
        wait_for_frame(tab)
        return tab

    yield visit
    for page in opened:
        page.close()
    assert problems == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def result() -> Result:
    return make_result()


@pytest.fixture(scope="module")
def single(folder: Path, result: Result) -> Path:
    """A page of one image."""
    return report.write([result], folder / "single.html")


@pytest.fixture(scope="module")
def other() -> Result:
    """A result with more steps than `result`, other time-steps, and an image of another size."""
    return random_result("a blue square on it", 9, (20, 12), timesteps=np.arange(9)[::-1] * 8)


@pytest.fixture(scope="module")
def double(folder: Path, result: Result, other: Result) -> Path:
    return report.write([result, other], folder / "double.html")


def wait_for_frame(page: Page) -> None:
    """Wait until pending updates are drawn."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def pane(page: Page, name: str, place: int = 0) -> Locator:
    """A part of the pane of the first or second image."""
    return page.locator(".pane").nth(place).locator(f"[data-part={name}]")


def set_step(page: Page, step: int) -> None:
    """Select a step with the slider."""
    page.locator("#step").fill(str(step))
    wait_for_frame(page)


def pixels(canvas: Locator) -> np.ndarray:
    url = canvas.evaluate("(canvas) => canvas.toDataURL()")
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as picture:
        return np.asarray(picture.convert("RGB"))


def enlarged(image: np.ndarray) -> np.ndarray:
    """Enlarge by an integer factor to at least 384 pixels, as the page does."""
    times = -(-384 // max(image.shape[:2]))
    return image.repeat(times, 0).repeat(times, 1)


def expected_overlay(image: np.ndarray, saliency: np.ndarray, ends: tuple[float, float] | None = None) -> np.ndarray:
    """The overlay of a map on an image at canvas size, by SciPy; `ends` are the limits of the colour map."""
    low, high = ends or (saliency.min(), saliency.max())
    scaled = (saliency.astype(np.float64) - low) / (high - low)
    background = enlarged(image)
    centres = [(np.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(background.shape, scaled.shape, strict=False)]
    grid = np.meshgrid(*(np.clip(a, 0, m - 1) for a, m in zip(centres, scaled.shape, strict=True)), indexing="ij")
    return 255 * figures.overlay(background, map_coordinates(scaled, grid, order=1))


def assert_drawn(canvas: Locator, expected: np.ndarray) -> None:
    """Compare up to rounding of a pixel, or of the index of a colour; adjacent colours differ by up to 4 levels."""
    actual = pixels(canvas)
    assert actual.shape == expected.shape
    difference = abs(actual - expected)
    assert difference.max() < 3
    assert difference.mean() < 0.5


@pytest.mark.slow
def test_the_canvas_is_the_overlay_of_the_figures(visit: Visit, single: Path, result: Result) -> None:
    assert result.previews is not None
    page, rise = visit(single, "#step=2"), result.maps["rise"]
    canvas = pane(page, "canvas")
    assert_drawn(canvas, expected_overlay(result.previews[2], rise[2]))
    page.select_option("#range", "all")
    wait_for_frame(page)
    assert_drawn(canvas, expected_overlay(result.previews[2], rise[2], (rise.min(), rise.max())))
    page.select_option("#background", "image")
    wait_for_frame(page)
    assert_drawn(canvas, expected_overlay(result.image, rise[2], (rise.min(), rise.max())))
    page.select_option("#range", "step")
    page.uncheck("#smooth")
    wait_for_frame(page)
    cells = np.kron((rise[2] - rise[2].min()) / np.ptp(rise[2]), np.ones((128, 128)))
    assert_drawn(canvas, 255 * figures.overlay(enlarged(result.image), cells))
    page.locator("#opacity").fill("0")
    wait_for_frame(page)
    np.testing.assert_array_equal(pixels(canvas), enlarged(result.image))
    page.locator("#opacity").fill("100")
    wait_for_frame(page)
    alone = figures.overlay(np.zeros_like(enlarged(result.image)), cells) / 0.6
    assert_drawn(canvas, 255 * alone)


@pytest.mark.slow
def test_every_map_is_drawn(visit: Visit, single: Path, result: Result) -> None:
    assert result.previews is not None
    assert result.word_maps is not None
    page = visit(single, "#step=4")
    maps_by_name = {("cam", LAYER): result.maps["cam"][LAYER], ("cam", ""): result.maps["cam"][COMBINED]}
    maps_by_name |= {("attention", "red (2)"): result.word_maps[5], ("attention", "circle"): result.word_maps[2]}
    maps_by_name |= {("attention", ""): result.maps["attention"], ("relevance", ""): result.maps["relevance"]}
    for (method, name), maps in maps_by_name.items():
        pane(page, "method").select_option(method)
        if method in ("cam", "attention"):
            pane(page, "variant").select_option(name)
        label = (
            f"Heat map of {LABELS.get(method, method)}{f', {name}' if name else ''} at step 4, t = 10; highest at row"
        )
        expect(pane(page, "canvas")).to_have_attribute("aria-label", re.compile(re.escape(label)))
        expected = expected_overlay(result.previews[4], maps[4])
        if name:  # stored with 256 levels: one colour up or down
            assert abs(pixels(pane(page, "canvas")) - expected).max() < 6
        else:
            assert_drawn(pane(page, "canvas"), expected)
        assert pane(page, "variant").is_visible() == (method in ("cam", "attention"))


@pytest.mark.slow
def test_the_address_reflects_the_view(visit: Visit, single: Path) -> None:
    page = visit(single)
    pane(page, "method").select_option("cam")
    pane(page, "variant").select_option(LAYER)
    set_step(page, 3)
    page.wait_for_url(f"**#step=3&method=cam&map={LAYER}")
    pane(page, "method").select_option("rise")
    page.wait_for_url("**#step=3")


def cursor_position(page: Page, place: int = 0) -> float:
    """The position of the chart's cursor, from 0 at the first step to 1 at the last."""
    mark = pane(page, "chart", place).locator(".cursor")
    axis = pane(page, "chart", place).locator(".axis").first
    position, left, right = (
        float(element.get_attribute(x) or "nan") for element, x in ((mark, "x1"), (axis, "x1"), (axis, "x2"))
    )
    return (position - left) / (right - left)


def assert_step(page: Page, step: int, t: int) -> None:
    """Assert that everything synchronised with the slider shows this step of six."""
    wait_for_frame(page)
    text = f"step {step}, t = {t}"
    assert page.locator("#step-text").text_content() == text
    assert page.locator("#step").get_attribute("aria-valuetext") == text
    assert page.locator("#step").input_value() == str(step)
    assert text in (pane(page, "canvas").get_attribute("aria-label") or "")
    assert f"at step {step}: " in (pane(page, "chart").get_attribute("aria-label") or "")
    assert cursor_position(page) == pytest.approx(step / 5, abs=0.002)
    assert pane(page, "strip").locator("canvas").nth(step).get_attribute("class") == "current"
    assert pane(page, "strip").locator(".current").count() == 1


@pytest.mark.slow
def test_the_slider_selects_the_step(visit: Visit, single: Path) -> None:
    page = visit(single)
    assert_step(page, START, 50 - 10 * START)
    box = page.locator("#step").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 8, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 8 + 0.6 * (box["width"] - 16), box["y"] + box["height"] / 2, steps=5)
    assert_step(page, 3, 20)
    page.mouse.up()
    for key, step in (("ArrowRight", 4), ("End", 5), ("ArrowRight", 5), ("ArrowLeft", 4), ("Home", 0)):
        page.locator("#step").press(key)
        assert_step(page, step, 50 - 10 * step)
    page.wait_for_url("**#step=0")


@pytest.mark.slow
def test_the_chart_and_the_strip_select_the_step(visit: Visit, single: Path) -> None:
    page = visit(single)
    axis = pane(page, "chart").locator(".axis").last.bounding_box()
    assert axis is not None
    positions = [axis["x"] + axis["width"] * step / 5 for step in range(6)]
    page.mouse.click(positions[3] + 9, axis["y"] + 60)
    assert_step(page, 3, 20)
    page.mouse.move(positions[1], axis["y"] + 60)
    assert_step(page, 3, 20)
    page.mouse.down()
    page.mouse.move(positions[1] - 9, axis["y"] + 90, steps=4)
    assert_step(page, 1, 40)
    page.mouse.move(positions[5] + 300, axis["y"] + 60, steps=4)
    assert_step(page, 5, 0)
    page.mouse.up()
    pane(page, "strip").locator("canvas").nth(2).click()
    assert_step(page, 2, 30)
    page.wait_for_url("**#step=2")


@pytest.mark.soak
def test_keys_select_the_step_unless_a_control_handles_them(visit: Visit, single: Path) -> None:
    page = visit(single, "#step=2")
    for key, step in (("ArrowRight", 3), ("ArrowLeft", 2), ("Home", 0), ("ArrowLeft", 0), ("End", 5)):
        page.keyboard.press(key)
        assert_step(page, step, 50 - 10 * step)
        assert page.locator("#announcement").text_content() == f"step {step}, t = {50 - 10 * step}"
    page.keyboard.press("Control+Home")
    assert_step(page, 5, 0)
    pane(page, "table").locator("summary").click()
    for selector in ("[data-part=method]", ".scroll >> nth=0", "#theme"):
        page.locator(selector).focus()
        page.keyboard.press("Home")
    assert_step(page, 5, 0)
    page.locator("body").click(position={"x": 2, "y": 2})
    page.keyboard.press("Space")
    expect(page.locator("#play")).to_have_text("Stop")
    expect(page.locator("#step-text")).to_have_text("step 2, t = 30")  # the last step is followed by the first
    page.locator("#play").click()
    expect(page.locator("#play")).to_have_text("Play")
    stopped = page.locator("#step").input_value()
    page.wait_for_timeout(450)
    assert page.locator("#step").input_value() == stopped


def point_at(page: Page, row: int, column: int, place: int = 0, shape: tuple[int, int] = (2, 3)) -> None:
    box = pane(page, "canvas", place).bounding_box()
    assert box is not None
    x, y = ((at + 0.7) / count for at, count in ((column, shape[1]), (row, shape[0])))
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])


def displayed_value(page: Page, place: int = 0) -> tuple[str, list[float]]:
    """The displayed position of the pointer and the numbers there: the value and its standard error, if any."""
    text = pane(page, "value", place).text_content() or ""
    position, _, numbers = text.partition(": ")
    return position, [float(number) for number in numbers.split(" ± ")]


def rounded(number: float) -> float:
    return float(f"{number:.3g}")


@pytest.mark.slow
def test_a_non_finite_error_at_one_pixel_does_not_hide_the_others(visit: Visit, tmp_path: Path, result: Result) -> None:
    errors = result.errors["rise"].copy()
    errors[:, 0, 0] = np.inf
    path = report.write([dataclasses.replace(result, errors={"rise": errors})], tmp_path / "page.html")
    page = visit(path, "#step=0")
    for (row, column), error in (((0, 0), []), ((1, 2), [rounded(errors[0, 1, 2])])):
        point_at(page, row, column)
        assert displayed_value(page)[1] == [rounded(result.maps["rise"][0, row, column]), *error]


@pytest.mark.slow
def test_the_bare_image_stands_beside_the_map(visit: Visit, single: Path, result: Result) -> None:
    page = visit(single, "#step=2")
    assert result.previews is not None
    np.testing.assert_array_equal(pixels(pane(page, "bare")), enlarged(result.previews[2]))
    expect(pane(page, "bare-name")).to_have_text("image predicted at this step")
    page.locator("#background").select_option("image")
    expect(pane(page, "bare-name")).to_have_text("image")
    np.testing.assert_array_equal(pixels(pane(page, "bare")), enlarged(result.image))


@pytest.mark.slow
def test_the_page_says_what_is_hot_and_whether_maps_share_a_range(visit: Visit, single: Path, result: Result) -> None:
    page = visit(single)
    expect(pane(page, "hot")).to_have_text(f"Each step's map has its own range. Hot: {result.hot('rise')}")
    page.locator("#range").select_option("all")
    expect(pane(page, "hot")).to_have_text(f"All steps' maps share one range. Hot: {result.hot('rise')}")
    pane(page, "method").select_option("cam")
    expect(pane(page, "hot")).to_have_text(f"All steps' maps share one range. Hot: {result.hot('cam')}")


@pytest.mark.slow
def test_a_map_that_is_the_same_everywhere_is_grey_and_says_so(visit: Visit, tmp_path: Path, result: Result) -> None:
    layers = {name: maps.copy() for name, maps in result.maps["cam"].items()}
    layers[LAYER][4] = 0
    blank = dataclasses.replace(result, maps=result.maps | {"cam": layers}, hots={})
    page = visit(report.write([blank], tmp_path / "page.html"), f"#step=4&method=cam&map={LAYER}")
    expect(pane(page, "blank")).to_be_visible()
    expect(pane(page, "blank")).to_have_text("nothing here")
    expect(pane(page, "scale")).to_be_hidden()
    expect(pane(page, "hot")).to_have_text("Each step's map has its own range.")
    assert blank.previews is not None
    grey = enlarged(blank.previews[4]) @ np.array([0.299, 0.587, 0.114])
    assert np.abs(pixels(pane(page, "canvas")) - grey[..., None]).max() <= 1
    set_step(page, 3)
    expect(pane(page, "blank")).to_be_hidden()


@pytest.mark.soak
def test_the_value_under_the_pointer(visit: Visit, single: Path, result: Result) -> None:
    page, rise, error = visit(single, "#step=3"), result.maps["rise"], result.errors["rise"]
    for row, column in np.ndindex(2, 3):
        point_at(page, row, column)
        position, (number, displayed_error) = displayed_value(page)
        assert position == f"row {row}, column {column} of 2×3"
        assert number == rounded(rise[3, row, column])
        assert displayed_error == rounded(error[3, row, column])
        cell, canvas = (pane(page, name).bounding_box() for name in ("cell", "canvas"))
        assert cell is not None
        assert canvas is not None
        assert cell["x"] - canvas["x"] == pytest.approx(column * canvas["width"] / 3, abs=1)
        assert cell["y"] - canvas["y"] == pytest.approx(row * canvas["height"] / 2, abs=1)
        assert (cell["width"], cell["height"]) == pytest.approx((canvas["width"] / 3, canvas["height"] / 2), abs=1)
    page.select_option("#values", "normalised")
    point_at(page, 1, 2)
    share = (rise[3] - rise[3].min()) / np.ptp(rise[3])
    wait_for_frame(page)
    assert displayed_value(page)[1][0] == rounded(share[1, 2])
    assert displayed_value(page)[1][1] == rounded(error[3, 1, 2] / np.ptp(rise[3]))
    assert [pane(page, end).text_content() for end in ("low", "high")] == ["0", "1"]
    page.select_option("#range", "all")
    page.select_option("#values", "raw")
    wait_for_frame(page)
    ends = [float(pane(page, end).text_content() or "nan") for end in ("low", "high")]
    assert ends == [rounded(rise.min()), rounded(rise.max())]
    set_step(page, 0)
    point_at(page, 1, 2)
    assert displayed_value(page)[1][0] == rounded(rise[0, 1, 2])
    page.mouse.move(5, 5)
    assert pane(page, "cell").is_hidden()
    assert pane(page, "value").text_content() == "Point at the map to read its values."
    pane(page, "method").select_option("cam")
    pane(page, "variant").select_option(LAYER)
    expect(pane(page, "canvas")).to_have_attribute("aria-label", re.compile(LAYER))
    point_at(page, 31, 5, shape=(32, 32))
    position, (number,) = displayed_value(page)
    assert position == "row 31, column 5 of 32×32"
    layer = result.maps["cam"][LAYER][0]
    assert number == pytest.approx(layer[31, 5], abs=float(np.ptp(layer)) / 250)


@pytest.mark.slow
def test_arrow_keys_announce_the_cells_of_the_canvas(visit: Visit, single: Path, result: Result) -> None:
    page, saliency = visit(single, "#step=1"), result.maps["rise"][1]
    pane(page, "canvas").focus()
    keys = ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowLeft")
    for key, (row, column) in zip(keys, ((1, 1), (1, 2), (1, 2), (0, 2), (0, 1)), strict=True):
        page.keyboard.press(key)
        announcement = page.locator("#announcement").text_content() or ""
        assert announcement.startswith(f"row {row}, column {column} of 2×3: {rounded(saliency[row, column]):g} ± ")
        assert announcement == pane(page, "value").text_content()
        assert pane(page, "cell").is_visible()
    assert page.locator("#step").input_value() == "1"
    page.keyboard.press("Escape")
    assert pane(page, "cell").is_hidden()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Tab")
    assert pane(page, "cell").is_hidden()


@pytest.mark.slow
def test_the_gallery_shows_maps_and_selects_one(visit: Visit, single: Path, result: Result) -> None:
    assert result.previews is not None
    page = visit(single, "#step=1&method=cam")
    pane(page, "gallery-name").click()
    buttons = pane(page, "thumbnails").get_by_role("button")
    expect(buttons).to_have_count(len(result.maps["cam"]))
    index = list(result.maps["cam"]).index(LAYER)
    before = pixels(buttons.nth(index).locator("canvas"))
    buttons.nth(index).press("Enter")
    expect(pane(page, "canvas")).to_have_attribute("aria-label", re.compile(LAYER))
    expect(buttons.nth(index)).to_have_attribute("aria-pressed", "true")
    assert pane(page, "thumbnails").locator("[aria-pressed=true]").count() == 1
    assert buttons.nth(index).evaluate("(one) => document.activeElement === one")
    assert pane(page, "variant").input_value() == LAYER
    set_step(page, 2)
    wait_for_frame(page)
    assert (pixels(buttons.nth(index).locator("canvas")) != before).any()
    pane(page, "method").select_option("attention")
    expect(buttons).to_have_text(["all words", "a", "red", "circle", "and", "a (2)", "red (2)", "square"])
    pane(page, "method").select_option("rise")
    expect(pane(page, "gallery")).to_be_hidden()


def chart_lines(page: Page) -> dict[str, np.ndarray]:
    """The points of each word's line: the step from 0 to 1, and the height from 0 (bottom) to 1 (top)."""
    axes = pane(page, "chart").locator(".axis")
    left, right = (float(axes.first.get_attribute(x) or "nan") for x in ("x1", "x2"))
    bottom, top = (float(axes.nth(place).get_attribute("y1") or "nan") for place in (0, 2))
    lines = {}
    for line in pane(page, "chart").locator("path").all():
        points = re.findall(r"([\d.-]+),([\d.-]+)", line.get_attribute("d") or "")
        places = np.array(points, dtype=float) - (left, bottom)
        lines[line.text_content() or ""] = places / (right - left, top - bottom)
    return lines


@pytest.mark.slow
def test_lines_are_drawn_and_described(visit: Visit, single: Path, result: Result) -> None:
    page = visit(single, "#step=1")
    words = ["a", "red", "circle", "and", "square"]
    shares = figures.concept_lines(result, words)
    assert list(chart_lines(page)) == ["red", "circle", "square"]
    pane(page, "words").get_by_role("checkbox", name="and").check()
    pane(page, "words").get_by_role("checkbox", name="circle").uncheck()
    lines = chart_lines(page)
    assert list(lines) == ["red", "and", "square"]
    for word, points in lines.items():
        expected = [[step / 5, share] for step, share in enumerate(shares[word])]
        np.testing.assert_allclose(points, expected, atol=1e-3)
    descriptions = (
        pane(page, "words").locator("label").all_text_contents(),
        pane(page, "chart").get_attribute("aria-label"),
    )
    assert descriptions[0] == [f"{word} {rounded(shares[word][1]):g}" for word in words]
    assert f"at step 1: red {rounded(shares['red'][1]):g}, and " in (descriptions[1] or "")
    pane(page, "table").locator("summary").click()
    rows = pane(page, "numbers").locator("tr")
    expect(rows.first.locator("th")).to_have_text(["step", "t", *words])
    fourth = rows.nth(4).locator("th, td")
    assert fourth.all_text_contents() == ["3", "20", *(f"{rounded(shares[word][3]):g}" for word in words)]
    pane(page, "shares").uncheck()
    raw = {word: result.concept(word) for word in words}
    assert fourth.all_text_contents()[2:] == [f"{rounded(raw[word][3]):g}" for word in words]
    high = max(raw[word].max() for word in lines)
    for word, points in chart_lines(page).items():
        np.testing.assert_allclose(points[:, 1], raw[word] / high, atol=1e-3)


@pytest.mark.soak
def test_two_images_side_by_side(visit: Visit, double: Path, result: Result, other: Result) -> None:
    assert result.previews is not None
    assert other.previews is not None
    page = visit(double, "#step=1")
    assert page.locator(".pane").count() == 1
    page.check("#compare")
    expect(page.locator(".pane")).to_have_count(2)
    expect(pane(page, "canvas", 1)).to_have_attribute("aria-label", re.compile("step 1, t = 56"))
    assert pane(page, "item", 1).input_value() == "1"
    assert "“a blue square on it”" in (pane(page, "summary", 1).text_content() or "")
    assert_drawn(pane(page, "canvas", 0), expected_overlay(result.previews[1], result.maps["rise"][1]))
    assert_drawn(pane(page, "canvas", 1), expected_overlay(other.previews[1], other.maps["rise"][1]))
    page.wait_for_url("**#step=1&other-item=1")
    boxes = [box.bounding_box() for box in (pane(page, "canvas"), pane(page, "canvas", 1))]
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert boxes[0]["y"] == boxes[1]["y"]
    page.select_option("#follow", "t")
    wait_for_frame(page)
    for step, other_step in ((0, 2), (2, 4), (3, 5), (5, 8)):  # 50 → 48, 30 → 32, 20 → 24 rather than 16, 0 → 0
        set_step(page, step)
        assert f"step {other_step}, t = {64 - 8 * other_step};" in (
            pane(page, "canvas", 1).get_attribute("aria-label") or ""
        )
        assert cursor_position(page, 1) == pytest.approx(other_step / 8, abs=0.002)
    pane(page, "strip", 1).locator("canvas").nth(1).click()  # t = 56, next to 50
    wait_for_frame(page)
    assert page.locator("#step").input_value() == "0"
    page.select_option("#follow", "step")
    pane(page, "strip", 1).locator("canvas").nth(7).click()  # the first image has no step 7
    wait_for_frame(page)
    assert page.locator("#step").input_value() == "7"
    expect(page.locator("#step-text")).to_have_text("step 5, t = 0")
    point_at(page, 1, 0, place=1)
    for place, maps in enumerate((result.maps["rise"][5], other.maps["rise"][7])):
        assert displayed_value(page, place)[0] == "row 1, column 0 of 2×3"
        assert displayed_value(page, place)[1][0] == rounded(maps[1, 0])
        assert pane(page, "cell", place).is_visible()
    pane(page, "item", 0).select_option("1")
    expect(page.locator("#step-text")).to_have_text("step 7, t = 8")
    pane(page, "item", 0).select_option("0")
    expect(page.locator("#step-text")).to_have_text("step 5, t = 0")
    page.uncheck("#compare")
    expect(page.locator(".pane")).to_have_count(1)


ADDRESSES = {
    "": (OPENS_AT, "DF-RISE"),
    "#step=3": ("step 3, t = 20", "DF-RISE"),
    f"#step=2&method=cam&map={LAYER}": ("step 2, t = 30", f"DF-CAM, {LAYER}"),
    "#step=2&item=1&method=attention&map=square": ("step 2, t = 48", "attention, square"),
    "#step=0": ("step 0, t = 50", "DF-RISE"),
    "#step=-3": ("step 0, t = 50", "DF-RISE"),
    "#step=999": ("step 5, t = 0", "DF-RISE"),
    "#step=1e999&follow=x": ("step 5, t = 0", "DF-RISE"),
    "#step=x&method=unknown&map=unknown": (OPENS_AT, "DF-RISE"),
    "#step=1&method=cam&map=unknown": ("step 1, t = 40", "DF-CAM"),
    "#item=7&other-item=9&other-method=<b>": (OPENS_AT, "DF-RISE"),
    "#%E0%A4%A&&==&step": ("step 0, t = 50", "DF-RISE"),
}


def assert_view(page: Page, text: str, title: str) -> None:
    expect(page.locator("#step-text")).to_have_text(text)
    label = re.compile(re.escape(f"Heat map of {title} at {text}"))
    expect(pane(page, "canvas")).to_have_attribute("aria-label", label)


@pytest.mark.soak
def test_an_address_restores_the_view_and_invalid_parts_are_ignored(visit: Visit, double: Path) -> None:
    page = visit(double)
    for address, view in ADDRESSES.items():
        page.goto("about:blank")
        page.goto(double.as_uri() + address)
        assert_view(page, *view)
    for address in list(ADDRESSES)[1:7]:
        page.evaluate("(address) => { location.hash = address; }", address)
        assert_view(page, *ADDRESSES[address])
    page.evaluate("location.hash = '#step=1&item=0&other-item=1&follow=t'")
    expect(page.locator(".pane")).to_have_count(2)
    assert_view(page, "step 1, t = 40", "DF-RISE")
    expect(pane(page, "canvas", 1)).to_have_attribute("aria-label", re.compile("step 3, t = 40"))


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A small run of the embedded model."""
    explainers = [Rise(num_masks=8), Cam(), Relevance(), Attention()]
    engine = Engine.from_pretrained("shapes", device="cpu", batch_size=8)
    engine.explain(CAPTION, explainers, num_steps=4, out=folder / "run.h5")
    return folder / "run.h5"


def run_python_of_page(page: Page, result: Result | None = None) -> Any:
    """Run the Python code displayed by a page and return its last value."""
    *lines, last = (pane(page, "python").text_content() or "").splitlines()
    namespace = {"dfengine": dfengine, "result": result}
    exec("\n".join(lines), namespace)
    return eval(last, namespace)


#: The method and the map for each label of the canvas.
TITLES = {
    "DF-RISE": ("rise", ""),
    "relevance": ("relevance", ""),
    "DF-CAM": ("cam", ""),
    "DF-CAM, mid_block.resnets.1": ("cam", "mid_block.resnets.1"),
    "attention, circle": ("attention", "circle"),
    "attention, a (2)": ("attention", "a (2)"),
}


@pytest.mark.soak
def test_the_python_code_returns_the_displayed_map(
    visit: Visit, run: Path, run_report: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    run_report(str(run))
    page = run.with_suffix(".html")
    tab = visit(page, "#step=2")
    for title, (method, name) in TITLES.items():
        pane(tab, "method").select_option(method)
        if name:
            pane(tab, "variant").select_option(name)
        expect(pane(tab, "canvas")).to_have_attribute("aria-label", re.compile(rf"^Heat map of {re.escape(title)} at"))
        expected = heatmap(variants(page, method)[name][2].astype(np.float32), (64, 64))
        np.testing.assert_allclose(run_python_of_page(tab), expected, atol=(1 / 255 if name else 1e-6))


@pytest.mark.slow
def test_a_run_is_shown_with_its_settings_and_versions(
    visit: Visit, run: Path, run_report: Callable[..., tuple[str, str]]
) -> None:
    run_report(str(run), "-o", str(run.with_name("settings.html")))
    page = visit(run.with_name("settings.html"), "#step=3&method=cam")
    pane(page, "facts").locator("xpath=../summary").click()
    facts = dict(row.locator("th, td").all_inner_texts() for row in pane(page, "facts").locator("tr").all())
    with dfengine.open(run) as opened:
        (item,) = opened
        assert_drawn(pane(page, "canvas"), expected_overlay(item.previews[3], item.maps["cam"][COMBINED][3]))
        assert facts["time-steps"] == ", ".join(map(str, item.timesteps))
        assert facts["rise"].startswith("Rise(num_masks=8, ")
        assert (facts["prompt"], facts["guidance"], facts["seed"]) == (CAPTION, "2.0", "0")
        assert {name: facts[name] for name in opened.environment} == opened.environment


@pytest.mark.slow
def test_the_python_code_of_a_result_in_memory(visit: Visit, single: Path, result: Result) -> None:
    page = visit(single, "#step=1&method=attention&map=red+(2)")
    assert result.word_maps is not None
    np.testing.assert_array_equal(run_python_of_page(page, result), heatmap(result.word_maps[5][1], (8, 12)))


@pytest.mark.slow
def test_a_word_with_the_name_of_a_method(visit: Visit, tmp_path: Path) -> None:
    result = random_result("cam and rise")
    assert result.word_maps is not None
    page = visit(report.write([result], tmp_path / "page.html"), "#step=1&method=attention&map=rise")
    np.testing.assert_array_equal(run_python_of_page(page, result), heatmap(result.word_maps[2][1], (8, 12)))


FOCUSABLE = """[...document.querySelectorAll("button, input, select, summary, a, [tabindex='0']")]
  .filter((one) => one.checkVisibility() && !one.disabled)"""
FOCUSED = """() => {
  const one = document.activeElement, box = one.getBoundingClientRect(), bar = document.getElementById("controls");
  const style = getComputedStyle(one);
  return {
    place: all.indexOf(one),
    outline: style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth),
    covered: !bar.contains(one) && bar.getBoundingClientRect().top === 0 && box.height < 500
      && box.bottom > 0 && box.top < bar.getBoundingClientRect().bottom - 1,
    away: box.bottom < 0 || box.top > innerHeight,
  };
}"""


@pytest.mark.soak
def test_tab_reaches_every_control_in_order_with_visible_focus(visit: Visit, double: Path) -> None:
    page = visit(double, "#method=cam&other-item=1")
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    expect(pane(page, "thumbnails").get_by_role("button")).not_to_have_count(0)
    count = page.evaluate(f"window.all = {FOCUSABLE}; all.length")
    assert count > 50
    for key, order in (("Tab", range(count)), ("Shift+Tab", range(count - 2, -1, -1))):
        for place in order:
            page.keyboard.press(key)
            focus = page.evaluate(FOCUSED)
            assert focus["outline"] >= 1, (key, focus)
            assert {**focus, "outline": 0} == {"place": place, "outline": 0, "covered": False, "away": False}


#: Roles that a screen reader can act on or stop at.
INTERACTIVE_ROLES = {"button", "slider", "combobox", "checkbox", "application", "image", "DisclosureTriangle", "region"}


@pytest.mark.slow
def test_every_control_has_an_accessible_name(visit: Visit, double: Path) -> None:
    page = visit(double, "#method=cam&other-item=1")
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    expect(pane(page, "thumbnails").get_by_role("button")).not_to_have_count(0)
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    elements = [(node["role"]["value"], node["name"]["value"]) for node in nodes if not node["ignored"]]
    interactive = [(role, name) for role, name in elements if role in INTERACTIVE_ROLES]
    assert {"button", "slider", "combobox", "checkbox", "application"} <= {role for role, _ in interactive}
    assert [role for role, name in interactive if not name.strip()] == []
    assert {name for role, name in interactive if role == "combobox"} >= {
        "Image",
        "Method",
        "Map of",
        "Background",
        "Values",
    }
    assert {("slider", "Step"), ("region", "first image"), ("region", "second image")} <= set(interactive)
    assert page.locator("#announcement").get_attribute("aria-live") == "polite"


#: The contrast of texts and control borders against their background, relative to the required contrast.
CONTRAST = r"""() => {
  const parsed = (colour) => (colour.match(/[\d.]+/g) ?? []).map(Number);
  const linear = (c) => (c <= 10 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) + 0.05;
  const between = (a, b) => Math.max(light(parsed(a)) / light(b), light(b) / light(parsed(a)));
  const behind = (one) => {
    for (let at = one; at; at = at.parentElement) {
      const colour = parsed(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
  };
  const found = [];
  for (const one of document.querySelectorAll("body *:not(option, optgroup, canvas, noscript, script, template)")) {
    const style = getComputedStyle(one), name = one.className || one.tagName;
    if (!one.checkVisibility() || style.visibility === "hidden") continue;
    const says = one.matches("select") || [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (says) found.push([name, between(one instanceof SVGElement ? style.fill : style.color, behind(one)) / 4.5]);
    if (one.matches("button, select")) found.push([name, between(style.borderTopColor, behind(one.parentElement)) / 3]);
  }
  return found;
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_sufficient_on_light_and_dark_pages(visit: Visit, double: Path, scheme: str) -> None:
    page = visit(double, "#method=cam&other-item=1", color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    expect(pane(page, "thumbnails").get_by_role("button")).not_to_have_count(0)
    backgrounds = []
    for current in (scheme, "dark" if scheme == "light" else "light"):
        contrasts = page.evaluate(CONTRAST)
        assert len(contrasts) > 100
        assert [(name, share) for name, share in contrasts if share < 1] == []
        backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert (sum(map(int, re.findall(r"\d+", backgrounds[-1]))) > 384) == (current == "light")
        expect(page.locator("#theme")).to_have_text("Dark theme" if current == "light" else "Light theme")
        page.locator("#theme").click()


def rise_result(*shape: int, displayed_value: float | None = None) -> Result:
    """A result with DF-RISE maps only, constant or random."""
    maps = np.random.default_rng(0).random(shape).astype(np.float32)
    return make_result(
        shape[0], maps={"rise": maps if displayed_value is None else np.full_like(maps, displayed_value)}, errors={}
    )


UNUSUAL: dict[str, Callable[[], list[Result]]] = {
    "a long prompt and 100 steps": lambda: [random_result(", ".join([LONG] * 6), 100, (20, 12))],
    "one step": lambda: [make_result(1)],
    "two steps": lambda: [make_result(2)],
    "no relevance, no previews": lambda: [make_result(5, **rise_only())],
    "no maps": lambda: [random_result("", 5, **rise_only(maps={}, settings={}))],
    "not computed": lambda: [interrupted(make_result())],
    "nothing computed": lambda: [rise_result(2, 2, 3, displayed_value=np.nan)],
    "constant": lambda: [rise_result(3, 2, 3, displayed_value=1)],
    "large maps": lambda: [rise_result(2, 400, 400)],
    "portrait": lambda: [make_result(3, (600, 200))],
    "landscape": lambda: [make_result(3, (200, 600))],
    "eight images": lambda: [random_result(f"a red circle {n}", 3 + n) for n in range(8)],
}


#: Each is unusual in a different part of the page.
IN_EVERY_RUN = ("one step", "not computed", "portrait", "eight images")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name if name in IN_EVERY_RUN else soak(name) for name in UNUSUAL])
def test_unusual_results_are_displayed(visit: Visit, tmp_path: Path, name: str) -> None:
    results = UNUSUAL[name]()
    page = visit(report.write(results, tmp_path / "page.html"), "#step=1", viewport={"width": 480, "height": 900})
    steps = len(results[0].timesteps)
    for viewport_width in (480, 1280):
        page.set_viewport_size({"width": viewport_width, "height": 900})
        page.check("#compare")
        expect(page.locator(".pane")).to_have_count(2)
        for step in sorted({0, 1, steps - 1} & set(range(steps))):
            set_step(page, step)
            assert page.locator("#step-text").text_content() == f"step {step}, t = {results[0].timesteps[step]}"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        box = pane(page, "canvas").bounding_box()
        assert box is not None
        assert box["height"] <= 0.9 * 900
        height, width, _ = results[0].image.shape
        assert box["width"] / box["height"] == pytest.approx(width / height, rel=0.02)
        page.uncheck("#compare")
    assert len(page.locator("[data-part=item] option").all()) == len(results)


@pytest.mark.slow
def test_missing_steps_are_reported(visit: Visit, tmp_path: Path, result: Result) -> None:
    assert result.previews is not None
    page = visit(report.write([interrupted(result)], tmp_path / "page.html"), "#step=1")
    assert_drawn(pane(page, "canvas"), expected_overlay(result.previews[1], result.maps["rise"][1]))
    assert chart_lines(page)["red"][-1][0] == pytest.approx(0.2, abs=0.01)
    set_step(page, 2)
    np.testing.assert_array_equal(pixels(pane(page, "canvas")), enlarged(result.previews[2]))
    assert pane(page, "value").text_content() == "The map of this step is not computed."
    assert pane(page, "scale").evaluate("(one) => getComputedStyle(one).visibility") == "hidden"
    assert "No map is computed at step 2, t = 30" in (pane(page, "canvas").get_attribute("aria-label") or "")
    assert "at step 2: red not computed" in (pane(page, "chart").get_attribute("aria-label") or "")
    assert pane(page, "words").locator("label").first.text_content() == "a –"
    point_at(page, 0, 0)
    assert pane(page, "value").text_content() == "row 0, column 0 of 2×3: not computed"


@pytest.mark.slow
def test_an_isolated_step_is_marked_in_the_chart(visit: Visit, tmp_path: Path) -> None:
    result = make_result(4)
    assert result.relevance is not None
    result.relevance[:, [1, 3]] = np.nan
    page = visit(report.write([result], tmp_path / "page.html"))
    paths = pane(page, "chart").locator("path")
    for path in paths.all():
        shape = path.get_attribute("d") or ""
        assert (shape.count("M"), shape.count("h12"), shape.count("L")) == (2, 2, 0)
    pane(page, "table").locator("summary").click()
    expect(pane(page, "numbers").locator("tr").nth(2).locator("th, td")).to_have_text(["1", "20", *["–"] * 5])


@pytest.mark.slow
def test_previews_are_offered_only_if_available(visit: Visit, tmp_path: Path) -> None:
    result = make_result(5, **rise_only())
    page = visit(report.write([result], tmp_path / "page.html"))
    assert page.locator("#background").input_value() == "image"
    assert page.locator("#background option").first.is_disabled()
    assert_drawn(pane(page, "canvas"), expected_overlay(result.image, result.maps["rise"][0]))
    assert pane(page, "curves").is_hidden()
    assert pane(page, "table").is_hidden()


@pytest.mark.slow
def test_the_layout_is_the_same_at_every_step(visit: Visit, double: Path) -> None:
    page = visit(double, "#method=cam&other-item=1")
    script = """[...document.querySelectorAll("#controls *, canvas, .bar, svg, summary, .words label, select")]
      .filter((one) => one.checkVisibility() && !one.closest(".strip"))
      .map((one) => [one, one.getBoundingClientRect()])
      .map(([one, box]) => `${one.tagName} ${one.id} ${box.x} ${box.y} ${box.height}`)"""
    layouts = []
    for step in range(6):
        set_step(page, step)
        layouts.append(page.evaluate(script))
    for layout in layouts[1:]:
        assert layout == layouts[0]


@pytest.mark.soak
def test_actions_before_images_are_decoded_are_no_error(visit: Visit, double: Path, browser: Browser) -> None:
    page = visit(double)
    page.evaluate("""() => {
      document.getElementById("compare").click();
      document.getElementById("step").value = 2;
      document.getElementById("step").oninput();
    }""")
    expect(pane(page, "canvas", 1)).to_have_attribute("aria-label", re.compile("step 2, t = 48"))
    tab = browser.new_page()
    tab.add_init_script("""
      const decode = HTMLImageElement.prototype.decode;
      HTMLImageElement.prototype.decode = async function () {
        document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
        document.getElementById("opacity").oninput();
        await new Promise((done) => setTimeout(done, 100));
        return decode.call(this);
      };
    """)
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(double.as_uri())
    tab.wait_for_selector("html[data-ready]")
    tab.close()
    assert errors == []


@pytest.mark.slow
def test_a_page_in_a_srcdoc_frame(visit: Visit, single: Path) -> None:
    page = visit(single)
    page.evaluate(
        """(text) => {
      const frame = Object.assign(document.createElement("iframe"), { srcdoc: text });
      document.body.append(frame);
    }""",
        single.read_text(encoding="utf-8"),
    )
    inner = page.frame_locator("iframe")
    inner.locator("#step").fill("3")
    expect(inner.locator("#step-text")).to_have_text("step 3, t = 20")
    page.wait_for_timeout(500)


@pytest.mark.soak
def test_address_updates_are_rate_limited(visit: Visit, single: Path) -> None:
    page = visit(single)
    count = page.evaluate("""async () => {
      let count = 0;
      const replace = history.replaceState.bind(history);
      history.replaceState = (...what) => { count += 1; replace(...what); };
      const slider = document.getElementById("step"), start = performance.now();
      for (let n = 0; performance.now() - start < 900; n++) {
        slider.value = n % 6;
        slider.oninput();
        await new Promise(requestAnimationFrame);
      }
      return count;
    }""")
    assert 1 <= count <= 3


def large_result() -> Result:
    """A result of the size of Stable Diffusion with all layers: 30 steps, 44 layers, 512 × 512 pixels."""
    random = np.random.default_rng(0)

    def maps(*shape: int) -> np.ndarray:
        return random.random(size=shape, dtype=np.float32)

    rough = random.integers(256, size=(30, 24, 24, 3), dtype=np.uint8)
    previews = np.stack([np.asarray(Image.fromarray(image).resize((512, 512))) for image in rough])
    sides = [64] * 11 + [32] * 12 + [16] * 12 + [8] * 9
    layers = {f"down_blocks.{n // 4}.resnets.{n % 4}": maps(30, side, side) for n, side in enumerate(sides)}
    methods = {"rise": maps(30, 64, 64), "cam": {COMBINED: maps(30, 64, 64), **layers}}
    changes = {"latents": maps(30, 4, 64, 64), "epsilon": maps(30, 4, 64, 64), "word_maps": None, "words": ()}
    changes |= {"maps": methods, "errors": {"rise": maps(30, 64, 64)}}
    return random_result(LONG, 30, (512, 512), image=previews[-1], previews=previews, **changes)


@pytest.mark.soak
def test_large_pages_are_small_and_responsive(visit: Visit, tmp_path: Path) -> None:
    path = report.write([large_result()], tmp_path / "page.html")
    assert path.stat().st_size < 12e6
    page = visit(path, "#method=cam")
    assert page.evaluate("performance.now()") < 5000
    pane(page, "gallery-name").click()
    expect(pane(page, "thumbnails").get_by_role("button")).to_have_count(45)
    times = page.evaluate("""async () => {
      const slider = document.getElementById("step"), times = [];
      for (let step = 0; step < 30; step++) {
        const start = performance.now();
        slider.value = step;
        slider.oninput();
        await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
        times.push(performance.now() - start);
      }
      return times;
    }""")
    assert np.median(times) < 400
