"""What the documents show is run as it stands there (command lines are parsed), and what they name exists.

Numbers of steps and masks are made smaller; what a reader brings (a pipeline, a file, another tool's maps) is supplied.
"""

import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main

import dfengine
from dfengine import Attention, Cam, Engine, Relevance, Rise, XDiffusionCam, XDiffusionRise, evaluate, sweep, tuning
from dfengine.cli import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), ROOT / "kernels/README.md", ROOT / "bench/README.md"]
CAPTION = "a red circle above a blue square on a gray background"


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def run(code, **supplied):
    """The names that an example leaves behind, with few masks."""
    names = dict(supplied)
    exec(re.sub(r"(num_masks=|Rise\()\d+", r"\g<1>8", code), names)
    return names


@pytest.fixture
def few_steps(monkeypatch):
    """Examples that load a model sample four steps where they ask for more."""

    class Brief(Engine):
        def job(self, *arguments, num_steps=30, **options):
            return super().job(*arguments, num_steps=min(num_steps, 4), **options)

    monkeypatch.setattr(dfengine, "Engine", Brief)
    return Brief


@pytest.fixture
def pipeline():
    return Engine.from_pretrained("shapes", device="cpu").denoiser.pipeline


# Python --------------------------------------------------------------------------------------------------------------


def test_every_python_example_is_run_here():
    counts = {str(path.relative_to(ROOT)): len(blocks(path, "python")) for path in DOCUMENTS}
    assert {name: count for name, count in counts.items() if count} == {
        "README.md": 5,
        "docs/api.md": 1,
        "docs/comparison.md": 2,
        "docs/format.md": 2,
        "docs/methods.md": 2,
        "docs/performance.md": 1,
        "docs/sweeps.md": 1,
        "docs/xdiffusion.md": 1,
    }


