"""Latency in a gate, on made-up samples of known truth: verdicts, confirmation, Holm, the mean, accepts."""

from __future__ import annotations

import datetime as dt
import math
from functools import cache

import pytest
from builders import few_sessions, write_classifier
from measuring import GateScript, as_measured

from toolchain.artifacts import open_artifact
from toolchain.devices.device import Devices
from toolchain.errors import (
    ArtifactError,
    DeviceLost,
    MeasurementError,
    ParityError,
    TargetUnavailable,
)
from toolchain.gate import Accept, GateConfig, run_gate
from toolchain.gate.config import Cell
from toolchain.gate.evidence import RATIO, TIME, Evidence
from toolchain.gate.latency import Allowance, logs_of, undecided_by
from toolchain.gate.timing import Clock
from toolchain.measure.multiplicity import p_value_above
from toolchain.report.gate import gate_notes

TODAY = dt.date(2030, 1, 15)
SLOWER = {"b": math.log(1.2)}
SAME, FASTER = {}, {"b": -0.5}


@pytest.fixture
def judge(tmp_path):
    """Judges as many cells as first measurements are scripted; (result, measurer)."""
    old = write_classifier(tmp_path / "old.onnx")
    write_classifier(tmp_path / "new.onnx")

    def call(script, *, cells=None, budget=None, relation=None, accepts=(), **more):
        measurer = script if callable(script) else GateScript(*script)
        relation = {"latency": 0.05} if relation is None else relation
        cell = {"artifact": "new.onnx", "baseline": "old", "budget": budget or {}, "relation": relation, **more}
        raw = {
            "baseline": {"old": {"path": "old.onnx", "sha256": open_artifact(old).sha256}},
            "cell": [{"name": f"cell{i}", **cell} for i in range(cells or len(script))],
        }
        config = GateConfig.from_dict(raw, tmp_path)
        return run_gate(config, accepts, tool="test", day=TODAY, clock=Clock(measurer)), measurer

    return call


def statuses(result):
    return [check.status for _, check in result.checks]


def test_what_is_not_slower_passes(judge):
    result, measurer = judge([SAME, FASTER, {"b": 0.03}])
    assert statuses(result) == ["pass"] * 3
    assert result.exit_code == 0
    pair = measurer.pairs[0]
    assert (pair.baseline.name, pair.artifact.name) == ("old.onnx", "new.onnx")
    assert (pair.tau, pair.seed, pair.parity) == (0.05, 0, "not claimed")
    assert (pair.cell.batch, pair.cell.threads, pair.cell.affinity, pair.cell.input_shape) == (1, 1, None, None)


def test_the_workload_and_the_tolerance_reach_the_measurer(judge):
    _, measurer = judge([SAME], relation={"latency": 0.2}, batch=8, threads=2, input_shape=[1, 8, 8])
    pair = measurer.pairs[0]
    assert (pair.cell.batch, pair.cell.threads, pair.cell.input_shape, pair.tau) == (8, 2, (1, 8, 8), 0.2)


def test_a_planted_slowdown_fails_after_it_was_confirmed(judge):
    result, measurer = judge([SLOWER, {**SLOWER, "seed": 2}], cells=1)
    assert statuses(result) == ["fail"]
    assert result.exit_code == 1
    assert [pair.seed for pair in measurer.pairs] == [0, 1], "the second measurement is a fresh one"
    assert [len(each.sessions) for each in result.cells[0].comparisons] == [3, 3], "raw samples of both are kept"
    (check,) = result.cells[0].checks
    assert check.lo < 1.2 < check.hi
    assert check.bound == pytest.approx(1.05)
    assert check.baseline == pytest.approx(10, rel=0.01)
    assert "A fresh measurement confirmed it. Make the artifact faster" in check.reason


@pytest.mark.parametrize("second", [SAME, {**SLOWER, "control": 0.03}, FASTER], ids=["pass", "invalid", "improved"])
def test_a_slowdown_that_does_not_repeat_is_doubt(judge, second):
    result, _ = judge([SLOWER, second], cells=1)
    assert (statuses(result), result.exit_code) == (["inconclusive"], 4)
    assert "too slow at first" in result.cells[0].checks[0].reason


def test_a_confirmation_that_breaks_off_is_doubt(judge):
    result, _ = judge([SLOWER, MeasurementError("the device is gone")], cells=1)
    assert statuses(result) == ["inconclusive"]
    assert "could not be confirmed: the device is gone" in result.cells[0].checks[0].reason


