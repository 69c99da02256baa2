"""The presets of explainers, through the engine, a file and the command line."""

from pathlib import Path

import numpy as np
import pytest
from commands import dfengine_command

import dfengine
from dfengine import Cam, Engine, Lime, Rise, XDiffusionCam, XDiffusionLime, XDiffusionRise

PROMPT = "a red circle above a blue square on a gray background"


@pytest.mark.slow
def test_a_file_keeps_what_a_preset_computed(tiny_folder: Path, tmp_path: Path) -> None:
    engine = Engine.from_pretrained(tiny_folder, device="cpu")
    out = tmp_path / "run.h5"
    released = [Rise.xdiffusion(num_masks=4), Cam.xdiffusion(), Lime.xdiffusion(num_samples=4)]
    result = engine.explain(PROMPT, released, num_steps=2, out=out)
    with dfengine.open(out) as run:
        assert run[0].settings == {"rise": XDiffusionRise(4), "cam": XDiffusionCam(), "lime": XDiffusionLime(4)}
        assert run[0].label("rise") == "DF-RISE (released code)"
        assert [run[0].form(name) for name in run[0].maps] == ["saliency", "layers", "saliency"]
    default = engine.explain(PROMPT, [Rise(4), Cam(), Lime(4)], num_steps=2)
    assert not np.array_equal(default.maps["rise"], result.maps["rise"])
    assert not np.array_equal(default.maps["lime"], result.maps["lime"])
    assert "mid_block.attentions.0" in default.maps["cam"]
    assert "mid_block.attentions.0" not in result.maps["cam"]
    printed = engine.explain(PROMPT, Rise.paper(num_masks=4), num_steps=2)
    assert not np.array_equal(printed.maps["rise"], default.maps["rise"])
    assert not np.array_equal(printed.maps["rise"], result.maps["rise"])


@pytest.mark.slow
def test_on_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    options = ["-e", "rise", "--num-masks", "4", "--num-steps", "2", "--preset", "xdiffusion"]
    run = dfengine_command("explain", PROMPT, "-o", str(out), *options)
    assert run.returncode == 0, run.stderr
    with dfengine.open(out) as opened:
        assert opened[0].settings == {"rise": XDiffusionRise(4)}
    wrong = dfengine_command("explain", PROMPT, "-o", str(tmp_path / "no.h5"), *options, "--score", "global")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "XDiffusionRise has no setting 'score'" in wrong.stderr
    assert not (tmp_path / "no.h5").exists()
