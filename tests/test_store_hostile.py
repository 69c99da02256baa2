"""Files that somebody else wrote: every verb ends with a result or with one line, and reads nothing but the file."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import hostile
import numpy as np
import pytest
from commands import dfengine_command
from hostile import FILES, PLAN, SECRET
from marks import soak

from dfengine import store

pytestmark = pytest.mark.filterwarnings("default")

#: What each verb is given besides the file. It writes to a file or folder "out" with the ending.
VERBS = {
    "info": (["info", "{run}"], ""),
    "info --json": (["info", "{run}", "--json"], ""),
    "watch": (["watch", "{run}", "--once"], ""),
    "merge": (["merge", "{run}", "-o", "{out}"], ".h5"),
    "export": (["export", "{run}", "-o", "{out}"], ".zarr"),
    "report": (["report", "{run}", "-o", "{out}"], ".html"),
    "figures": (["figures", "{run}", "-o", "{out}", "--gif"], ".figures"),
    "one figure": (["figures", "{run}", "-o", "{out}"], ".png"),
}


#: Further cases of what others show.
REPEATED = {
    *(f"bits flipped {seed}" for seed in range(4, 20)),
    *("maps/saliency nan", "maps/saliency 3e+38", "maps/error -inf", "curves/relevance inf", "curves/heat nan"),
    *("schedule/timestep nan", "schedule/signal nan", "items/seconds -inf", "items/seconds 1e+300"),
    *("items/prompt_index 4294967295", "items/attempt 4294967295", "latents/latent inf", "plan with no methods"),
}
ONE_OF_EACH_KIND = {
    *("external link maps", "external storage", "virtual dataset", "without items/done", "image of floats", "empty"),
    *("10^9 × 10^9", "plan nested deeply", "another checksum", "truncated", "pipe", "folder", "marked_as_live"),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return hostile.write(tmp_path_factory.mktemp("hostile") / "run.h5").read_bytes()


@pytest.fixture
def path(original: bytes, tmp_path: Path) -> Path:
    """A complete run, which a test then damages."""
    (tmp_path / "run.h5").write_bytes(original)
    return tmp_path / "run.h5"


def run_verb(verb: str, path: Path) -> None:
    """Run a verb on a file and check how it ends, what it prints and what it writes."""
    arguments, ending = VERBS[verb]
    out = path.parent / f"out{ending}"
    done = dfengine_command(*(argument.format(run=path, out=out) for argument in arguments))
    assert done.returncode in (0, 2), done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith("dfengine: note: ")]
    assert len(errors) == (done.returncode == 2), done.stderr
    assert all(line.isprintable() for line in [*done.stdout.splitlines(), *errors]), "nothing that a terminal acts on"
    assert "PRIVATE KEY" not in done.stdout + done.stderr
    written = [file for file in path.parent.rglob("*") if file.is_file() and file.name.startswith("out")]
    for file in [*written, *out.rglob("*")] if out.is_dir() else written:
        assert not file.is_file() or SECRET[:27] not in file.read_bytes()
    left = {file.name for file in path.parent.iterdir()} - {"run.h5", "other.h5", "secret", out.name}
    assert not left, "no leftovers, and nothing outside"


def read_everything(run: store.Run | store.RunFolder) -> Iterator[np.ndarray]:
    """All arrays of a run that is finished, and all texts."""
    yield from (np.asarray(values) for values in run.to_xarray().data_vars.values())
    for item in run:
        yield from (np.asarray(maps) for method in item.maps for maps in [item.saliency(method)])
        yield from map(np.asarray, [*item.cam.values(), *item.errors.values(), *item.scores.values()])
        yield from map(np.asarray, (item.latents, item.epsilon, item.image, item.previews, item.signal, item.timesteps))


def keeps_the_secret(path: Path) -> bool:
    with store.open(path) as run:
        assert all(line.isprintable() for line in store.summary_lines(run))
        return all(SECRET[:27] not in values.tobytes() for values in read_everything(run))


def test_the_original_is_read(path: Path) -> None:
    with store.open(path) as run:
        assert run.finished
        assert all(np.isfinite(values).any() for values in read_everything(run))
    for verb in ("info", "watch", "merge"):
        run_verb(verb, path)
    assert keeps_the_secret(path.with_name("out.h5"))


@pytest.mark.parametrize("name", [soak(name) if name in REPEATED else name for name in FILES])
def test_a_file_is_read_and_merged_or_refused(name: str, path: Path) -> None:
    FILES[name](path)
    try:
        store.open(path).close()
    except store.StoreError:
        return  # every verb begins with this
    for read in (
        lambda: keeps_the_secret(path),
        lambda: keeps_the_secret(store.merge([path], path.with_name("out.h5"))),
        lambda: store.progress(path),
    ):
        with suppress(store.StoreError):
            assert read()


@pytest.mark.parametrize("name", [name if name in ONE_OF_EACH_KIND else soak(name) for name in FILES])
def test_a_file_is_resumed_or_refused(name: str, path: Path) -> None:
    FILES[name](path)
    part = path.rename(path.with_name("run.part.h5"))
    with suppress(store.StoreError), store.Writer.resume(path, PLAN):
        pass
    assert path.exists() != (part.exists() or part.is_symlink()), "what could not be continued is still there"
    assert not path.exists() or keeps_the_secret(path)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in FILES
        if name.startswith(("external", "virtual", "plugin", "soft", "10^", "image of", "without"))
    ],
)
def test_what_leads_out_of_the_file_or_is_not_as_planned_is_refused_at_opening(name: str, path: Path) -> None:
    FILES[name](path)
    with pytest.raises(store.StoreError, match=r"run\.h5 is damaged: .*"):
        store.open(path)


@pytest.mark.soak
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", FILES)
def test_every_verb_on_every_file(name: str, verb: str, path: Path) -> None:
    FILES[name](path)
    run_verb(verb, path)


@pytest.mark.soak
@pytest.mark.parametrize("name", FILES)
def test_explain_resumes_or_refuses_every_file(name: str, path: Path) -> None:
    FILES[name](path)
    path.rename(path.with_name("run.part.h5"))
    done = dfengine_command("explain", "a red circle", "-o", str(path), "--num-steps", "2", "--num-masks", "3")
    assert done.returncode == 2, done.stderr
    assert "PRIVATE KEY" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if not line.startswith("dfengine: note: ")]) == 1