@pytest.mark.parametrize(
    ("truth", "status", "words"),
    [
        ({"b": -0.5, "control": 0.03}, "invalid", "The machine was too noisy"),
        ({"b": -0.5, "session_shift": 0.02}, "inconclusive", "Sessions differ by"),
        ({"b": math.log1p(0.05), "noise": 0.01}, "inconclusive", "The interval holds 1.05"),
    ],
)
def test_what_was_not_measured_well_is_no_pass(judge, truth, status, words):
    result, _ = judge([truth])
    assert (statuses(result), result.exit_code) == ([status], 4)
    assert words in result.cells[0].checks[0].reason


def test_a_failure_wins_over_doubt(judge):
    result, _ = judge([{"control": 0.03}], budget={"size": 1})
    assert statuses(result) == ["fail", "invalid"]
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TargetUnavailable("ort-cpu", "no GPU"), "skipped"),
        (DeviceLost("ort-cpu", "it dropped off"), "invalid"),
        (MeasurementError("the machine changed"), "invalid"),
        (ParityError("other inputs"), "fail"),
        (ArtifactError("not finite"), "fail"),
    ],
)
def test_errors_of_the_measurer(judge, error, status):
    result, _ = judge([error, SAME])
    assert statuses(result) == [status, "pass"]
    assert str(error) in result.cells[0].checks[0].reason


def test_a_required_cell_is_not_skipped(judge):
    gone = TargetUnavailable("ort-cpu", "no GPU")
    result, _ = judge([gone], budget={"size": "1 MB"})
    assert (statuses(result), result.exit_code) == (["pass", "skipped"], 0)
    result, _ = judge([gone], budget={"size": "1 MB"}, required=True)
    assert (statuses(result), result.exit_code) == (["pass", "fail"], 1)
    assert "The cell is required, so this fails" in result.cells[0].checks[1].reason


def test_no_latency_of_what_failed_parity(judge, tmp_path):
    write_classifier(tmp_path / "new.onnx", noise=1e-3)
    result, measurer = judge([SAME], relation={"latency": 0.05, "parity": "fp32"})
    assert statuses(result) == ["fail", "skipped"]
    assert measurer.pairs == []
    write_classifier(tmp_path / "new.onnx")
    result, measurer = judge([SAME], relation={"latency": 0.05, "parity": "fp32"})
    assert statuses(result) == ["pass", "pass"]
    assert measurer.pairs[0].parity == "pass"


def test_a_budget_in_milliseconds(judge):
    def checked(bound, *script, **more):
        result, measurer = judge(script, cells=1, budget={"latency": bound}, relation={}, baseline="", **more)
        assert measurer.pairs[0].baseline == measurer.pairs[0].artifact, "without a baseline it stands beside itself"
        return statuses(result), len(measurer.pairs)

    assert checked("10.2 ms", SAME) == (["pass"], 1)
    assert checked("9.8 ms", SAME, {"seed": 2}) == (["fail"], 2)
    assert checked("9.8 ms", SAME, {"b": -0.1}) == (["inconclusive"], 2)
    assert checked("10 ms", {"noise": 0.01}) == (["inconclusive"], 1)
    assert checked("10.2 ms", {"control": 0.03}) == (["pass"], 1), "no control protects a time, and none condemns it"
    drifting = {"session_shift": 0.03}
    assert checked("10.4 ms", drifting) == (["inconclusive"], 1), "the last session alone is above it"
    assert checked("10.1 ms", drifting) == (["inconclusive"], 1), "the first session alone is below it"


@cache
def marginal_truth(made_up):
    """A slowdown that is regressed by itself, and not among six."""
    for step in range(0, 200, 4):
        truth = {"b": 0.0489 + step * 2e-5, "noise": 0.004, "seed": 3}
        found = made_up(**truth)
        blocks = logs_of(RATIO, found)
        p = p_value_above(blocks, math.log(1.05), seed=0)
        if 0.025 / 6 < p < 0.02 and found.verdict == "regressed":
            return truth
    raise AssertionError("no such comparison")


def test_more_than_five_cells_are_judged_together(judge, made_up):
    weak = marginal_truth(made_up)
    result, _ = judge([weak, *[SAME] * 4, SLOWER], cells=5)
    assert statuses(result) == ["fail", *["pass"] * 4]
    assert result.holm is None
    result, _ = judge([weak, *[SAME] * 5], cells=6)
    assert statuses(result) == ["inconclusive", *["pass"] * 5]
    assert (result.holm.hypotheses, result.holm.alpha) == (6, 0.025)
    assert "Holm" in result.cells[0].checks[0].reason
    strong = SLOWER
    result, _ = judge([strong, *[SAME] * 5, strong], cells=6)
    assert statuses(result) == ["fail", *["pass"] * 5]


