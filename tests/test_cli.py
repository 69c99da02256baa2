"""The command line as users see it, in a process of its own, and the message of every error."""

import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import dfengine_command, dfengine_fork, dfengine_process

import dfengine
from dfengine.cli import main

CAPTION = "a red circle above a blue square on a gray background"
QUICK = ["--num-steps", "2", "--num-masks", "4"]


@pytest.fixture
def error_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail and return its error: one line, exit status 2, no traceback, empty stdout."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["dfengine", *arguments])
        with pytest.raises(SystemExit) as raised:
            main()
        captured = capfd.readouterr()
        assert raised.value.code == 2, captured.err
        assert captured.out == ""
        (line,) = captured.err.strip().splitlines()
        assert line.startswith("dfengine: ")
        return line

    return run


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run, written by the command line."""
    out = tmp_path_factory.mktemp("made") / "run.h5"
    run = dfengine_command("explain", CAPTION, "-o", str(out), *QUICK, "--seed", "3", "--sampling", "early")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{out}: 2 steps explained by rise, in ")
    return out


@pytest.mark.slow
def test_explain_writes_the_requested_maps(run_file: Path) -> None:
    with dfengine.open(run_file) as run:
        (item,) = run
        assert (item.prompt, item.seed) == (CAPTION, 3)
        assert item.timesteps.tolist() == dfengine.exponential_timesteps(2, 60, "early")
        assert item.scores["rise"].shape == (2, 4)
        assert item.done["rise"].all()


@pytest.mark.slow
def test_info_as_text_and_as_json(run_file: Path) -> None:
    info = dfengine_command("info", str(run_file))
    first, environment, images, rise, image = info.stdout.splitlines()
    assert first.startswith(f"{run_file}: finished, 0.")
    assert "shapes on cpu; dfengine" in environment
    assert "1 of 1, 2 steps each, 64 × 64 pixels, in" in images
    assert rise.endswith("2 of 2 maps: Rise(num_masks=4)")
    assert image.endswith(f"{CAPTION!r}, seed 3, guidance 2, time-steps 999 to 106")
    summary = json.loads(dfengine_command("info", str(run_file), "--json").stdout)
    assert summary["maps_done"] == {"rise": 2}
    assert summary["model"] == "shapes"
    assert summary["jobs"][0]["seed"] == 3


@pytest.mark.slow
def test_merge_combines_several_files(run_file: Path, tmp_path: Path, error_line: Callable[..., str]) -> None:
    other, out = tmp_path / "other.h5", tmp_path / "all.h5"
    options = (*QUICK, "--seed", "4", "--sampling", "early")
    assert dfengine_command("explain", CAPTION, "-o", str(other), *options).returncode == 0
    run = dfengine_command("merge", str(run_file), str(other), str(run_file), "-o", str(out))
    assert (run.returncode, run.stdout) == (0, f"{out}: 2 images\n")
    with dfengine.open(out) as merged, dfengine.open(run_file) as first:
        assert [item.seed for item in merged] == [3, 4]
        assert (merged[0].maps["rise"][...] == first[0].maps["rise"][...]).all()
    assert "--overwrite" in error_line("merge", str(run_file), "-o", str(out))
    assert "does not exist" in error_line("merge", "nothing.h5", "-o", str(tmp_path / "more.h5"))


@pytest.mark.slow
def test_figures_writes_a_picture(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "rise.png"
    run = dfengine_command("figures", str(run_file), "-o", str(out))
    assert (run.returncode, run.stdout) == (0, f"{out}\n")
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.soak
def test_several_explainers_share_a_file_and_are_drawn(tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    flags = [part for name in ("cam", "relevance", "attention", "cam") for part in ("--explainer", name)]
    options = ["--layer", "mid_block.*", "--word", "red circle", "--no-self-attention", "--text-attention"]
    run = dfengine_command("explain", CAPTION, "-o", str(out), "--steps", "2", *flags, *options)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{out}: 2 steps explained by cam, relevance, attention, in ")
    with dfengine.open(out) as opened:
        (item,) = opened
        cam = dfengine.Cam(layers=("mid_block.*",))
        relevance = dfengine.Relevance(self_attention=False, text_attention=True)
        assert list(item.settings.values()) == [cam, relevance, dfengine.Attention(words=("red circle",))]
        assert list(item.maps["cam"]) == [
            "combined",
            "mid_block.resnets.0",
            "mid_block.attentions.0",
            "mid_block.resnets.1",
        ]
        assert item.words == ("red circle",)
        assert item.concept("red circle").shape == (2,)
    for method in ("cam", "relevance", "attention"):
        picture = tmp_path / f"{method}.png"
        process = dfengine_command("figures", str(out), "-o", str(picture), "--method", method)
        assert process.returncode == 0, process.stderr
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_layers_are_listed_as_text_and_as_json(error_line: Callable[..., str]) -> None:
    listing = dfengine_command("layers").stdout.splitlines()
    assert len(listing) == 22
    assert listing[0].split() == ["down_blocks.0.resnets.0", "ResnetBlock2D", "48", "channels,", "16", "×", "16"]
    middle = json.loads(dfengine_command("layers", "mid_block.*", "--json").stdout)
    assert middle == {
        "mid_block.resnets.0": [96, 4, 4],
        "mid_block.attentions.0": [96, 4, 4],
        "mid_block.resnets.1": [96, 4, 4],
    }
    assert "no layer is called 'mid'" in error_line("layers", "mid")


@pytest.mark.soak
def test_the_exit_status_of_sanity_is_its_outcome() -> None:
    run = dfengine_command("evaluate", "sanity", "--limit", "1", "--num-masks", "2", "--json")
    (outcome,) = json.loads(run.stdout)
    assert list(outcome["randomised"]) == ["rise", "cam", "relevance", "attention"]
    assert outcome["relevance_kept"]["high"] < 1
    assert run.returncode == (1 if outcome["failures"] else 0)


@pytest.mark.grid
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["sanities"], "No such command 'sanities'"),
        (["recovery", "--model", "none"], "'none' is not known"),
        (["sanity", "--limit", "0"], "'--limit': '0' is not possible: expected a whole number of at least 1"),
        (["concepts", "--seeds", "0"], "'--seeds': '0' is not possible"),
        (["concepts", "--prompts", "none.txt"], "'none.txt' cannot be read: No such file"),
        (["concepts", "--figure", "a.jpg"], "expected .png, .pdf or .svg"),
        (["concepts", "--prompt", "a red dog"], "does not know 'dog'"),
        (["sanity", "--prompt", "a red dog"], "does not know 'dog'"),
        (["sanity", "--model", "none"], "'none' is not known"),
        (["games", "--preset", "code"], "'--preset': 'code' is not one of 'default', 'paper', 'xdiffusion'"),
        (["truth", "--prompt", "a cat"], "embedded world"),
    ],
)
def test_evaluation_errors_are_one_line(error_line: Callable[..., str], arguments: list[str], message: str) -> None:
    assert message in error_line("evaluate", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to show: name a prompt"),
        ([CAPTION, "--seeds", "0"], "'--seeds': '0' is not possible: expected a whole number from 1 to 1000"),
        ([CAPTION, "--gamma", "-1"], "'--gamma': '-1' is not possible: expected a finite number of at least 0"),
        ([CAPTION, "--steps", "0"], "'0' is not possible: expected a whole number of at least 1"),
        (["a red dog"], "does not know 'dog'"),
        (["--prompts", "none.csv"], "'none.csv' cannot be read"),
    ],
)
def test_sample_errors_are_one_line(
    error_line: Callable[..., str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert message in error_line("sample", *arguments, "-o", str(tmp_path / "s.png"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_existing_file_is_not_overwritten(run_file: Path, error_line: Callable[..., str]) -> None:
    before = run_file.read_bytes()
    assert "--overwrite" in error_line("explain", CAPTION, "-o", str(run_file), *QUICK)
    assert run_file.read_bytes() == before


def test_help_lists_commands_and_settings() -> None:
    for flag in ("--help", "-h"):
        text = dfengine_command(flag).stdout
        for verb in ("explain", "sample", "profile", "layers", "evaluate", "info", "merge", "figures"):
            assert f" {verb} " in text
    run = dfengine_command("explain", "-h")
    assert run.returncode == 0
    for part in ("masks a step", "Settings of DF-RISE", "Settings of DF-CAM", "Device and speed", "--preset"):
        assert part in run.stdout


def test_the_version_is_printed() -> None:
    assert dfengine_command("--version").stdout == f"dfengine {dfengine.__version__}\n"


@pytest.mark.slow
def test_names_of_other_tools_are_aliases(tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    names = ["--output", str(out), "--num-inference-steps", "2", "--guidance-scale", "3", "-e", "random"]
    assert dfengine_command("explain", CAPTION, *names).returncode == 0
    with dfengine.open(out) as run:
        assert run[0].job.guidance == 3
        assert len(run[0].timesteps) == 2


@pytest.mark.slow
def test_defaults_match_those_of_the_python_api(tmp_path: Path) -> None:
    """Settings that are not given take the explainer's defaults."""
    out = tmp_path / "run.h5"
    assert (
        dfengine_command("explain", CAPTION, "-o", str(out), "--steps", "1", "-e", "random", "-e", "cam").returncode
        == 0
    )
    with dfengine.open(out) as opened:
        assert opened[0].settings == {"random": dfengine.Random(), "cam": dfengine.Cam()}


