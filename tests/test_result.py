"""Results: heat maps against SciPy and by hand; labels, forms, plots, HTML and xarray datasets."""

import base64
import dataclasses
import io
import json
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import xarray
from PIL import Image
from scipy.ndimage import map_coordinates
from store_example import PLAN, fill, trajectory

import dfengine
from dfengine import Attention, Cam, Relevance, Rise, figures, store
from dfengine.display import Result
from dfengine.explain import describe
from dfengine.result import COMBINED, as_call, heatmap, model_name
from dfengine.tokens import Tokens


def make_result(maps: np.ndarray) -> Result:
    steps = len(maps)
    return Result(
        prompt="a red circle",
        seed=0,
        model="shapes",
        image=np.zeros((8, 12, 3), np.uint8),
        timesteps=np.arange(steps)[::-1].copy(),
        signal=np.linspace(0.1, 0.9, steps, dtype=np.float32),
        noise=np.linspace(0.9, 0.1, steps, dtype=np.float32),
        latents=np.zeros((steps, 1, 2, 3), np.float32),
        epsilon=np.zeros((steps, 1, 2, 3), np.float32),
        maps={"rise": maps},
    )


def test_min_max_then_bilinear_with_half_pixel_centres() -> None:
    saliency = np.array([[3.0, 5.0, 4.0], [7.0, 3.5, 6.0]], np.float32)
    rows = np.clip((np.arange(8) + 0.5) / 4 - 0.5, 0, 1)
    columns = np.clip((np.arange(12) + 0.5) / 4 - 0.5, 0, 2)
    expected = map_coordinates((saliency - 3) / 4, np.meshgrid(rows, columns, indexing="ij"), order=1)
    np.testing.assert_allclose(heatmap(saliency, (8, 12)), expected, rtol=1e-5, atol=1e-6)


def test_a_constant_map_is_zeros() -> None:
    assert (heatmap(np.full((2, 3), 0.7, np.float32), (8, 12)) == 0).all()


def test_the_heat_map_of_a_step_has_the_size_of_the_image() -> None:
    maps = np.random.default_rng(0).normal(size=(3, 2, 3)).astype(np.float32)
    drawn_map = make_result(maps).heatmap("rise", step=-1)
    np.testing.assert_array_equal(drawn_map, heatmap(maps[2], (8, 12)))
    assert drawn_map.dtype == np.float32


def test_missing_methods_and_steps_are_named() -> None:
    maps = np.full((3, 2, 3), np.nan, np.float32)
    with pytest.raises(ValueError, match="no map 'cam': expected one of rise"):
        make_result(maps).heatmap("cam", 0)
    with pytest.raises(ValueError, match=r"step 3 is outside \[0, 2\]"):
        make_result(maps).heatmap("rise", 3)
    with pytest.raises(ValueError, match="step 1 of 'rise' is not computed yet"):
        make_result(maps).heatmap("rise", 1)


def complete_result() -> Result:
    """A result with every kind of map and random values: three steps, 4×6 latents, 8×12 images."""
    random = np.random.default_rng(0)

    def values(*shape: int) -> np.ndarray:
        return random.random(shape, np.float32)

    prompt = "a <b> & 'c'"
    return Result(
        prompt=prompt,
        seed=7,
        model="shapes",
        image=random.integers(256, size=(8, 12, 3), dtype=np.uint8),
        timesteps=np.array([900, 500, 100]),
        signal=values(3),
        noise=values(3),
        latents=values(3, 2, 4, 6),
        epsilon=values(3, 2, 4, 6),
        previews=random.integers(256, size=(3, 8, 12, 3), dtype=np.uint8),
        maps={
            "rise": values(3, 4, 6),
            "cam": {
                COMBINED: values(3, 4, 6),
                "down.0": values(3, 4, 6),
                "mid": values(3, 2, 3),
                "up.0": values(3, 4, 6),
            },
            "relevance": values(3, 4, 6),
            "attention": values(3, 4, 6),
        },
        errors={"rise": values(3, 4, 6)},
        scores={"rise": values(3, 5)},
        tokens=Tokens(prompt, ("<s>", "a", "b", "c", "</s>"), ((0, 0), (0, 1), (3, 4), (9, 10), (0, 0))),
        relevance=values(5, 3),
        words=("a", "b", "c"),
        word_maps=values(3, 3, 4, 6),
        settings={"rise": Rise(num_masks=5), "cam": Cam(), "relevance": Relevance(), "attention": Attention()},
        labels={"rise": "DF-RISE", "cam": "DF-CAM"},
        forms={"rise": "saliency", "cam": "layers", "relevance": "tokens", "attention": "words"},
    )


