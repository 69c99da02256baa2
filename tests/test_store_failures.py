"""Files of failures that earlier versions wrote are read in the current terms."""

import json
from pathlib import Path

from dfengine import store

UNIT = store.Unit("u", {}, ({"sampling": "uniform"},), ("a cat",), ((0, 0, 0), (0, 0, 1)))


def test_items_set_aside_by_an_earlier_version_are_quarantined(tmp_path: Path) -> None:
    store.Folder(tmp_path)
    store.plan_units(tmp_path, [UNIT])
    records = [
        {"unit": "u", "item": item, "described": UNIT.describe(item), "state": "aside", "errors": ["no"]}
        for item in range(2)
    ]
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures/u.json").write_text(json.dumps(records))
    assert [failure.state for failure in store.failures(tmp_path)] == ["quarantined"] * 2
    assert store.FailureLog(tmp_path, UNIT).quarantined == {0, 1}
    assert list(store.units_left(tmp_path, [])) == []
    with store.open(tmp_path) as run:
        assert not run.finished
    assert store.progress(tmp_path).quarantined == 2
