"""Every example in the documents runs, every command parses, and every name, link and table matches the code.

Examples run with fewer steps and masks; the tests supply what a reader would (a pipeline, a file, another tool's maps).
`python tests/test_docs.py` rewrites the table of explainers in docs/methods.md.
"""

import importlib
import json
import re
import shlex
from pathlib import Path

import dfkernels
import numpy as np
import pytest
import torch
import typer.core
import typer.main
from commands import dfengine_command
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

import dfengine
from dfengine import Attention, Cam, Engine, Relevance, Rise, XDiffusionCam, XDiffusionRise, evaluate, sweep
from dfengine.cli import build_app
from dfengine.explain import registry
from dfengine.runtime import tuning

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), ROOT / "kernels/README.md", ROOT / "bench/README.md"]
CAPTION = "a red circle above a blue square on a gray background"


def blocks(name, language):
    """The fenced blocks of a language in a document."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def run(code, **supplied):
    """Run an example with few masks; returns the names that it defines."""
    names = dict(supplied)
    exec(re.sub(r"(num_masks=|Rise\()\d+", r"\g<1>8", code), names)
    return names


@pytest.fixture
def few_steps(monkeypatch):
    """At most four steps in examples that load a model."""

    class FewSteps(Engine):
        def job(self, *arguments, num_steps=30, **options):
            return super().job(*arguments, num_steps=min(num_steps, 4), **options)

    monkeypatch.setattr(dfengine, "Engine", FewSteps)
    return FewSteps


@pytest.fixture
def pipeline():
    return Engine.from_pretrained("shapes", device="cpu").denoiser.pipeline


# Python --------------------------------------------------------------------------------------------------------------


def test_every_python_example_is_tested():
    counts = {str(path.relative_to(ROOT)): len(blocks(path, "python")) for path in DOCUMENTS}
    assert {name: count for name, count in counts.items() if count} == {
        "README.md": 6,
        "docs/api.md": 1,
        "docs/comparison.md": 2,
        "docs/format.md": 2,
        "docs/methods.md": 2,
        "docs/performance.md": 1,
        "docs/pipelines.md": 1,
        "docs/sweeps.md": 1,
        "docs/xdiffusion.md": 1,
        "kernels/README.md": 1,
    }


@pytest.mark.slow
def test_readme(few_steps, pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Two images and four steps, and a distance that is defined for two images.
    example = "\n".join(blocks("README.md", "python")).replace("captions(12)", "captions(2)")
    example = example.replace("maps={", "num_steps=4, distance='mse', maps={")
    my_maps = np.random.default_rng(0).random((2, 16, 16))
    pipe, sketch = StableDiffusionImg2ImgPipeline(**pipeline.components), Image.new("RGB", (64, 64), "navy")
    names = run(example, my_maps=my_maps, pipe=pipe, sketch=sketch)
    assert (tmp_path / "run.h5").exists()
    assert names["explained"].maps["rise"].shape == (6, 16, 16)
    assert (tmp_path / "call.h5").exists()
    assert (tmp_path / "report.html").exists()
    assert list(names["result"].maps) == ["cam", "relevance", "attention"]
    (summary,) = names["study"].summaries
    assert list(summary.methods) == ["random", "cam", "mine"]
    assert names["pipe"].scheduler.config.stage == "early"


@pytest.mark.slow
def test_any_pipeline(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe, sketch = StableDiffusionImg2ImgPipeline(**pipeline.components), Image.new("RGB", (64, 64), "navy")
    (example,) = blocks("docs/pipelines.md", "python")
    example = example.replace("Rise()", "Rise(8)").replace("Lime()", "Lime(8)").replace("[0, 4, 7]", "[0, 5]")
    names = run(example, pipe=pipe, sketch=sketch)
    assert names["result"].prompt == "a cat holding a sign"


@pytest.mark.slow
def test_event_example():
    (example,) = blocks("docs/api.md", "python")
    names = run(example)
    assert type(names["event"]) is names["Finished"]
    assert names["event"].item == 1


@pytest.mark.slow
def test_file_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = Engine.from_pretrained("shapes", device="cpu")
    engine.explain(CAPTION, [Rise(4), Cam(), Relevance(), Attention()], num_steps=4, out="run.h5")
    with_dfengine, with_other_tools = blocks("docs/format.md", "python")
    assert run(with_dfengine)["item"].prompt == CAPTION
    run(with_other_tools)


def test_dfkernels_example():
    _, example = blocks("docs/methods.md", "python")
    names = {}
    exec(example, names)
    torch.testing.assert_close(names["saliency"][0], names["coverage"])
    assert ((names["error"] > 0) & (names["error"] < 1)).all()


def test_dfkernels_own_example():
    (example,) = blocks("kernels/README.md", "python")
    names = {}
    exec(example, names)
    kept = dfkernels.masks(7, 0, 0, 200, (16, 16)).double()
    network, latents = names["network"], names["latents"]
    scores = dfkernels.similarity(network(latents * kept[:, None].float()), network(latents)[0]).double()
    expected = (kept * scores).sum(0) / kept.sum(0) - ((1 - kept) * scores).sum(0) / (1 - kept).sum(0)
    torch.testing.assert_close(names["saliency"][0].double(), expected, rtol=1e-4, atol=1e-5)
    assert (names["error"] > 0).all()


def test_timesteps_in_comments():
    example, _ = blocks("docs/methods.md", "python")
    calls = re.findall(r"^(exponential_timesteps\(.*\)) +# (\[.*\])$", example, re.M)
    assert len(calls) == 3
    assert [eval(call, {"exponential_timesteps": dfengine.exponential_timesteps}) for call, _ in calls] == [
        json.loads(steps) for _, steps in calls
    ]


@pytest.mark.slow
def test_skipped_steps_example(few_steps):
    (example,) = blocks("docs/performance.md", "python")
    assert list(run(example.replace("step % 10", "step % 2"))["maps"]) == [0, 2]


@pytest.mark.soak
def test_preset_example(few_steps):
    (example,) = blocks("docs/xdiffusion.md", "python")
    settings = []

    class Recording(few_steps):
        def explain(self, *arguments, **options):
            result = super().explain(*arguments, **options)
            settings.append(result.settings)
            return result

    run(example, engine=Recording.from_pretrained("shapes", device="cpu"))
    assert settings == [{"rise": XDiffusionRise(8), "cam": XDiffusionCam()}] * 3


@pytest.mark.slow
def test_another_tool_sees_the_same_image(pipeline):
    example, _ = blocks("docs/comparison.md", "python")
    pipeline.set_progress_bar_config(disable=True)
    names = run(re.sub(r"(num\w*_steps)=30", r"\1=4", example), pipe=pipeline)
    difference = np.asarray(names["image"]).astype(int) - names["result"].image
    assert abs(difference).max() <= 1


@pytest.mark.soak
def test_maps_of_another_tool_are_scored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, example = blocks("docs/comparison.md", "python")
    prompts, rng = evaluate.captions(2), np.random.default_rng(0)
    run(example, prompts=prompts, another_tool=lambda prompt, seed: rng.random((64, 64)))
    Path("prompts.txt").write_text("\n".join(prompts))
    (command,) = commands((DOCS / "comparison.md").read_text())
    # A distance that is defined for two images.
    process = dfengine_command(*command[1:], "--num-steps", "2", "--distance", "frechet-single")
    assert process.returncode == 0, process.stderr
    table = Path("scored/table.md").read_text()
    assert re.findall(r"^\| (\w+) \|", table, re.M) == ["random", "cam", "daam"]
    assert process.stdout.startswith(table)


# Sweeps --------------------------------------------------------------------------------------------------------------


def test_sweeps_in_their_document(tmp_path):
    examples = blocks("docs/sweeps.md", "yaml")
    for number, example in enumerate(examples):
        (tmp_path / f"{number}.yaml").write_text(example)
    first, presets = (sweep.read(tmp_path / f"{number}.yaml") for number in range(len(examples)))
    assert first.explainers == (Rise(num_masks=200), Cam(), Relevance())
    assert (len(first.prompts), first.seeds, len(first.schedules)) == (2, (0, 1), 3)
    assert {schedule.num_steps for schedule in first.schedules} == {10}
    assert presets.explainers == (Rise(num_masks=200), XDiffusionRise(num_masks=200, name="rise-released"))


def test_sweep_in_the_readme(tmp_path):
    (example,) = blocks("README.md", "yaml")
    (tmp_path / "spec.yaml").write_text(example)
    (tmp_path / "prompts.txt").write_text(CAPTION)
    spec = sweep.read(tmp_path / "spec.yaml")
    assert spec.explainers == (Rise(num_masks=128), Cam(), Relevance())
    assert (spec.seeds, len(spec.schedules), len(spec.models)) == ((0, 1, 2, 3), 3, 2)


def test_sweep_in_python(monkeypatch):
    (example,) = blocks("docs/sweeps.md", "python")
    calls = []
    monkeypatch.setattr(sweep, "run", lambda *arguments: calls.append(arguments) or iter([(0, "an event")]))
    monkeypatch.setattr(sweep, "outcome", lambda folder: sweep.Outcome(items=4, units_left=0, quarantined=()))
    exec(example, {})
    ((spec, folder),) = calls
    assert ([schedule.num_steps for schedule in spec.schedules], folder) == ([30, 10], "run")


def test_every_key_of_a_sweep_is_documented():
    table = (DOCS / "sweeps.md").read_text()
    keys = {key for row in re.findall(r"^\| (`.*?`) \|", table, re.M) for key in re.findall(r"`(\w+)`", row)}
    assert keys == {*sweep.Sweep.model_fields, "num_steps", "steps", "gamma", "guidance"}
    assert all(f"{name}:" in table for name in sweep.ModelSpec.model_fields)
    assert all(f"{name}: …" in table for name in sweep.Schedule.model_fields)


# Command line --------------------------------------------------------------------------------------------------------


def commands(text):
    """Every dfengine command, split into words: in sh blocks, on indented lines, and in comments of a prompts file."""
    fenced = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    joined = "\n".join(fenced + re.findall(r"^(?: {4}|# {3})(dfengine .*)$", text, re.M))
    lines = re.findall(r"^(?:srun )?(dfengine .*)$", re.sub(r"\\\n\s*", " ", joined), re.M)
    return [shlex.split(line, comments=True) for line in lines]


def inline_commands(text):
    """Every command between single backticks, split into words; some are abbreviated."""
    return [shlex.split(command) for command in re.findall(r"`(dfengine [a-z][^`]*)`", text)]


def parse(words, *, is_complete):
    """Parse a command without running it. Only an abbreviated one may lack its verb's arguments, or a group's verb."""
    _, *arguments = words
    command, verb = typer.main.get_command(build_app(words)), "dfengine"
    while isinstance(command, typer.core.TyperGroup):
        if not arguments and not is_complete:
            return
        verb, *arguments = arguments
        if verb not in command.commands:
            pytest.fail(f"{shlex.join(words)}: no command {verb!r}")
        command = command.commands[verb]
    if "--help" in arguments:  # would print it
        return
    try:
        command.make_context(verb, arguments)
    except typer.TyperException as error:
        if is_complete or type(error).__name__ != "MissingParameter":
            pytest.fail(f"{shlex.join(words)}: {error.format_message()}")


@pytest.mark.slow
@pytest.mark.parametrize("path", [*DOCUMENTS, DOCS / "formats.txt"], ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_parse(path):
    text = path.read_text()
    for words in commands(text):
        parse(words, is_complete=True)
    for words in inline_commands(text):
        parse(words, is_complete=False)


def test_options_named_in_the_text_exist():
    app = typer.main.get_command(build_app(["explain", "profile"]))
    verbs = [*app.commands.values(), *app.commands["evaluate"].commands.values()]
    options = {flag for verb in verbs for one in verb.params for flag in (*one.opts, *one.secondary_opts)}
    named = {flag for path in DOCUMENTS[:-2] for flag in re.findall(r"`(--[a-z-]+)", path.read_text())}
    assert len(named) > 20
    assert named - options == set()


def test_commands_are_extracted_and_checked():
    text = (
        '```sh\ndfengine explain "a cat" \\\n  -o c.h5   # a note\n```\n    dfengine info run/\n# `dfengine profile`\n'
    )
    assert commands(text) == [["dfengine", "explain", "a cat", "-o", "c.h5"], ["dfengine", "info", "run/"]]
    assert inline_commands(text) == [["dfengine", "profile"]]
    assert sum(len(commands(path.read_text())) for path in DOCUMENTS) > 30
    parse(["dfengine", "evaluate"], is_complete=False)
    with pytest.raises(pytest.fail.Exception, match="No such option: --nought"):
        parse(["dfengine", "info", "run.h5", "--nought"], is_complete=False)
    with pytest.raises(pytest.fail.Exception, match="No such option: --games"):
        parse(["dfengine", "evaluate", "truth", "--games"], is_complete=False)
    with pytest.raises(pytest.fail.Exception, match="no command 'nought'"):
        parse(["dfengine", "evaluate", "nought"], is_complete=False)
    with pytest.raises(pytest.fail.Exception, match="Missing argument"):
        parse(["dfengine", "info"], is_complete=True)


# Links, names and tables ---------------------------------------------------------------------------------------------


def anchors(path):
    """The anchors that GitHub gives to the headings of a document."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "path",
    [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_links_resolve(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            linked = (path.parent / file).resolve() if file else path
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


def test_code_references_of_methods_resolve():
    paragraphs = re.findall(r"^Code: .*?\.$", (DOCS / "methods.md").read_text(), re.M | re.DOTALL)
    references = [
        reference for text in paragraphs for reference in re.findall(r"`(\S+\.py)`:((?:\s+`[\w.]+`,?)+)", text)
    ]
    assert (len(paragraphs), len(references)) == (17, 36)
    for file, names in references:
        module = importlib.import_module(file.removeprefix("kernels/").removesuffix(".py").replace("/", "."))
        for name in re.findall(r"`([\w.]+)`", names):
            value = module
            for part in name.split("."):
                value = getattr(value, part)
            assert value.__module__ == module.__name__, f"{file}: {name}"


def explainers_table():
    """The explainers of this package with their settings and defaults, in Markdown."""
    lines = ["| `-e` | in Python | explains | settings |", "|---|---|---|---|"]
    # Sorted, since the order of registration depends on imports; explainers of presets come last.
    for _, entry in sorted(
        registry.entries().items(), key=lambda named: (named[0].startswith("xdiffusion-"), named[0])
    ):
        if entry.explainer.__module__.startswith("dfengine.explain."):
            settings = ", ".join(f"`{one.name}={one.default!r}`" for one in entry.options) or "none"
            cells = (f"`{entry.name}`", f"`{entry.explainer.__name__}`", f"{entry.label}: {entry.summary}", settings)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def methods_with_explainers():
    """docs/methods.md with the table of explainers that the code declares."""
    before, begin, rest = (DOCS / "methods.md").read_text().partition("<!-- explainers: begin -->\n")
    _, end, after = rest.partition("<!-- explainers: end -->\n")
    assert begin
    assert end
    return before + begin + explainers_table() + end + after


def test_table_of_explainers_matches_the_registry():
    """To rewrite it: python tests/test_docs.py."""
    table = explainers_table()
    assert table.count("\n") == 2 + 10
    rise = next(line for line in table.splitlines() if line.startswith("| `rise` | `Rise` | DF-RISE: Which places"))
    assert "| `num_masks=256`, `output='x0'`, `similarity='structure'`, `score='local'`" in rise
    assert (DOCS / "methods.md").read_text() == methods_with_explainers()


def test_formulas_survive_markdown():
    """GitHub removes a backslash before punctuation, and a formula ends at the end of its line."""
    for path in DOCUMENTS:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
        formula = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$")
        assert "$" not in formula.sub("", text), path
        for display, inline in formula.findall(text):
            assert not re.search(r"\\[^A-Za-z]", display + inline), display + inline
            assert (display + inline).count("{") == (display + inline).count("}"), display + inline


def test_when_compiling_pays_off():
    minutes = {
        device: round(tuning.MIN_COMPILE_PAYOFF * expected.seconds / (1 - 1 / expected.speedup) / 60)
        for device, expected in tuning.COMPILE_COSTS.items()
    }
    text = f"over {minutes['cpu']} min on a CPU, {minutes['cuda']} min on a GPU"
    assert text in (DOCS / "performance.md").read_text()


if __name__ == "__main__":
    (DOCS / "methods.md").write_text(methods_with_explainers())