def test_readme(few_steps, pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Of two images, by a distance that is defined for two.
    shown = "\n".join(blocks("README.md", "python")).replace("captions(12)", "captions(2)")
    shown = shown.replace("summarise_games(found)", "summarise_games(found, 'mse')")
    my_maps = np.random.default_rng(0).random((2, 16, 16))
    seen = run(shown, my_maps=my_maps, pipe=pipeline)
    assert (tmp_path / "run.h5").exists()
    assert list(seen["result"].maps) == ["cam", "relevance", "attention"]
    assert list(seen["table"].methods) == ["random", "cam", "mine"]
    assert seen["pipe"].scheduler.config.stage == "early"


def test_events():
    (example,) = blocks("docs/api.md", "python")
    seen = run(example)
    assert type(seen["event"]) is seen["Finished"]
    assert seen["event"].item == 1


def test_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = Engine.from_pretrained("shapes", device="cpu")
    engine.explain(CAPTION, [Rise(4), Cam(), Relevance(), Attention()], num_steps=4, out="run.h5")
    ours, theirs = blocks("docs/format.md", "python")
    assert run(ours)["item"].prompt == CAPTION
    run(theirs)


def test_the_operations_alone():
    _, example = blocks("docs/methods.md", "python")
    seen = {}
    exec(example, seen)
    torch.testing.assert_close(seen["saliency"][0], seen["coverage"])
    assert ((seen["error"] > 0) & (seen["error"] < 1)).all()


def test_lists_of_time_steps():
    example, _ = blocks("docs/methods.md", "python")
    told = re.findall(r"^(exponential_timesteps\(.*\)) +# (\[.*\])$", example, re.M)
    assert len(told) == 3
    assert [eval(call, {"exponential_timesteps": dfengine.exponential_timesteps}) for call, _ in told] == [
        json.loads(steps) for _, steps in told
    ]


def test_steps_left_out(few_steps):
    (example,) = blocks("docs/performance.md", "python")
    assert list(run(example.replace("step % 10", "step % 2"))["maps"]) == [0, 2]


def test_the_released_code(few_steps):
    (example,) = blocks("docs/xdiffusion.md", "python")
    settings = []

    class Told(few_steps):
        def explain(self, *arguments, **options):
            result = super().explain(*arguments, **options)
            settings.append(result.settings)
            return result

    engine = Told.from_pretrained("shapes", device="cpu")
    run(
        example,
        engine=engine,
        Rise=Rise,
        Cam=Cam,
        XDiffusionRise=lambda: XDiffusionRise(8),
        XDiffusionCam=XDiffusionCam,
    )
    assert settings == [{"rise": XDiffusionRise(8), "cam": XDiffusionCam()}] * 2


def test_another_tool_sees_the_same_image(pipeline):
    example, _ = blocks("docs/comparison.md", "python")
    pipeline.set_progress_bar_config(disable=True)
    seen = run(re.sub(r"(num\w*_steps)=30", r"\1=4", example), pipe=pipeline)
    difference = np.asarray(seen["image"]).astype(int) - seen["result"].image
    assert abs(difference).max() <= 1


def test_maps_of_another_tool_are_scored(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, example = blocks("docs/comparison.md", "python")
    prompts, drawn = evaluate.captions(2), np.random.default_rng(0)
    run(example, prompts=prompts, another_tool=lambda prompt, seed: drawn.random((64, 64)))
    Path("prompts.txt").write_text("\n".join(prompts))
    (command,) = commands((DOCS / "comparison.md").read_text())
    app([*command[1:], "--steps", "2", "--distance", "frechet-single"], standalone_mode=False)  # of two images
    assert re.findall(r"^\| (\w+) \|", Path("scored/table.md").read_text(), re.M) == ["random", "cam", "daam"]
    assert capsys.readouterr().out.startswith(Path("scored/table.md").read_text())


# Sweeps --------------------------------------------------------------------------------------------------------------


def test_the_sweeps_in_the_document(tmp_path):
    examples = blocks("docs/sweeps.md", "yaml")
    for number, example in enumerate(examples):
        (tmp_path / f"{number}.yaml").write_text(example)
    described, presets = (sweep.read(tmp_path / f"{number}.yaml") for number in range(len(examples)))
    assert described.explainers == (Rise(num_masks=200), Cam(), Relevance())
    assert (len(described.prompts), described.seeds, len(described.schedules)) == (2, (0, 1), 3)
    assert {one.steps for one in described.schedules} == {10}
    assert presets.explainers == (Rise(num_masks=200), XDiffusionRise(num_masks=200, name="rise-released"))


def test_the_sweep_in_the_readme(tmp_path):
    (example,) = blocks("README.md", "yaml")
    (tmp_path / "spec.yaml").write_text(example)
    (tmp_path / "prompts.txt").write_text(CAPTION)
    described = sweep.read(tmp_path / "spec.yaml")
    assert described.explainers == (Rise(num_masks=500), Cam(), Relevance())
    assert (described.seeds, len(described.schedules), len(described.models)) == ((0, 1, 2, 3), 3, 2)


def test_the_sweep_in_python(monkeypatch):
    (example,) = blocks("docs/sweeps.md", "python")
    asked = []
    monkeypatch.setattr(sweep, "run", lambda *given: asked.append(given) or iter([(0, "an event")]))
    monkeypatch.setattr(sweep, "outcome", lambda folder: sweep.Outcome(items=4, units_left=0, quarantined=()))
    exec(example, {})
    ((described, folder),) = asked
    assert ([one.steps for one in described.schedules], folder) == ([30, 10], "run")


def test_every_key_of_a_sweep_is_documented():
    table = (DOCS / "sweeps.md").read_text()
    keys = {key for row in re.findall(r"^\| (`.*?`) \|", table, re.M) for key in re.findall(r"`(\w+)`", row)}
    assert keys == {*sweep.Sweep.model_fields, "steps", "gamma", "guidance"}
    assert all(f"{name}:" in table for name in sweep.ModelSpec.model_fields)
    assert all(f"{name}: …" in table for name in sweep.Schedule.model_fields)


# The command line ----------------------------------------------------------------------------------------------------


def commands(text):
    """The words of every command line of dfengine in a fence of sh, indented, or in a comment of a file of prompts."""
    fenced = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    shown = "\n".join(fenced + re.findall(r"^(?: {4}|# {3})(dfengine .*)$", text, re.M))
    lines = re.findall(r"^(?:srun )?(dfengine .*)$", re.sub(r"\\\n\s*", " ", shown), re.M)
    return [shlex.split(line, comments=True) for line in lines]


def inline(text):
    """The words of every command between single backticks, some of which are cut short."""
    return [shlex.split(found) for found in re.findall(r"`(dfengine [a-z][^`]*)`", text)]


def parse(words, *, whole):
    """Have the command line read a command without running it."""
    _, verb, *arguments = words
    try:
        typer.main.get_command(app).commands[verb].make_context(verb, arguments)
    except typer.TyperException as error:
        if whole or type(error).__name__ != "MissingParameter":
            pytest.fail(f"{shlex.join(words)}: {error.format_message()}")


@pytest.mark.parametrize("path", [*DOCUMENTS, DOCS / "formats.txt"], ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_those_of_the_command_line(path):
    text = path.read_text()
    for words in commands(text):
        parse(words, whole=True)
    for words in inline(text):
        parse(words, whole=False)


def test_commands_are_found():
    text = (
        '```sh\ndfengine explain "a cat" \\\n  -o c.h5   # a note\n```\n    dfengine info run/\n# `dfengine profile`\n'
    )
    assert commands(text) == [["dfengine", "explain", "a cat", "-o", "c.h5"], ["dfengine", "info", "run/"]]
    assert inline(text) == [["dfengine", "profile"]]
    assert sum(len(commands(path.read_text())) for path in DOCUMENTS) > 30
    with pytest.raises(pytest.fail.Exception, match="No such option: --nought"):
        parse(["dfengine", "info", "run.h5", "--nought"], whole=False)
    with pytest.raises(pytest.fail.Exception, match="Missing argument"):
        parse(["dfengine", "info"], whole=True)


# Links, names and tables ---------------------------------------------------------------------------------------------


def anchors(path):
    """What GitHub calls the headings of a document."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            there = (path.parent / file).resolve() if file else path
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


def test_the_code_that_methods_are_in():
    told = re.findall(r"^Code: .*?\.$", (DOCS / "methods.md").read_text(), re.M | re.DOTALL)
    places = [(file, names) for line in told for file, names in re.findall(r"`(\S+\.py)`:((?:\s+`[\w.]+`,?)+)", line)]
    assert (len(told), len(places)) == (14, 27)
    for file, names in places:
        module = importlib.import_module(file.removeprefix("kernels/").removesuffix(".py").replace("/", "."))
        for name in re.findall(r"`([\w.]+)`", names):
            thing = module
            for part in name.split("."):
                thing = getattr(thing, part)
            assert thing.__module__ == module.__name__, f"{file}: {name}"


def test_maths_survive_markdown():
    """GitHub takes the backslash off before punctuation, and a formula ends where its line does."""
    for path in DOCUMENTS:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
        formula = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$")
        assert "$" not in formula.sub("", text), path
        for displayed, within in formula.findall(text):
            assert not re.search(r"\\[^A-Za-z]", displayed + within), displayed + within
            assert (displayed + within).count("{") == (displayed + within).count("}"), displayed + within


def test_when_compiling_repays_itself():
    minutes = {
        device: round(tuning.MIN_COMPILE_PAYOFF * expected.seconds / (1 - 1 / expected.speedup) / 60)
        for device, expected in tuning.COMPILE_COSTS.items()
    }
    text = f"over {minutes['cpu']} min on a CPU, {minutes['cuda']} min on a GPU"
    assert text in (DOCS / "performance.md").read_text()
