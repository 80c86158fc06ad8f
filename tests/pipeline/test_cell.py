"""What a cell depends on, and when it must be measured again."""

from __future__ import annotations

import pytest
from builders import Refusing
from made_up_reports import a_report, timed

from toolchain.errors import MeasurementError
from toolchain.on_device.runner import fingerprint
from toolchain.pipeline.cell import builder, conditions, require_speedup, runtime
from toolchain.targets import TARGETS


def test_conditions_name_runtime_and_machine_and_nothing_that_drifts():
    found = conditions("ort-cpu", 1)
    assert found[0] == runtime("ort-cpu")
    assert found[0][0] == "onnxruntime"
    assert {"cpu", "cores", "affinity", "threads"} <= set(found[1])
    seen = fingerprint(1)
    assert set(found[1]) == set(seen["machine"]) - {"runtimes"}, "what this process has loaded is no condition"
    assert not set(found[1]) & set(seen["state"])
    assert conditions("ort-cpu", 1) == found
    assert conditions("ort-cpu", 2) != found
    assert conditions("eager", 1) != found


def test_what_builds_is_all_that_a_probe_tells(register):
    """Kind: an engine that stays when what converted it is another version, because the runtime is still the same."""
    found = []
    for told in ("yes", "no: it is an older one"):
        register(TARGETS, Refusing("converting", told))
        found.append(builder("converting"))
    assert found[0] != found[1]
    assert builder("converting") == found[1]


def test_a_required_speedup_must_be_verified_in_every_cell():
    row = timed("fp32", 0.6, verified_speedup_at_least=1.5)
    doubted = row.model_copy(update={"verified_speedup_at_least": None})
    require_speedup(a_report().model_copy(update={"bench": (row,)}), 1.5)
    for rows, least, words in (
        ((row,), 1.6, "1.50 was verified"),
        ((row, doubted), 1.2, "no speedup"),
        ((), 1.2, "measures nothing"),
    ):
        with pytest.raises(MeasurementError, match=words):
            require_speedup(a_report().model_copy(update={"bench": rows}), least)