def test_labels_and_forms_come_from_the_explainers_or_the_maps() -> None:
    assert [complete_result().label(name) for name in ("rise", "attention")] == ["DF-RISE", "attention"]
    assert [complete_result().form(name) for name in complete_result().maps] == [
        "saliency",
        "layers",
        "tokens",
        "words",
    ]
    undeclared = dataclasses.replace(complete_result(), labels={}, forms={})
    assert [undeclared.label(name) for name in undeclared.maps] == ["rise", "cam", "relevance", "attention"]
    assert [undeclared.form(name) for name in undeclared.maps] == ["saliency", "layers", "saliency", "saliency"]


def test_equal_labels_are_extended_with_the_method_name() -> None:
    rise = complete_result().maps["rise"]
    labels = {"few": "DF-RISE", "many": "DF-RISE", "cam": "DF-CAM"}
    make_result = dataclasses.replace(
        complete_result(), maps=dict.fromkeys(labels, rise), labels=labels, forms={}, previews=None
    )
    assert [name.partition(",")[0] for name in pictures(make_result._repr_html_())][1::3] == [
        "DF-RISE (few)",
        "DF-RISE (many)",
        "DF-CAM",
    ]


def pictures(html: str) -> dict[str, np.ndarray]:
    """The pictures embedded in the text, by their alternative texts."""
    matches = re.findall(r'<img src="data:image/(?:png|jpeg);base64,([^"]+)"[^>]*? alt="([^"]+)"', html)
    return {name: np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data, name in matches}


def test_repr_is_one_line() -> None:
    expected = "Result(\"a <b> & 'c'\", seed 7, shapes: 3 steps; rise, cam (3 layers), relevance, attention)"
    assert repr(complete_result()) == expected
    long = dataclasses.replace(complete_result(), prompt="word " * 100, maps={})
    assert repr(long) == f"Result('{'word ' * 15}…', seed 7, shapes: 3 steps; no maps)"


def test_html_contains_the_image_previews_and_heat_maps() -> None:
    images, result = pictures(complete_result()._repr_html_()), complete_result()
    steps = ("step 0", "step 1", "step 2")
    rows = ("predicted x0", "DF-RISE", "DF-CAM", "relevance", "attention")
    names = [f"{row}, {step}" for row in rows for step in steps]
    assert list(images) == ["image", *names]
    np.testing.assert_array_equal(images["image"], result.image)
    np.testing.assert_array_equal(images["predicted x0, step 1"], result.previews[1])
    grey = (result.previews[2] / 255 @ [0.299, 0.587, 0.114])[..., None]
    colour = matplotlib.colormaps["inferno"](heatmap(result.maps["cam"][COMBINED][2], (8, 12)))[..., :3]
    np.testing.assert_allclose(images["DF-CAM, step 2"], (0.4 * grey + 0.6 * colour) * 255, atol=0.51)


