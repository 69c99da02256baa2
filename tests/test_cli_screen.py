"""What reaches the terminal: control characters are visible, logs show progress, interruptions say what was kept."""

import ast
import io
import json
import logging
import os
import re
import signal
import time
from pathlib import Path

import pytest
import typer.main
from analytic import Analytic
from commands import dfengine_command, dfengine_fork

import dfengine
from dfengine import Engine, Random, Rise, store
from dfengine.cli import progress, screen

SOURCES = sorted((Path(dfengine.__file__).parent / "cli").glob("*.py"))
#: Sets a terminal's title, overwrites a line, reorders what follows, and is no character at all.
HOSTILE = "a\x1b]0;b\x07\x9b2J\r\x7f\u202ec\ud800"
VISIBLE = r"a\x1b]0;b\x07\u009b2J\r\u007f\u202ec\ud800"
CAPTION = "a red circle above a blue square on a gray background"


def test_what_a_terminal_would_act_on_is_visible() -> None:
    assert screen.printable(HOSTILE) == VISIBLE
    assert screen.printable("two\nlines\tand\x85more\u2028") == r"two\nlines\tand\u0085more\u2028"


@pytest.mark.parametrize("text", ["a photo, 3.5 × 2", "ünïcode", "猫", "क्षि", "👩\u200d🔬", "a\xa0b", r"a\x1b"])
def test_text_is_left_alone(text: str) -> None:
    """Among it are joiners, without which some scripts are misspelt."""
    assert screen.printable(text) == text


def test_escapes_within_json_are_its_own() -> None:
    value = {"text": HOSTILE}
    assert json.loads(screen.printable(json.dumps(value))) == value
    assert json.loads(screen.printable(json.dumps(value, ensure_ascii=False))) == value


def test_everything_is_printed_by_the_screen() -> None:
    """Nothing else in the command line prints, so nothing passes by `printable`."""
    printing = {
        path.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and re.fullmatch(r"print|.*echo|.*err\.print", ast.unparse(node.func))
    }
    assert printing == {"screen.py"}


def test_choices_of_options_are_those_of_the_code() -> None:
    from dfengine import evaluate
    from dfengine.cli import build_app
    from dfengine.explain.registry import PRESETS
    from dfengine.models.attention import BACKENDS
    from dfengine.models.loading import DTYPES
    from dfengine.store.file.template import COMPRESSIONS

    app = typer.main.get_command(build_app(["explain"]))
    explain, games = app.commands["explain"], app.commands["evaluate"].commands["games"]  # type: ignore[attr-defined]
    choices = {one.name: one.type_descriptor.choices for one in [*explain.params, *games.params] if one.name != "help"}
    assert {name: values for name, values in choices.items() if values} == {
        "preset": PRESETS,
        "sampling": ("uniform", "early", "latter"),
        "attention": BACKENDS,
        "dtype": tuple(DTYPES),
        "compression": COMPRESSIONS,
        "distance": evaluate.DISTANCES,
        "refill": evaluate.REFILLS,
    }