@pytest.mark.slow
def test_the_home_folder_is_expanded_within_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = dfengine_command("explain", CAPTION, "--out=~/run.h5", "--steps", "1", "-e", "random")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run.h5").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "no/such/folder/trace.json"], "'no/such/folder/trace.json' cannot be written"),
        (["--trace", "."], "'.' cannot be written"),
        (["--seconds", "inf"], "'--seconds': 'inf' is not possible: expected a finite number above 0"),
        (["--images", "0"], "'--images': '0' is not possible"),
        (["--seconds", "0"], "'--seconds': '0' is not possible"),
        (["--model", "sd15"], "'sd15' is an architecture without weights"),
        (["--batch-size", "x"], "'--batch-size': 'x' is not understood"),
    ],
)
def test_profile_errors_are_one_line(error_line: Callable[..., str], arguments: list[str], message: str) -> None:
    assert message in error_line("profile", *arguments)


@pytest.mark.slow
def test_a_job_without_notes_is_silent(tmp_path: Path) -> None:
    """Notes go to stderr, and a job that needs none prints nothing there."""
    quiet = dfengine_command("explain", CAPTION, "-o", str(tmp_path / "a.h5"), *QUICK, "--batch-size", "auto")
    assert (quiet.returncode, quiet.stderr) == (0, "")


