"""What a cell depends on, and when it must be measured again."""

from __future__ import annotations

import pytest
from builders import Refusing
from made_up_reports import a_report, timed

from toolchain.errors import MeasurementError, Slowdown
from toolchain.on_device.runner import fingerprint
from toolchain.pipeline.cell import builder, conditions, require_speed, runtime
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


ASKED = ("int8-dynamic", "int8-qdq")


def judged(*rows, least=None, precisions=ASKED):
    require_speed(a_report().model_copy(update={"bench": rows}), precisions, least)


def row(precision, point, **changes):
    """A comparison that verified 1 / point, where that is a speedup."""
    return timed(precision, point, **{"verified_speedup_at_least": 1 / point if point < 1 else None, **changes})


def test_a_required_speedup_is_that_of_the_fastest_file_that_was_asked_for():
    """Kind: int8 is asked for and 4.6 times as fast, and the fp32 file that is timed beside it fails the run."""
    rows = row("fp32", 1 / 1.95), row("int8-dynamic", 1 / 4.6), row("int8-qdq", 1 / 1.5)
    judged(*rows, least=2.0)
    with pytest.raises(MeasurementError, match=r"1\.95 was verified \(fp32: improved\)"):
        judged(*rows, least=2.0, precisions=["fp32"])
    with pytest.raises(MeasurementError, match=r"4\.60 was verified"):
        judged(*rows, least=5.0)
    judged(row("int8-dynamic", 0.2, verified_speedup_at_least=None, verdict="invalid"), rows[2], least=1.5)


def test_a_speedup_is_required_in_every_place():
    here, there = row("int8-qdq", 0.25), row("int8-qdq", 0.9, threads=2)
    judged(here, there, least=1.1)
    with pytest.raises(MeasurementError, match=r"on ort-cpu, batch 1, 2 threads; 1\.11 was verified"):
        judged(here, there, least=2.0)
    with pytest.raises(MeasurementError, match=r"where no file of export\.precisions was timed"):
        judged(here, row("fp32", 0.25, target="eager"), least=2.0)


@pytest.mark.parametrize("verdict", ["invalid", "inconclusive"])
def test_what_was_not_decided_verifies_nothing_and_fails_nothing_else(verdict):
    doubted = row("int8-qdq", 0.5, verified_speedup_at_least=None, verdict=verdict)
    judged(doubted)
    with pytest.raises(MeasurementError, match=r"no speedup was verified .* on a quieter machine"):
        judged(doubted, least=1.2)


def test_a_speedup_cannot_be_required_of_nothing():
    judged()
    with pytest.raises(MeasurementError, match="measures nothing"):
        judged(least=1.2)


def test_a_model_that_became_slower_is_no_success():
    """Kind: a run whose every file is slower than the dense one ends like one that reached its goal."""
    slow, slower = row("int8-dynamic", 1.3, verdict="regressed"), row("int8-qdq", 1.4, verdict="regressed")
    for least in (None, 1.2):
        with pytest.raises(Slowdown, match="int8-dynamic, ort-cpu, batch 1, 1 thread") as caught:
            judged(slow, slower, least=least)
    assert caught.value.exit_code == 1
    judged(slower, row("int8-dynamic", 0.5))
    judged(row("fp32", 1.3, verdict="regressed"))