def test_a_look_that_was_paid_for_counts_in_the_p_value(judge, made_up):
    weak = marginal_truth(made_up)
    result, _ = judge([weak, SLOWER], cells=1)
    p = result.cells[0].checks[0].p_value
    result, _ = judge([{**weak, "design": few_sessions(looks=4)}], cells=1)
    assert result.cells[0].checks[0].p_value == pytest.approx(4 * p)


def test_the_mean_over_cells_leaves_out_what_is_invalid(judge):
    result, _ = judge([{"b": math.log(0.5)}, {"b": math.log(0.8), "seed": 2}, {"b": 1.0, "control": 0.03}])
    assert result.summary.cells == 2
    assert result.summary.point == pytest.approx(math.sqrt(0.4), rel=0.005)
    assert result.summary.lo < result.summary.point < result.summary.hi
    result, _ = judge([SAME])
    assert result.summary is None
    result, _ = judge([SAME, SAME], budget={"latency": "1 s"}, relation={}, baseline="")
    assert result.summary is None, "a budget compares with nothing"


def accept(at_most, check="relation.latency"):
    return Accept(cell="cell0", check=check, at_most=at_most, reason="known", accepted=TODAY, expires=TODAY)


@pytest.mark.parametrize(
    ("workload", "status", "state"),
    [
        ("ort-cpu, batch 2, threads 1, cores 0", "accepted", "used"),
        (None, "accepted", "used"),
        ("ort-cpu, batch 1, threads 1", "fail", "moved"),
    ],
)
def test_a_slowdown_that_was_accepted_of_one_workload_is_not_of_another(judge, workload, status, state):
    entry = accept(1.25).model_copy(update={"workload": workload})
    result, _ = judge([SLOWER, SLOWER], cells=1, batch=2, affinity=[0], accepts=[entry])
    assert (statuses(result), [use.state for use in result.accept_uses]) == ([status], [state])
    assert result.meaning("cell0", "relation.latency")["workload"] == "ort-cpu, batch 2, threads 1, cores 0"


def test_the_words_of_a_workload_are_held_by_accepts():
    """They are compared with those in files of users: an accept that was written in other words would cover nothing."""
    asked = {"name": "a", "artifact": "a.onnx", "budget": {"latency": "1 ms"}, "target": "board"}
    for more, words in (
        ({"threads": 2}, "board, batch 1, threads 2"),
        (
            {"batch": 4, "threads": 1, "affinity": [3, 0], "input_shape": [1, 8, 8]},
            "board, batch 4, threads 1, cores 0, 3, input 1x8x8",
        ),
    ):
        evidence = Evidence.model_construct(cell=Cell.model_validate({**asked, **more}))
        assert evidence.workload("budget.latency") == words
    assert evidence.workload("budget.size") is None


def test_a_slowdown_that_was_accepted_against_one_baseline_is_not_against_the_next(judge):
    result, _ = judge([SLOWER] * 2, cells=1)
    for against, status, state in (
        (result.evidence[0].baseline.file.sha256, "accepted", "used"),
        ("0" * 64, "fail", "moved"),
    ):
        entry = accept(1.25).model_copy(update={"against": against})
        again, _ = judge([SLOWER] * 2, cells=1, accepts=[entry])
        assert (statuses(again), [use.state for use in again.accept_uses]) == ([status], [state])


@pytest.mark.parametrize(
    ("at_most", "truth", "status", "state"),
    [
        (1.25, SLOWER, "accepted", "used"),
        (1.15, SLOWER, "fail", "exceeded"),
        (1.10, {"b": math.log1p(0.05), "noise": 0.01}, "accepted", "used"),
        (1.045, {"b": math.log1p(0.05), "noise": 0.01}, "inconclusive", "undecided"),
        (1.195, {**SLOWER, "noise": 0.02}, "inconclusive", "undecided"),
        (1.25, {**SLOWER, "control": 0.03}, "invalid", "undecided"),
        (1.25, {**SLOWER, "session_shift": 0.02}, "inconclusive", "undecided"),
        (1.25, {}, "pass", "unused"),
    ],
)
def test_an_accepted_slowdown_may_not_grow(judge, at_most, truth, status, state):
    result, _ = judge([truth] * 2, cells=1, accepts=[accept(at_most)])
    assert statuses(result) == [status]
    assert [use.state for use in result.accept_uses] == [state]


