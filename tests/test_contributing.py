"""The examples of CONTRIBUTING.md, run from the document: through the engine, CLI, file, figure and report."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import dfengine_command

import dfengine
from dfengine.explain import registry
from dfengine.figures import draw

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
EXPLAINER, MODEL = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = re.search(r"```sh\n(dfengine explain.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the document's explainer for the duration of a test."""
    monkeypatch.setattr(registry, "_entries", dict(registry.entries()))
    exec(EXPLAINER, {"__name__": "example"})


@pytest.mark.slow
@pytest.mark.usefixtures("registered")
def test_an_explainer_of_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    body = EXPLAINER.partition("class Magnitude")[2].split('"""')[2]
    assert len([line for line in body.splitlines() if line.strip()]) <= 10
    assert COMMANDS is not None
    for command in COMMANDS[1].strip().splitlines():
        _, *words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', command)]
        run = dfengine_command(*words)
        assert run.returncode == 0, run.stderr
    assert "--power" in dfengine_command("explain", "--help").stdout
    with dfengine.open("run.h5") as opened:
        (item,) = opened
        assert item.settings == {"magnitude": dfengine.Magnitude(power=2.0)}
        assert (item.label("magnitude"), item.form("magnitude")) == ("magnitude", "saliency")
        engine = dfengine.Engine.from_pretrained("shapes", device="cpu")
        denoiser, steps = engine.denoiser, torch.tensor(item.timesteps)
        condition = denoiser.encode_prompts([item.prompt] * len(steps))
        with torch.no_grad():
            epsilon = denoiser(torch.from_numpy(np.asarray(item.latents)), steps, condition)
        np.testing.assert_allclose(item.maps["magnitude"], epsilon.square().mean(1).numpy(), rtol=1e-3, atol=1e-4)
    assert Path("magnitude.png").read_bytes().startswith(b"\x89PNG")
    assert "magnitude" in Path("report.html").read_text()


@pytest.mark.usefixtures("registered")
def test_an_explainer_in_a_sweep() -> None:
    from dfengine.sweep import Sweep

    spec = Sweep(prompts=["a red circle on a gray background"], explainers=[{"magnitude": {"power": 3}}])
    assert spec.explainers == (dfengine.Magnitude(power=3.0),)


@pytest.mark.slow
def test_a_toy_model_of_four_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "example"}
    exec(MODEL, names)
    result = names["result"]
    assert result.image.shape == (16, 16, 3)
    assert np.isfinite(result.maps["rise"]).all()
    assert draw(result, "rise").axes
    run = dfengine_command("report", "toy.h5", "-o", "toy.html")
    assert run.returncode == 0, run.stderr
    # A longer prompt gives another condition, so the model receives its job.
    other = names["Engine"](names["Blur"]()).explain("a toy, longer", names["Rise"](num_masks=8), num_steps=3)
    assert not np.array_equal(other.image, result.image)
    with pytest.raises(ValueError, match="blur does not expose its layers: DF-CAM is not possible with it"):
        names["Engine"](names["Blur"]()).explain("a toy", dfengine.Cam(), num_steps=3)
