"""The released code's behaviour, asked for by name: what becomes of explainers, schedules, concepts and LIME."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from analytic import Analytic, patch_mean
from test_cli import dfengine_command

import dfengine
from dfengine import Attention, Cam, Engine, Lime, Random, Rise, XDiffusionCam, XDiffusionLime, XDiffusionRise
from dfengine.explain import to_xdiffusion
from dfengine.tokens import Tokens

PROMPT = "a red circle above a blue square on a gray background"
TOKENS = Tokens("a cat", ("<s>", "a", "ca", "t", "</s>"), ((0, 0), (0, 1), (2, 4), (4, 5), (0, 0)))


def test_each_explainer_has_its_released_form() -> None:
    assert to_xdiffusion(Rise(7, similarity="cosine", name="x")) == XDiffusionRise(7, "cosine", "x")
    assert to_xdiffusion(Cam(loss_scale=2.0)) == XDiffusionCam(loss_scale=2.0)
    assert to_xdiffusion(Lime(9, alpha=2.0)) == XDiffusionLime(9, alpha=2.0)
    assert to_xdiffusion(Random()) == Random()
    assert to_xdiffusion(Attention()) == Attention()


@pytest.mark.parametrize(
    "explainer",
    [Rise(score="global"), Rise(mask_kind="rise"), Rise(keep_probability=0.4), Rise(estimator="coverage"), Cam("up*")],
)
def test_what_the_released_code_does_not_have_is_refused(explainer: Rise | Cam) -> None:
    with pytest.raises(ValueError, match="is not what the released code does"):
        to_xdiffusion(explainer)


def test_similarities_that_it_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="'luminance' is not among those of the released code"):
        to_xdiffusion(Rise(similarity="luminance"))


@pytest.mark.parametrize("stage", ["early", "latter"])
def test_gamma_0_is_uniform(stage: str) -> None:
    engine = Engine(Analytic(patch_mean(slice(0, 2), slice(0, 2))))
    uniform = engine.job("1", num_steps=5).timesteps
    assert engine.job("1", num_steps=5, sampling=stage, gamma=0, behaviour="xdiffusion").timesteps == uniform
    assert engine.job("1", num_steps=5, sampling=stage, gamma=0).timesteps != uniform
    assert engine.job("1", num_steps=5, sampling=stage, gamma=5, behaviour="xdiffusion").timesteps != uniform
    with pytest.raises(ValueError, match="behaviour 'released' is not known: expected one of paper, xdiffusion"):
        engine.job("1", behaviour="released")


def test_an_explanations_concept_may_be_summed() -> None:
    result = Engine.from_pretrained("shapes", device="cpu").explain(PROMPT, dfengine.Relevance(), num_steps=1)
    np.testing.assert_allclose(result.concept("red circle", summed=True), 2 * result.concept("red circle"), rtol=1e-6)


def test_lime_is_ranked_by_the_painted_images_brightness() -> None:
    """Seven columns of gray, 0 to 0.6: five are painted, those of the largest coefficients, whatever their sign."""
    gray = np.arange(7) * 0.1
    image = np.broadcast_to((gray * 255).round().astype(np.uint8)[None, :, None], (3, 7, 3)).copy()
    segments = np.broadcast_to(np.arange(7), (3, 7)).copy()
    coefficients = np.array([0.1, -0.9, 0.8, 0.05, -0.7, 0.6, 0.5])
    expected = np.where(np.isin(np.arange(7), [1, 2, 4, 5, 6]), (2 * gray + 0.6) / 3, gray)
    painted = XDiffusionLime().paint(coefficients, segments, image)
    np.testing.assert_allclose(painted, np.broadcast_to(expected, (3, 7)), atol=2e-3)
    np.testing.assert_allclose(Lime().paint(coefficients, segments, image), coefficients[segments])


def test_lime_segments_the_small_image() -> None:
    """A fine checkerboard is one gray when small, but not when large."""
    checkers = (255 * (np.indices((32, 32)).sum(0) % 2)).astype(np.uint8)[..., None].repeat(3, -1)
    plain = np.full((8, 8, 3), 128, np.uint8)
    same = Lime().segments(plain, (8, 8))
    assert np.array_equal(XDiffusionLime().segments(checkers, (8, 8)), same)
    assert not np.array_equal(Lime().segments(checkers, (8, 8)), same)


def test_a_run_keeps_what_it_used(tmp_path: Path) -> None:
    engine = Engine.from_pretrained("shapes", device="cpu")
    out = tmp_path / "run.h5"
    explainers = [Rise(4), Cam(), Lime(4)]
    result = engine.explain(PROMPT, explainers, num_steps=2, behaviour="xdiffusion", out=out)
    with dfengine.open(out) as run:
        assert run[0].settings == {"rise": XDiffusionRise(4), "cam": XDiffusionCam(), "lime": XDiffusionLime(4)}
    alone = engine.explain(PROMPT, [XDiffusionRise(4), XDiffusionCam(), XDiffusionLime(4)], num_steps=2)
    for name in ("rise", "lime"):
        np.testing.assert_array_equal(result.maps[name], alone.maps[name])
    assert "mid_block.attentions.0" not in result.maps["cam"]
    paper = engine.explain(PROMPT, explainers, num_steps=2)
    assert not np.array_equal(paper.maps["rise"], result.maps["rise"])
    assert not np.array_equal(paper.maps["lime"], result.maps["lime"])
    assert "mid_block.attentions.0" in paper.maps["cam"]


def test_on_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    options = ["-e", "rise", "--masks", "4", "--steps", "2", "--behaviour", "xdiffusion"]
    run = dfengine_command("explain", PROMPT, "-o", str(out), *options)
    assert run.returncode == 0, run.stderr
    told = dfengine_command("info", str(out), "--json")
    assert "XDiffusionRise" in told.stdout
    wrong = dfengine_command("explain", PROMPT, "-o", str(tmp_path / "no.h5"), *options, "--score", "global")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "score='global' is not what the released code does" in wrong.stderr
    assert not (tmp_path / "no.h5").exists()


def test_settings_survive_a_copy() -> None:
    assert replace(XDiffusionLime(5), alpha=3.0) == XDiffusionLime(5, alpha=3.0)


def test_without_coefficients_nothing_is_painted() -> None:
    """A regression of scores that are not finite has none: the map must say so."""
    nothing = np.full(2, np.nan)
    painted = XDiffusionLime().paint(nothing, np.array([[0, 1]]), np.zeros((2, 4, 3), np.uint8))
    assert np.isnan(painted).all()