def test_html_lists_prompt_model_sizes_and_settings() -> None:
    html = complete_result()._repr_html_()
    rows = dict(re.findall(r"<tr><th[^>]*>(.*?)</th><td[^>]*>(.*?)</td></tr>", html.partition("</table>")[0]))
    assert rows["prompt"] == "a &lt;b&gt; &amp; &#x27;c&#x27;"
    assert (rows["seed"], rows["model"], rows["steps"]) == ("7", "shapes", "3: t = 900 … 100")
    assert rows["size"] == "image 8×12, latent 2×4×6"
    assert rows["rise"].startswith("3 of 3 maps, 4×6; Rise(num_masks=5, output=&#x27;x0&#x27;, ")
    assert (
        rows["cam"]
        == "3 of 3 maps, 4×6, 3 layers; Cam(layers=(&#x27;*&#x27;,), target=&#x27;conditional&#x27;, loss_scale=256.0)"
    )
    assert "<b>" not in html
    assert not re.search(r"(?<!-)(color|background)\s*:", html)


def test_html_shows_five_of_the_computed_steps() -> None:
    maps = np.random.default_rng(0).random((12, 2, 3), np.float32)
    maps[9:] = np.nan
    html = make_result(maps)._repr_html_()
    assert list(pictures(html)) == ["image", *(f"rise, step {step}" for step in (0, 2, 4, 6, 8))]
    assert "9 of 12 maps" in html


def test_html_of_a_partial_result() -> None:
    maps = {"rise": np.full((3, 4, 6), np.nan, np.float32), "lime": complete_result().maps["rise"].copy()}
    maps["lime"][1:] = np.nan
    maps["lime"][0, 0, 0] = np.nan
    partial = dataclasses.replace(
        complete_result(), maps=maps, previews=None, settings={"lime": "a function"}
    )._repr_html_()
    assert list(pictures(partial)) == ["image", "lime, step 0"]
    assert partial.count("not computed") == 1
    without_maps = dataclasses.replace(complete_result(), maps={}, settings={})
    assert list(pictures(without_maps._repr_html_())) == [
        "image",
        *(f"predicted x0, step {step}" for step in (0, 1, 2)),
    ]
    assert list(pictures(dataclasses.replace(without_maps, previews=None)._repr_html_())) == ["image"]


@pytest.mark.slow
def test_html_shrinks_large_pictures_and_magnifies_small_ones() -> None:
    html = dataclasses.replace(complete_result(), image=np.zeros((600, 900, 3), np.uint8), previews=None)._repr_html_()
    assert {picture.shape for picture in pictures(html).values()} == {(128, 192, 3), (85, 128, 3)}
    assert "pixelated" not in html
    assert complete_result()._repr_html_().count('width="120" height="80"') == 15


def test_html_of_a_stored_item_shows_what_is_computed(tmp_path: Path) -> None:
    with store.Writer.create(tmp_path / "run.h5", PLAN) as writer:
        with dfengine.open(tmp_path / "run.part.h5") as run:
            assert "not generated yet" in run[0]._repr_html_()
            assert list(pictures(run[0]._repr_html_())) == []
        fill(writer)
    with dfengine.open(tmp_path / "run.h5") as run:
        assert repr(run) == f"Run('{tmp_path / 'run.h5'}': 2 items of shapes, 3 steps; rise, random)"
        item = run[1]
        assert repr(item) == f"Item('ein Würfel', seed {2**64 - 1}, shapes: 3 steps; rise, random)"
        html = item._repr_html_()
    assert "blurry" in html
    np.testing.assert_array_equal(pictures(html)["predicted x0, step 1"], trajectory(PLAN, 1)["previews"][1])
    assert repr(run).endswith("; rise, random, closed)")
    assert "not readable" in item._repr_html_()


def test_repr_of_a_run_folder(tmp_path: Path) -> None:
    with store.Folder(tmp_path / "run").segment("u0", PLAN) as writer:
        fill(writer)
    with dfengine.open(tmp_path / "run") as run:
        assert repr(run) == f"RunFolder('{tmp_path / 'run'}': 2 items, 2 finished)"
        assert len(pictures(run[0]._repr_html_())) == 1 + 3 * 3


