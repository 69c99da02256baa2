"""What the documents show is run as it stands there."""

import re
from pathlib import Path

from dfengine import Cam, Relevance, Rise, sweep

DOCS = Path(__file__).parent.parent / "docs"


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)


def test_events():
    (example,) = blocks("api.md", "python")
    seen = {}
    exec(example, seen)
    assert type(seen["event"]) is seen["Finished"]
    assert seen["event"].item == 1


def test_the_sweep_in_the_document(tmp_path):
    (example,) = blocks("sweeps.md", "yaml")
    (tmp_path / "spec.yaml").write_text(example)
    described = sweep.read(tmp_path / "spec.yaml")
    assert described.explainers == (Rise(num_masks=200), Cam(), Relevance())
    assert (len(described.prompts), described.seeds, len(described.schedules)) == (2, (0, 1), 3)
    assert {one.steps for one in described.schedules} == {10}


def test_the_sweep_in_python():
    (example,) = blocks("sweeps.md", "python")
    made, follow, _ = example.partition("for worker, record in sweep.run(described")
    assert follow
    seen = {}
    exec(made, seen)
    assert [one.steps for one in seen["described"].schedules] == [30, 10]


def test_every_key_of_a_sweep_is_documented():
    keys = {
        key
        for row in re.findall(r"^\| (`.*?`) \|", (DOCS / "sweeps.md").read_text(), re.M)
        for key in re.findall(r"`(\w+)`", row)
    }
    assert keys == {*sweep.Sweep.model_fields, "steps", "gamma", "guidance"}
    table = (DOCS / "sweeps.md").read_text()
    assert all(f"{name}:" in table for name in sweep.Source.model_fields)
    assert all(f"{name}: …" in table for name in sweep.Schedule.model_fields)
