"""What an explainer's declaration defines: its entry, options, presets, description and name in the package."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import pytest

import dfengine
from dfengine import (
    Attention,
    Cam,
    Counterfactual,
    Lime,
    Random,
    Relevance,
    Rise,
    XDiffusionCam,
    XDiffusionLime,
    XDiffusionRise,
)
from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.trajectory import Trajectory
from dfengine.explain import (
    Explainer,
    StepMap,
    describe,
    entries,
    entry_of,
    hot,
    is_serializable,
    make,
    rebuild,
    register,
)
from dfengine.explain.registry import Option


def test_every_explainer_is_registered_with_its_label_and_form() -> None:
    forms = {entry.name: (entry.explainer, entry.form) for entry in entries().values()}
    assert forms == {
        "rise": (Rise, "saliency"),
        "cam": (Cam, "layers"),
        "relevance": (Relevance, "tokens"),
        "attention": (Attention, "words"),
        "counterfactual": (Counterfactual, "words"),
        "lime": (Lime, "saliency"),
        "random": (Random, "saliency"),
        "xdiffusion-rise": (XDiffusionRise, "saliency"),
        "xdiffusion-cam": (XDiffusionCam, "layers"),
        "xdiffusion-lime": (XDiffusionLime, "saliency"),
    }
    assert (entry_of(Cam()), entry_of(Cam), entry_of("Cam")) == (entries()["cam"],) * 3
    assert entry_of("Gradient") is None
    assert all(entry.summary and all(option.help for option in entry.options) for entry in entries().values())


def test_options_are_the_fields_of_the_dataclass() -> None:
    options = {option.name: option for option in entries()["rise"].options}
    assert options["num_masks"] == Option("num_masks", int, 256, options["num_masks"].help)
    assert (options["estimator"].type, options["estimator"].default) == (str, None)
    assert (options["stop_at_error"].type, options["similarity"].type) == (float, str)
    assert "name" not in options
    layers, words = entries()["cam"].options[0], entries()["attention"].options[0]
    assert (layers.type, layers.default, layers.is_repeated) == (str, ("*",), True)
    assert (words.type, words.default, words.is_repeated) == (str, None, True)
    assert [option.type for option in entries()["relevance"].options] == [bool, bool, float]
    replace = {option.name: option for option in entries()["counterfactual"].options}["replace"]
    assert (replace.type, replace.default, replace.is_repeated, replace.is_mapping) == (str, None, True, True)
    assert not any(option.is_mapping for option in (layers, words))


@pytest.mark.parametrize(
    ("name", "preset", "settings", "expected"),
    [
        ("rise", "default", {"num_masks": 7}, Rise(7)),
        ("rise", "paper", {"num_masks": 7, "window": 5}, Rise.paper(num_masks=7, window=5)),
        ("rise", "xdiffusion", {"num_masks": 7, "similarity": "cosine"}, XDiffusionRise(7, "cosine")),
        ("cam", "xdiffusion", {"loss_scale": 2.0, "name": "x"}, XDiffusionCam(2.0, "x")),
        ("lime", "xdiffusion", {"num_samples": 9, "alpha": 2.0}, XDiffusionLime(9, alpha=2.0)),
        ("cam", "paper", {"layers": "up*"}, Cam("up*")),
        ("random", "xdiffusion", {}, Random()),
        ("attention", "paper", {"words": "cat"}, Attention("cat")),
    ],
)
def test_make_builds_an_explainer_at_a_preset(name: str, preset: str, settings: dict, expected: Explainer) -> None:
    assert make(name, preset, **settings) == expected


@pytest.mark.parametrize(
    ("name", "preset", "settings", "message"),
    [
        ("ris", "default", {}, r"explainer 'ris' is not known: .*did you mean 'rise'"),
        ("rise", "released", {}, "preset 'released' is not known: expected one of default, paper, xdiffusion"),
        ("rise", "default", {"num_mask": 3}, r"Rise has no setting 'num_mask': .*did you mean 'num_masks'"),
        ("rise", "xdiffusion", {"score": "global"}, "XDiffusionRise has no setting 'score'"),
        ("rise", "xdiffusion", {"keep_probability": 0.4}, "XDiffusionRise has no setting 'keep_probability'"),
        ("cam", "xdiffusion", {"layers": "up*"}, "XDiffusionCam has no setting 'layers'"),
        ("rise", "xdiffusion", {"similarity": "luminance"}, "'luminance' is not among those of the released code"),
        ("cam", "paper", {"layer": "up*"}, "did you mean 'layers'"),
    ],
)
def test_unknown_names_presets_and_settings_are_refused(name: str, preset: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, preset, **settings)


@pytest.mark.parametrize("entry", entries().values(), ids=lambda entry: entry.name)
def test_every_explainer_says_in_a_line_what_is_hot(entry) -> None:
    meaning = hot(make(entry.name, name="other"))
    assert 20 < len(meaning) < 130
    assert meaning.endswith(".")
    assert meaning[0].islower()


@pytest.mark.parametrize(
    ("rise", "meaning"),
    [
        (
            Rise(),
            "the predicted clean latent here keeps more of its structure with this place kept than with it hidden.",
        ),
        (
            Rise.paper(),
            "under the masks that keep this pixel, the predicted noise keeps its structure here: a base rate, no "
            "attribution.",
        ),
        (
            Rise.paper(estimator="sum", similarity="cosine"),
            "summed over the masks that keep this pixel, the predicted noise stays similar (cosine) here: a base rate, "
            "no attribution.",
        ),
        (
            Rise(score="global", estimator="ridge", target="guided", cell=1),
            "the whole guided predicted clean latent keeps more of its structure with this pixel kept than with it "
            "hidden.",
        ),
        (
            Rise(score="global", estimator="contrast", similarity=lambda a, b: a),
            "the whole predicted clean latent stays more similar (a function of the caller's) with this place kept "
            "than with it hidden.",
        ),
        (
            Rise(score="global", estimator="coverage", output="epsilon"),
            "under the masks that keep this place, the whole predicted noise keeps its structure.",
        ),
        (
            Rise(baseline="frozen"),
            "nothing of the network, a baseline to hold its map against (f(R) whatever is masked).",
        ),
    ],
)
def test_what_is_hot_in_df_rise_depends_on_its_settings(rise: Rise, meaning: str) -> None:
    assert hot(rise) == meaning


@pytest.mark.parametrize("entry", entries().values(), ids=lambda entry: entry.name)
def test_settings_survive_json(entry) -> None:
    explainer = make(entry.name, name="other")
    assert rebuild(json.loads(json.dumps(describe(explainer)))) == explainer
    assert is_serializable(explainer)


def test_functions_are_described_by_name_and_must_be_supplied_again() -> None:
    rise = Rise(3, similarity=lambda a, b: a)
    assert not is_serializable(rise)
    restored = rebuild(json.loads(json.dumps(describe(rise))))
    assert describe(restored) == describe(rise)
    with pytest.raises(ValueError, match="is not in the file"):
        restored.similarity(None, None)


@dataclass(frozen=True)
class Ones(Explainer):
    """Maps of ones."""

    name: str = "ones"

    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        yield from ()


def test_registering_adds_a_name_to_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from dfengine.explain import registry

    monkeypatch.setattr(registry, "_entries", dict(entries()))
    with pytest.raises(AttributeError, match="no attribute 'Ones'"):
        dfengine.Ones  # noqa: B018
    assert hot(Ones()) == ""
    assert register("ones", label="ones", hot=lambda ones: f"{ones.name} everywhere.")(Ones) is Ones
    assert hot(Ones("mine")) == "mine everywhere."
    assert dfengine.Ones is Ones
    assert rebuild(describe(Ones("mine"))) == Ones("mine")
    with pytest.raises(ValueError, match="the name 'rise' belongs to Rise"):
        register("rise", label="x")(Ones)
    with pytest.raises(ValueError, match="form 'picture' is not known: expected one of saliency, layers"):
        register("two", label="x", form="picture")(Ones)