def rendered(figure: matplotlib.figure.Figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "draw"),
    [
        ({}, lambda one: figures.strip(one, "rise")),
        ({"method": "rise", "steps": [0, 2]}, lambda one: figures.strip(one, "rise", [0, 2])),
        ({"method": "cam"}, figures.layers),
        ({"method": "cam", "layers": "mid"}, lambda one: figures.layers(one, names=["mid"])),
        ({"layers": ["mid"], "steps": [1]}, lambda one: figures.layers(one, "cam", [1], ["mid"])),
        ({"method": "relevance"}, figures.relevance),
        ({"concepts": ["c"]}, lambda one: figures.relevance(one, ["c"])),
        ({"method": "attention", "words": ["c"]}, lambda one: figures.attention(one, ["c"])),
        ({"method": "attention"}, figures.attention),
    ],
)
def test_plot_draws_the_figure_of_the_form(options, draw) -> None:
    plotted = np.asarray(Image.open(io.BytesIO(complete_result().plot(**options)._repr_png_())))
    np.testing.assert_array_equal(plotted, rendered(draw(complete_result())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lime"}, "there is no map 'lime': expected one of rise, cam"),
        ({"method": "rise", "words": ["c"]}, "the figure of 'rise' takes no words: layers are for"),
        ({"layers": ["mid"], "words": ["c"]}, "the figure of 'rise' takes no layers or words"),
        ({"words": ["d"]}, "no map of the word 'd'"),
        ({"steps": [3]}, "step 3 is outside"),
    ],
)
def test_invalid_plot_options_are_rejected(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        complete_result().plot(**options)


def test_a_result_without_maps_cannot_be_plotted() -> None:
    with pytest.raises(ValueError, match="there is no map '': expected one of none"):
        dataclasses.replace(complete_result(), maps={}).plot()


@pytest.mark.slow
def test_to_xarray_has_every_array_by_name(tmp_path: Path) -> None:
    result, dataset = complete_result(), complete_result().to_xarray()
    np.testing.assert_array_equal(dataset.saliency.sel({"method": "cam"}).isel(step=1), result.maps["cam"][COMBINED][1])
    np.testing.assert_array_equal(dataset.error.sel({"method": "rise"}), result.errors["rise"])
    assert np.isnan(dataset.error.sel({"method": "attention"})).all()
    np.testing.assert_array_equal(dataset.score.sel({"method": "rise"}), result.scores["rise"])
    np.testing.assert_array_equal(dataset.relevance.sel(token="b"), result.relevance[2])
    np.testing.assert_array_equal(dataset.heat.sel(word="c"), result.word_maps[2])
    np.testing.assert_array_equal(dataset.cam_4x6.sel({"layer_4x6": "up.0"}), result.maps["cam"]["up.0"])
    np.testing.assert_array_equal(dataset.cam_2x3.sel({"layer_2x3": "mid"}), result.maps["cam"]["mid"])
    assert dataset.cam_2x3.dims == ("layer_2x3", "step", "u_2x3", "v_2x3")
    np.testing.assert_array_equal(dataset.preview.isel(step=2), result.previews[2])
    np.testing.assert_array_equal(dataset.latent, result.latents)
    np.testing.assert_array_equal(dataset.epsilon, result.epsilon)
    assert dataset.epsilon.dims == ("step", "channel", "y", "x")
    assert (dataset.attrs["prompt"], dataset.attrs["seed"], dataset.attrs["model"]) == (result.prompt, 7, "shapes")
    settings = json.loads(dataset.attrs["settings"])
    assert (settings["rise"]["explainer"], settings["rise"]["num_masks"]) == ("Rise", 5)
    dataset.to_netcdf(tmp_path / "result.nc", engine="h5netcdf")
    with xarray.open_dataset(tmp_path / "result.nc", engine="h5netcdf") as loaded:
        assert loaded.load().identical(dataset)


def test_to_xarray_uses_the_names_of_a_run_dataset(tmp_path: Path) -> None:
    methods = (*PLAN.methods, store.Method("cam", {"explainer": "Cam"}, has_layers=True))
    with store.Writer.create(tmp_path / "run.h5", dataclasses.replace(PLAN, methods=methods)) as writer:
        fill(writer)
    with dfengine.open(tmp_path / "run.h5") as run:
        run_dataset, item_dataset, cam = run.to_xarray().isel(item=0), run[0].to_xarray(), run[0].cam["mid"][...]
    for name, values in run_dataset.drop_vars("done").data_vars.items():
        assert item_dataset[name].dims == values.dims
        np.testing.assert_array_equal(item_dataset[name], values)
        assert item_dataset[name].attrs == values.attrs
    assert set(item_dataset.data_vars) - set(run_dataset.data_vars) == {
        "preview",
        "latent",
        "epsilon",
        "cam_5x6",
        "cam_3x3",
    }
    assert item_dataset.method.values.tolist() == ["rise", "random", "cam"]
    np.testing.assert_array_equal(item_dataset.cam_3x3[0], cam)
    attributes = item_dataset.attrs
    assert (attributes["prompt"], attributes["seed"]) == ("a red circle", 1)
    assert "negative_prompt" not in attributes


def test_to_xarray_of_a_minimal_result(tmp_path: Path) -> None:
    minimal = make_result(np.zeros((2, 2, 3), np.float32))
    assert set(minimal.to_xarray()) == {"rgb", "timestep", "signal", "noise", "latent", "epsilon", "saliency"}
    assert "saliency" not in dataclasses.replace(minimal, maps={}).to_xarray()
    writer, part = store.Writer.create(tmp_path / "run.h5", PLAN), tmp_path / "run.part.h5"
    with writer, dfengine.open(part) as run, pytest.raises(store.StoreError, match="item 1 has no trajectory yet"):
        run[1].to_xarray()


def test_to_xarray_without_xarray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(ValueError, match=r"pip install 'dfengine\[xarray\]'"):
        complete_result().to_xarray()


def test_only_the_neighbourhood_of_non_finite_values_is_nan() -> None:
    saliency = np.array([[1.0, np.inf], [3.0, 2.0], [2.0, 1.0], [1.0, 2.0]], np.float32)
    resized = heatmap(saliency, (4, 2))
    np.testing.assert_allclose(resized, [[0, np.nan], [1, 0.5], [0.5, 0], [0, 0.5]])
    assert np.isnan(heatmap(saliency, (8, 4))[:3, 1:]).all()
    assert np.isfinite(heatmap(saliency, (8, 4))[4:]).all()


def test_model_name_is_the_hub_id_or_the_name_of_the_folder() -> None:
    assert model_name("stabilityai/sd-turbo") == "stabilityai/sd-turbo"
    assert model_name("/data/models/sd15") == "sd15"
    assert model_name("shapes") == "shapes"


def test_an_unknown_explainer_does_not_affect_the_others(tmp_path: Path) -> None:
    rise = describe(Rise(3))
    methods = (store.Method("mine", {"explainer": "Mine", "much": 2}), store.Method("rise", rise, num_masks=3))
    with store.Writer.create(tmp_path / "run.h5", dataclasses.replace(PLAN, methods=methods, layers=())) as writer:
        fill(writer)
    with dfengine.open(tmp_path / "run.h5") as run:
        item = run[0]
        assert [item.settings_of(name)["explainer"] for name in item.maps] == ["Mine", "Rise"]
        assert item.settings_of("rise") == json.loads(json.dumps(rise))
        assert as_call(item.settings_of("mine")) == "Mine(much=2)"
        assert json.loads(item.to_xarray().attrs["settings"])["mine"] == {"explainer": "Mine", "much": 2}
        with pytest.raises(ValueError, match="'Mine' is not known"):
            item.settings  # noqa: B018