@pytest.mark.soak
def test_a_missing_compiler_is_a_one_line_error(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": "no-such-compiler"}
    run = dfengine_process("explain", CAPTION, "-o", str(tmp_path / "b.h5"), *QUICK, "--compile", env=environment)
    assert run.returncode == 2
    *progress, error = run.stderr.splitlines()  # where this takes long, how far it is comes first
    assert re.fullmatch(r"dfengine: the network could not be compiled: .*; leave compile out", error)
    assert all(line.startswith("dfengine: generating") for line in progress)


@pytest.mark.soak
def test_a_new_process_prints_the_same_output(tmp_path: Path) -> None:
    run = dfengine_process("explain", CAPTION, "-o", str(tmp_path / "run.h5"), *QUICK)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith(f"{tmp_path / 'run.h5'}: 2 steps explained by rise, in ")


@pytest.mark.soak
def test_a_traceback_never_reaches_the_user() -> None:
    run = dfengine_process("explain", "a red dog", "-o", "run.h5")
    assert run.returncode == 2
    assert run.stderr.startswith("dfengine: the model does not know 'dog'")
    assert run.stderr.count("\n") == 1


@pytest.mark.grid
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", *QUICK], "the prompt is empty"),
        (["a red dog", *QUICK], "does not know 'dog'; its words are: a above"),
        (["a red circle " * 6, *QUICK], "tokens and the model takes 14: '.*' would be cut"),
        ([CAPTION, "--masks", "0"], "0 masks are not possible"),
        ([CAPTION, "--masks", "-5"], "-5 masks are not possible"),
        ([CAPTION, "--steps", "0", "--masks", "4"], "'0' is not possible"),
        ([CAPTION, "--steps", "1001", "--masks", "4"], "more than the 1000"),
        ([CAPTION, *QUICK, "--keep-probability", "1"], r"outside \(0, 1\)"),
        ([CAPTION, *QUICK, "--keep-probability", "-0.5"], r"outside \(0, 1\)"),
        (
            [CAPTION, *QUICK, "--sampling", "middle"],
            "'--sampling': 'middle' is not one of 'uniform', 'early', 'latter'",
        ),
        ([CAPTION, *QUICK, "--sampling", "early", "--gamma", "-1"], "'--gamma': '-1' is not possible"),
        ([CAPTION, *QUICK, "--similarity", "psnr"], "similarity 'psnr' is not known"),
        ([CAPTION, *QUICK, "--batch-size", "0"], "'--batch-size': '0' is not understood"),
        (
            [CAPTION, *QUICK, "--batch-size", "many"],
            "'many' is not understood: expected a number of at least 1, or auto",
        ),
        ([CAPTION, *QUICK, "--batch-size", "-4"], "'-4' is not understood"),
        ([CAPTION, *QUICK, "--attention", "flash"], "'flash' is not one of 'auto', 'sdpa'"),
        ([CAPTION, *QUICK, "--attention", "xformers", "--device", "cpu"], "needs a CUDA device, but the device is cpu"),
        ([CAPTION, *QUICK, "--model", "no-such-model"], "'no-such-model' is not known: expected 'shapes'"),
        ([CAPTION, *QUICK, "--model", "/no/such/folder"], "no model at '/no/such/folder'"),
        ([CAPTION, *QUICK, "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (
            [CAPTION, *QUICK, "--device", "abacus"],
            "device 'abacus' cannot be used: expected cpu, cuda, cuda:0 … or mps",
        ),
        ([CAPTION, *QUICK, "--dtype", "float8"], "'--dtype': 'float8' is not one of 'float32'"),
        (
            [CAPTION, *QUICK, "--seed", "-1"],
            "'--seed': '-1' is not possible: expected a whole number of at least 0",
        ),
        ([CAPTION, *QUICK, "--seed", "1.5"], "'1.5' is not possible: expected a whole number of at least 0"),
        ([CAPTION, *QUICK, "--nope"], "No such option: --nope"),
        ([CAPTION, *QUICK, "--guidance", "nan"], "guidance"),
        ([CAPTION, "--masks", "999999999999"], "at most 16777216"),
        ([CAPTION, *QUICK, "--device", "meta"], "device 'meta' cannot be used"),
        ([CAPTION, *QUICK, "-e", "cams"], "explainer 'cams' is not known: expected one of .*did you mean 'cam'"),
        ([CAPTION, "-e", "cam", "--layer", "middle"], "no layer is called 'middle': shapes has 22, from down_"),
        ([CAPTION, "-e", "cam", "--target", "guided"], "target 'guided' is not possible with DF-CAM"),
        ([CAPTION, *QUICK, "--layer", "mid*"], "--layers is a setting of cam: add -e cam"),
        (
            [CAPTION, "-e", "cam", "--word", "red"],
            "--words is a setting of attention and counterfactual: add -e attention",
        ),
        ([CAPTION, *QUICK, "-e", "cam"], "--num-masks is a setting of rise and xdiffusion-rise: add -e rise"),
        ([CAPTION, *QUICK, "--preset", "old"], "'--preset': 'old' is not one of"),
        (["a \udcff cat", *QUICK], "expected text without lone surrogates"),
        (
            [CAPTION, "-e", "relevance", "--target", "unconditional"],
            "--target is a setting of cam and .*rise.*: add -e cam",
        ),
        ([CAPTION, "-e", "attention", "--word", "dog"], "'dog' is not in the prompt 'a red circle above"),
    ],
)
def test_explain_errors_are_one_line(
    error_line: Callable[..., str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert re.search(message, error_line("explain", *arguments, "-o", str(tmp_path / "run.h5")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_generation_out_of_range_is_a_one_line_error(error_line: Callable[..., str], tmp_path: Path) -> None:
    assert "out of range" in error_line(
        "explain", CAPTION, "-o", str(tmp_path / "run.h5"), *QUICK, "--guidance", "1e300"
    )


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "run.txt", "run.part.h5", "."])
def test_invalid_result_names_are_rejected(error_line: Callable[..., str], tmp_path: Path, name: str) -> None:
    assert "cannot be the name of a result" in error_line("explain", CAPTION, "-o", str(tmp_path / name), *QUICK)


@pytest.mark.slow
def test_unwritable_output_paths_are_one_line_errors(error_line: Callable[..., str], tmp_path: Path) -> None:
    assert "does not exist" in error_line("explain", CAPTION, "-o", str(tmp_path / "no" / "run.h5"), *QUICK)
    (tmp_path / "file").touch()
    assert "not a folder" in error_line("explain", CAPTION, "-o", str(tmp_path / "file" / "run.h5"), *QUICK)
    # Not even root, whom permission bits do not restrict, can create files in /proc.
    assert "cannot write" in error_line("explain", CAPTION, "-o", "/proc/run.h5", *QUICK)


@pytest.mark.slow
def test_a_full_disk_is_a_one_line_error(tmp_path: Path) -> None:
    out = tmp_path / "run.h5"

    def limit() -> None:
        """Limit the size of files, the closest thing to a full disk that needs no mount."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))

    run = dfengine_fork("explain", CAPTION, "-o", str(out), "--steps", "12", "--masks", "8", before=limit)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 2, errors
    (line,) = errors.strip().splitlines()
    assert "cannot write" in line
    assert not out.exists()


@pytest.mark.slow
def test_ctrl_c_keeps_completed_work(tmp_path: Path) -> None:
    out, part = tmp_path / "run.h5", tmp_path / "run.part.h5"
    process = dfengine_fork("explain", CAPTION, "-o", str(out), "--masks", "64", "--no-compile")
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if part.exists():
            with dfengine.open(part) as run:
                if run[0].done["rise"].sum() >= 2:
                    break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert errors.strip().splitlines() == [
        f"dfengine: interrupted; completed work is in {part}; rerun the same command to resume"
    ]
    with dfengine.open(part) as run:
        assert 2 <= run[0].done["rise"].sum() < 30
        assert not run.finished
        assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "cam"], "no map 'cam'"),
        (["--step", "7"], r"step 7 is outside \[0, 1\]"),
        (["--item", "3"], "item 3"),
    ],
)
def test_figures_of_missing_data_are_rejected(
    error_line: Callable[..., str], run_file: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert re.search(message, error_line("figures", str(run_file), "-o", str(tmp_path / "rise.png"), *arguments))


@pytest.mark.slow
def test_figures_with_invalid_paths_are_rejected(
    error_line: Callable[..., str], run_file: Path, tmp_path: Path
) -> None:
    assert "expected .png, .pdf or .svg" in error_line("figures", str(run_file), "-o", str(tmp_path / "rise.jpg"))
    assert "does not exist" in error_line("figures", str(run_file), "-o", str(tmp_path / "no" / "rise.png"))
    assert "does not exist" in error_line("figures", str(tmp_path / "none.h5"), "-o", str(tmp_path / "rise.png"))
    (tmp_path / "text.h5").write_text("not a file of ours")
    assert "not an HDF5 file" in error_line("info", str(tmp_path / "text.h5"))