def test_many_sessions_that_disagree_are_judged_by_their_interval(judge):
    many = {**SLOWER, "session_shift": 0.008, "design": few_sessions(sessions=6)}
    result, _ = judge([many], cells=1, accepts=[accept(1.3)])
    (comparison,) = result.cells[0].comparisons
    assert comparison.verdict == "regressed"
    medians = comparison.session_medians
    assert max(medians) - min(medians) > comparison.design.tau / 2
    assert statuses(result) == ["accepted"]


def test_a_comparison_grows_until_the_checks_of_its_cell_are_decided(made_up):
    """Not until the ratio is: a file beside itself passes at once, and its milliseconds may still be open."""
    beside_itself = made_up(noise=0.01)
    assert beside_itself.verdict == "pass"
    for bound, open_ in ((10.0, True), (10.2, False), (9.8, False)):
        assert undecided_by({TIME: Allowance(bound, None)})(beside_itself) is open_
    slower = made_up(b=math.log(1.1), noise=0.02)
    assert slower.verdict == "regressed"
    for accepted, open_ in ((None, False), (1.05, False), (1.098, True), (1.15, False)):
        assert undecided_by({RATIO: Allowance(1.05, accepted)})(slower) is open_, accepted
    strays = made_up(control=0.03)
    assert undecided_by({RATIO: Allowance(1.05, None)})(strays)
    assert not undecided_by({TIME: Allowance(10.2, None)})(strays)
    assert undecided_by({TIME: Allowance(10.2, None), RATIO: Allowance(1.05, None)})(strays)


def test_an_accepted_time(judge):
    options = {"cells": 1, "budget": {"latency": "9 ms"}, "relation": {}}
    result, _ = judge([SAME], accepts=[accept(10.1, "budget.latency")], **options)
    assert statuses(result) == ["accepted"]
    result, _ = judge([SAME] * 2, accepts=[accept(9.8, "budget.latency")], **options)
    assert statuses(result) == ["fail"]


def test_an_artifact_that_is_replaced_while_it_is_timed_ends_the_gate(judge, tmp_path):
    def replacing(pair, *_):
        write_classifier(tmp_path / "new.onnx", padding=1)
        return as_measured(pair)

    with pytest.raises(ArtifactError, match=r"cell 'cell0': it was measured with another artifact.*Run the gate again"):
        judge(replacing, cells=1)


TARGETS = """
[quiet]
transport = "local"
threads = 2
affinity = [0, 2]
"""


def test_a_machine_that_slowed_down_is_told_beside_the_verdict(judge):
    """Milliseconds of a container that reached its limit are not those of the machine."""

    def held_back(pair, *_):
        found = as_measured(pair)
        sessions = []
        for session in found.sessions:
            prints = session.fingerprint
            after = prints.after.model_copy(update={"state": {"quota_stops": 3}})
            before = prints.before.model_copy(update={"state": {"quota_stops": 0}})
            update = {"fingerprint": prints.model_copy(update={"before": before, "after": after})}
            sessions.append(session.model_copy(update=update))
        return found.model_copy(update={"sessions": tuple(sessions)})

    result, _ = judge(held_back, cells=1)
    count = 3 * len(result.evidence[0].comparisons[0].sessions)
    assert f"While cell0 was timed: the limit of its container stopped it {count} times." in gate_notes(result)


def test_a_cell_may_name_a_target_of_targets_toml(tmp_path):
    old = write_classifier(tmp_path / "old.onnx")
    (tmp_path / "targets.toml").write_text(TARGETS)
    cell = {"artifact": "old.onnx", "baseline": "old", "relation": {"latency": 0.05}}
    raw = {
        "baseline": {"old": {"path": "old.onnx", "sha256": open_artifact(old).sha256}},
        "cell": [
            {"name": "as named", "target": "quiet", **cell},
            {"name": "of its own", "target": "quiet", "threads": 1, "affinity": [1, 0, 1], **cell},
        ],
    }
    config, measurer = GateConfig.from_dict(raw, tmp_path), GateScript(SAME, SAME)
    with Devices() as devices:
        result = run_gate(config, tool="test", day=TODAY, devices=devices, clock=Clock(measurer))
    assert [device.runtime for device in measurer.devices] == ["ort-cpu"] * 2
    assert [(pair.cell.threads, pair.cell.affinity) for pair in measurer.pairs] == [(2, (0, 2)), (1, (0, 1))]
    assert [(each.target, each.threads) for each in result.cells] == [("quiet", 2), ("quiet", 1)]
    assert statuses(result) == ["pass", "pass"]