@pytest.fixture(scope="module")
def hostile_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished file whose model, method, prompt and environment are hostile."""
    denoiser = Analytic(lambda x, _: x)
    denoiser.name = HOSTILE[:-1]
    denoiser.encode_prompts = lambda prompts: Analytic.encode_prompts(denoiser, ["1" for _ in prompts])  # type: ignore[method-assign]
    out = tmp_path_factory.mktemp("files") / "run.h5"
    random = Random()
    object.__setattr__(random, "name", HOSTILE[:-1])  # settings refuse it
    Engine(denoiser).explain(HOSTILE[:-1], random, num_steps=2, out=out)
    return out


@pytest.mark.parametrize(
    "arguments", [["info"], ["info", "--json"], ["watch", "--once"], ["figures", "--method", HOSTILE]]
)
def test_hostile_files_and_options_are_shown_as_they_are(
    hostile_file: Path, tmp_path: Path, arguments: list[str]
) -> None:
    verb, *options = arguments
    run = dfengine_command(verb, str(hostile_file), *options)
    printed = run.stdout + run.stderr
    assert printed.replace("\n", "").isprintable(), printed
    if verb == "info":
        assert printed.count("9b2J") >= 3, "model, method and prompt"


def test_errors_notes_and_paths_are_shown_as_they_are(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = dfengine_command("info", str(tmp_path / "\x1b[2Jx\nline.h5"))
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert r"\x1b[2Jx" in run.stderr
    with screen.logged():
        logging.getLogger("dfengine.test").info("a \x1b[31mnote\nof two lines :cat: [bold]")
    assert capfd.readouterr().err == "dfengine: note: a \\x1b[31mnote of two lines :cat: [bold]\n"


def test_torch_does_not_warn_of_a_missing_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    with screen.logged():
        logging.getLogger("torch.utils.cpp_extension").warning("No CUDA runtime is found, using CUDA_HOME='/cuda'")
    assert capfd.readouterr().err == ""


# Progress ------------------------------------------------------------------------------------------------------------


def test_a_log_has_a_line_now_and_then_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.05)
    with progress.bar("loading the model") as bar:
        time.sleep(0.12)
        bar.begin("explaining, maps", 30, done=10)
        bar.update(20)
        time.sleep(0.12)
        bar.update(30)
    first, *others, last = capfd.readouterr().err.splitlines()
    assert first == "dfengine: loading the model"
    line = r"dfengine: explaining, maps: 20 of 30, [\d.]+ a minute, 0\.\d s left"
    assert any(re.fullmatch(line, other) for other in others)
    assert re.fullmatch(r"dfengine: explaining, maps: 30 of 30, [\d.]+ a minute, 0\.0 s left", last)


def test_short_work_leaves_no_line_in_a_log(capfd: pytest.CaptureFixture[str]) -> None:
    with progress.bar("packing", 2) as bar:
        bar.advance(2)
    assert capfd.readouterr().err == ""


def test_the_rate_leaves_out_what_was_done_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.0, 60.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    bar = progress.Bar("starting")
    bar.begin("explaining, maps", 40, done=30)
    bar.advance(2)
    assert str(bar) == "explaining, maps: 32 of 40, 2.0 a minute, 4 min left"


@pytest.mark.soak
def test_json_begins_with_totals_also_of_a_resumed_run(tmp_path: Path) -> None:
    out = tmp_path / "run.h5"

    def stop(event: object) -> None:
        if isinstance(event, dfengine.StepMap) and event.step == 1:
            raise KeyboardInterrupt

    engine = Engine.from_pretrained("shapes", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        engine.explain(CAPTION, Rise(4), num_steps=4, out=out, on_event=stop)
    with store.open(store.part_path(out)) as run:
        done = int(run[0].done["rise"].sum())
    options = ["-o", str(out), "--steps", "4", "--masks", "4", "--json"]
    first, *events, last = map(json.loads, dfengine_command("explain", CAPTION, *options).stdout.splitlines())
    assert first == {"event": "Started", "items": 1, "maps": 4, "maps_done": done}
    assert done >= 1
    assert [event["event"] for event in events].count("StepMap") == 4 - done
    assert last["event"] == "Outcome"


@pytest.mark.soak
def test_a_terminated_run_says_what_it_kept(tmp_path: Path) -> None:
    out, part = tmp_path / "run.h5", tmp_path / "run.part.h5"
    process = dfengine_fork("explain", CAPTION, "-o", str(out), "--masks", "64", "--no-compile")
    deadline = time.monotonic() + 200
    while not (part.exists() and store.progress(part).parts[0].maps):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert errors == f"dfengine: interrupted; completed work is in {part}; rerun the same command to resume\n"


def test_output_that_an_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch, hostile_file: Path) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    monkeypatch.setattr("sys.argv", ["dfengine", "info", str(hostile_file)])
    with pytest.raises(SystemExit) as raised:
        dfengine.cli.main()
    assert not raised.value.code
    stdout.seek(0)
    assert r"\xd7" in stdout.read()
