"""What a cell depends on, and when it must be measured again."""

from __future__ import annotations

import pytest

from toolchain.errors import MeasurementError
from toolchain.pipeline.cell import conclusive, conditions, require_speedup, runtime


def test_conditions_name_runtime_and_machine_and_nothing_that_drifts(monkeypatch):
    found = conditions("ort-cpu", 1)
    assert found[0] == runtime("ort-cpu")
    assert found[0][0] == "onnxruntime"
    assert {"cpu", "cores", "affinity", "threads"} <= set(found[1])
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    monkeypatch.setattr("os.getloadavg", lambda: (9.0, 9.0, 9.0))
    assert conditions("ort-cpu", 1) == found
    assert conditions("ort-cpu", 2) != found
    assert conditions("eager", 1) != found


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [("improved", True), ("pass", True), ("regressed", True), ("invalid", False), ("inconclusive", False)],
)
def test_only_a_verdict_that_says_something_is_kept(verdict, expected):
    assert conclusive({"verdict": verdict}) is expected


def test_a_required_speedup_must_be_verified_in_every_cell():
    row = {"target": "ort-cpu", "batch": 1, "threads": 2, "verdict": "improved", "verified_speedup_at_least": 1.5}
    require_speedup({"bench": [row]}, 1.5)
    for rows, words in (
        ([row], "1.50 was verified"),
        ([row, {**row, "verified_speedup_at_least": None}], "no speedup"),
        ([], "measures nothing"),
    ):
        with pytest.raises(MeasurementError, match=words):
            require_speedup({"bench": rows}, 1.6 if rows == [row] else 1.2)
