"""Latency in a gate, on made-up samples of known truth: verdicts, confirmation, Holm, the mean, accepts."""

from __future__ import annotations

import datetime as dt
import json
import math
from functools import cache

import pytest
from builders import few_sessions, write_classifier
from measuring import progress_to

from toolchain.artifacts.size import artifact_sha256
from toolchain.devices.device import Devices
from toolchain.devices.transport import LocalTransport
from toolchain.errors import (
    ArtifactError,
    DeviceLost,
    MeasurementError,
    ParityError,
    RecipeError,
    TargetUnavailable,
)
from toolchain.gate import Accept, Accepts, GateConfig, GateResult, run_gate, timing
from toolchain.gate.judgement import RATIO, TIME, logs_of, undecided_by
from toolchain.measure.compare import compare
from toolchain.measure.multiplicity import p_value_above
from toolchain.measure.samples import Design, Workload
from toolchain.measure.stored import sealed
from toolchain.pipeline.verify import verify

TODAY = dt.date(2030, 1, 15)
SLOWER = math.log(1.2)


class Harness:
    """Stands in for `compare`: gives out scripted comparisons in order, and keeps what it was asked."""

    def __init__(self, script):
        self.script, self.calls = list(script), []

    def __call__(self, a, b, device, workload, design, **options):
        self.calls.append((a.name, b.name, device, workload, design, options))
        found = self.script.pop(0)
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """Judges as many cells as first measurements are scripted; (result, harness)."""
    old = write_classifier(tmp_path / "old.onnx")
    write_classifier(tmp_path / "new.onnx")

    def call(script, *, cells=None, budget=None, relation=None, accepts=(), **more):
        harness = Harness(script)
        monkeypatch.setattr(timing, "compare", harness)
        relation = {"latency": 0.05} if relation is None else relation
        cell = {"artifact": "new.onnx", "baseline": "old", "budget": budget or {}, "relation": relation, **more}
        raw = {
            "baseline": {"old": {"path": "old.onnx", "sha256": artifact_sha256(old)}},
            "cell": [{"name": f"cell{i}", **cell} for i in range(cells or len(script))],
        }
        config = GateConfig.from_dict(raw, tmp_path)
        return run_gate(config, Accepts(accepts, TODAY), tool="test"), harness

    return call


def statuses(result):
    return [check.status for _, check in result.checks]


def test_what_is_not_slower_passes(judge, made_up):
    result, harness = judge([made_up(), made_up(b=-0.5), made_up(b=0.03)])
    assert statuses(result) == ["pass"] * 3
    assert result.exit_code == 0
    a, b, device, workload, design, options = harness.calls[0]
    assert (a, b, device.runtime, workload, design) == ("old.onnx", "new.onnx", "ort-cpu", Workload(), Design())
    assert options["parity"] == "not claimed"


def test_the_workload_and_the_tolerance_reach_the_harness(judge, made_up):
    _, harness = judge([made_up()], relation={"latency": 0.2}, batch=8, threads=2, input_shape=[1, 8, 8])
    _, _, _, workload, design, _ = harness.calls[0]
    assert (workload, design.tau) == (Workload(batch=8, threads=2, input_shape=(1, 8, 8)), 0.2)


def test_a_planted_slowdown_fails_after_it_was_confirmed(judge, made_up):
    result, harness = judge([made_up(b=SLOWER), made_up(b=SLOWER, seed=2)], cells=1)
    assert statuses(result) == ["fail"]
    assert result.exit_code == 1
    assert [call[4].seed for call in harness.calls] == [0, 1], "the second measurement is a fresh one"
    assert len(result.cells[0].comparisons) == 2
    assert result.cells[0].comparisons[1]["raw"]["sessions"], "raw samples of both are kept"
    (check,) = result.cells[0].checks
    assert check.lo < 1.2 < check.hi
    assert check.limit == pytest.approx(1.05)
    assert check.baseline == pytest.approx(10, rel=0.01)
    assert "confirmed" in check.reason


@pytest.mark.parametrize(
    "second", [{}, {"b": SLOWER, "control": 0.03}, {"b": -0.5}], ids=["pass", "invalid", "improved"]
)
def test_a_slowdown_that_does_not_repeat_is_doubt(judge, made_up, second):
    result, _ = judge([made_up(b=SLOWER), made_up(**second)], cells=1)
    assert (statuses(result), result.exit_code) == (["inconclusive"], 4)
    assert "regressed at first" in result.cells[0].checks[0].reason


def test_a_confirmation_that_breaks_off_is_doubt(judge, made_up):
    result, _ = judge([made_up(b=SLOWER), MeasurementError("the device is gone")], cells=1)
    assert statuses(result) == ["inconclusive"]
    assert "could not be confirmed: the device is gone" in result.cells[0].checks[0].reason


@pytest.mark.parametrize(
    ("truth", "status", "words"),
    [
        ({"b": -0.5, "control": 0.03}, "invalid", "supports τ ≥"),
        ({"b": -0.5, "session_shift": 0.02}, "inconclusive", "sessions differ by"),
        ({"b": math.log1p(0.05), "noise": 0.01}, "inconclusive", "the interval holds the limit"),
    ],
)
def test_what_was_not_measured_well_is_no_pass(judge, made_up, truth, status, words):
    result, _ = judge([made_up(**truth)])
    assert (statuses(result), result.exit_code) == ([status], 4)
    assert words in result.cells[0].checks[0].reason


def test_a_failure_wins_over_doubt(judge, made_up):
    result, _ = judge([made_up(control=0.03)], budget={"size": 1})
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
def test_errors_of_the_harness(judge, made_up, error, status):
    result, _ = judge([error, made_up()])
    assert statuses(result) == [status, "pass"]
    assert str(error) in result.cells[0].checks[0].reason


def test_a_required_cell_is_not_skipped(judge, made_up):
    gone = TargetUnavailable("ort-cpu", "no GPU")
    result, _ = judge([gone], budget={"size": "1 MB"})
    assert (statuses(result), result.exit_code) == (["pass", "skipped"], 0)
    result, _ = judge([gone], budget={"size": "1 MB"}, required=True)
    assert (statuses(result), result.exit_code) == (["pass", "fail"], 1)
    assert "required, but target 'ort-cpu' is unavailable" in result.cells[0].checks[1].reason


def test_no_latency_of_what_failed_parity(judge, made_up, tmp_path):
    write_classifier(tmp_path / "new.onnx", noise=1e-3)
    result, harness = judge([made_up()], relation={"latency": 0.05, "parity": "fp32"})
    assert statuses(result) == ["fail", "skipped"]
    assert harness.calls == []
    write_classifier(tmp_path / "new.onnx")
    result, harness = judge([made_up()], relation={"latency": 0.05, "parity": "fp32"})
    assert statuses(result) == ["pass", "pass"]
    assert harness.calls[0][-1]["parity"] == "pass"


def test_a_budget_in_milliseconds(judge, made_up):
    def checked(limit, *script, **more):
        result, harness = judge(script, cells=1, budget={"latency": limit}, relation={}, baseline="", **more)
        assert harness.calls[0][:2] == ("new.onnx", "new.onnx"), "without a baseline it stands beside itself"
        return statuses(result), len(harness.calls)

    assert checked("10.2 ms", made_up()) == (["pass"], 1)
    assert checked("9.8 ms", made_up(), made_up(seed=2)) == (["fail"], 2)
    assert checked("9.8 ms", made_up(), made_up(b=-0.1)) == (["inconclusive"], 2)
    assert checked("10 ms", made_up(noise=0.01)) == (["inconclusive"], 1)
    assert checked("10.2 ms", made_up(control=0.03)) == (["pass"], 1), (
        "no control protects a time, and none condemns it"
    )
    drifting = made_up(session_shift=0.03)
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
    weak = made_up(**marginal_truth(made_up))
    result, _ = judge([weak, *[made_up()] * 4, weak], cells=5)
    assert statuses(result) == ["fail", *["pass"] * 4]
    assert result.holm is None
    result, _ = judge([weak, *[made_up()] * 5, weak], cells=6)
    assert statuses(result) == ["inconclusive", *["pass"] * 5]
    assert (result.holm.hypotheses, result.holm.alpha) == (6, 0.025)
    assert "Holm" in result.cells[0].checks[0].reason
    strong = made_up(b=SLOWER)
    result, _ = judge([strong, *[made_up()] * 5, strong], cells=6)
    assert statuses(result) == ["fail", *["pass"] * 5]


def test_a_look_that_was_paid_for_counts_in_the_p_value(judge, made_up):
    weak = made_up(**marginal_truth(made_up))
    result, _ = judge([weak, weak], cells=1)
    p = result.cells[0].checks[0].p_value
    result, _ = judge([made_up(**marginal_truth(made_up), design=few_sessions(looks=4))], cells=1)
    assert result.cells[0].checks[0].p_value == pytest.approx(4 * p)


def test_the_mean_over_cells_leaves_out_what_is_invalid(judge, made_up):
    result, _ = judge([made_up(b=math.log(0.5)), made_up(b=math.log(0.8), seed=2), made_up(b=1.0, control=0.03)])
    assert result.summary.cells == 2
    assert result.summary.point == pytest.approx(math.sqrt(0.4), rel=0.005)
    assert result.summary.lo < result.summary.point < result.summary.hi
    result, _ = judge([made_up()])
    assert result.summary is None
    result, _ = judge([made_up(), made_up()], budget={"latency": "1 s"}, relation={}, baseline="")
    assert result.summary is None, "a budget compares with nothing"


def accept(at_most, check="relation.latency"):
    return Accept(cell="cell0", check=check, at_most=at_most, reason="known", accepted=TODAY, expires=TODAY)


@pytest.mark.parametrize(
    ("at_most", "truth", "status", "state"),
    [
        (1.25, {"b": SLOWER}, "accepted", "used"),
        (1.15, {"b": SLOWER}, "fail", "exceeded"),
        (1.10, {"b": math.log1p(0.05), "noise": 0.01}, "accepted", "used"),
        (1.045, {"b": math.log1p(0.05), "noise": 0.01}, "inconclusive", "unused"),
        (1.195, {"b": SLOWER, "noise": 0.02}, "inconclusive", "unused"),
        (1.25, {"b": SLOWER, "control": 0.03}, "invalid", "unused"),
        (1.25, {"b": SLOWER, "session_shift": 0.02}, "inconclusive", "unused"),
        (1.25, {}, "pass", "unused"),
    ],
)
def test_an_accepted_slowdown_may_not_grow(judge, made_up, at_most, truth, status, state):
    result, _ = judge([made_up(**truth)] * 2, cells=1, accepts=[accept(at_most)])
    assert statuses(result) == [status]
    assert [use.state for use in result.accepts] == [state]


def test_many_sessions_that_disagree_are_judged_by_their_interval(judge, made_up):
    many = made_up(b=SLOWER, session_shift=0.008, design=few_sessions(sessions=6))
    assert many.verdict == "regressed"
    medians = many.session_medians
    assert max(medians) - min(medians) > many.design.tau / 2
    result, _ = judge([many], cells=1, accepts=[accept(1.3)])
    assert statuses(result) == ["accepted"]


def test_a_comparison_grows_until_the_checks_of_its_cell_are_decided(made_up):
    """Not until the ratio is: a file beside itself passes at once, and its milliseconds may still be open."""
    beside_itself = made_up(noise=0.01)
    assert beside_itself.verdict == "pass"
    for limit, open_ in ((10.0, True), (10.2, False), (9.8, False)):
        assert undecided_by({TIME: (limit, None)})(beside_itself) is open_
    slower = made_up(b=math.log(1.1), noise=0.02)
    assert slower.verdict == "regressed"
    for accepted, open_ in ((None, False), (1.05, False), (1.098, True), (1.15, False)):
        assert undecided_by({RATIO: (1.05, accepted)})(slower) is open_, accepted
    strays = made_up(control=0.03)
    assert undecided_by({RATIO: (1.05, None)})(strays)
    assert not undecided_by({TIME: (10.2, None)})(strays)
    assert undecided_by({TIME: (10.2, None), RATIO: (1.05, None)})(strays)


def test_an_accepted_time(judge, made_up):
    options = {"cells": 1, "budget": {"latency": "9 ms"}, "relation": {}}
    result, _ = judge([made_up()], accepts=[accept(10.1, "budget.latency")], **options)
    assert statuses(result) == ["accepted"]
    result, _ = judge([made_up()] * 2, accepts=[accept(9.8, "budget.latency")], **options)
    assert statuses(result) == ["fail"]


@pytest.mark.clock
def test_real_measurements_reach_the_result(tmp_path, stack, monkeypatch):
    """The real harness on real files, as short as it goes: no verdict is asserted, the machine may be busy."""
    short = Design(sessions=1, blocks=4, slot_ms=1.0, warmup_s=0.01)
    monkeypatch.setattr(
        timing, "compare", lambda a, b, device, workload, _, **o: compare(a, b, device, workload, short, **o)
    )
    old, _ = stack(tmp_path / "old.onnx", layers=2), stack(tmp_path / "new.onnx", layers=40)
    raw = {
        "baseline": {"old": {"path": "old.onnx", "sha256": artifact_sha256(old)}},
        "cell": [{"name": "a", "artifact": "new.onnx", "baseline": "old", "relation": {"latency": 0.05}}],
    }
    seen = []
    result = run_gate(
        GateConfig.from_dict(raw, tmp_path),
        Accepts((), TODAY),
        tool="test",
        progress=progress_to(lambda *report: seen.append(report)),
    )
    (check,) = result.cells[0].checks
    assert check.value > 1.5, "forty matmuls take longer than two"
    assert check.status in ("fail", "invalid", "inconclusive")
    assert result.cells[0].comparisons[0]["raw"]["design"]["blocks"] == few_sessions(blocks=4).blocks
    assert seen[0][1].startswith("a, session 1: ")


TARGETS = """
[quiet]
transport = "local"
threads = 2
affinity = [0]
"""


def test_a_cell_may_name_a_target_of_targets_toml(tmp_path, monkeypatch, made_up):
    old = write_classifier(tmp_path / "old.onnx")
    (tmp_path / "targets.toml").write_text(TARGETS)
    harness = Harness([made_up(), made_up()])
    monkeypatch.setattr(timing, "compare", harness)
    cell = {"artifact": "old.onnx", "baseline": "old", "relation": {"latency": 0.05}}
    raw = {
        "baseline": {"old": {"path": "old.onnx", "sha256": artifact_sha256(old)}},
        "cell": [
            {"name": "as named", "target": "quiet", **cell},
            {"name": "of its own", "target": "quiet", "threads": 1, "affinity": [1], **cell},
        ],
    }
    with pytest.raises(RecipeError, match="unknown target 'quiet'"):
        GateConfig.from_dict(raw, tmp_path)
    config = GateConfig.from_dict(raw, tmp_path, tmp_path / "targets.toml")
    with Devices(tmp_path / "targets.toml") as devices:
        result = run_gate(config, Accepts((), TODAY), tool="test", devices=devices)
    asked = [(c[2].runtime, c[3].threads, c[3].affinity) for c in harness.calls]
    assert asked == [("ort-cpu", 2, (0,)), ("ort-cpu", 1, (1,))]
    assert [(each.target, each.threads) for each in result.cells] == [("quiet", 2), ("quiet", 1)]
    assert statuses(result) == ["pass", "pass"]


@pytest.mark.clock
def test_a_gate_that_is_cut_off_measures_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path / "cache"))
    old = write_classifier(tmp_path / "old.onnx")
    cell = {"artifact": "old.onnx", "baseline": "old", "relation": {"latency": 0.05}}
    raw = {
        "baseline": {"old": {"path": "old.onnx", "sha256": artifact_sha256(old)}},
        "cell": [{"name": f"cell{batch}", "batch": batch, **cell} for batch in (1, 2)],
    }
    config, ran, stop = GateConfig.from_dict(raw, tmp_path), [], [4]
    local, short = LocalTransport.run, Design(slot_ms=1.0, warmup_s=0.01, looks=1, sessions=3, blocks=4)
    monkeypatch.setattr(
        timing, "compare", lambda a, b, device, workload, _, **o: compare(a, b, device, workload, short, **o)
    )

    def run(self, schedule, progress):
        if len(ran) == stop[0]:
            raise KeyboardInterrupt
        ran.append((schedule["inputs"]["tensors"][0]["shape"][0], schedule["session"]))
        return local(self, schedule, progress)

    monkeypatch.setattr(LocalTransport, "run", run)
    with pytest.raises(KeyboardInterrupt), Devices() as devices:
        run_gate(config, Accepts((), TODAY), tool="test", devices=devices)
    stop[0] = 99
    with Devices() as devices:
        result = run_gate(config, Accepts((), TODAY), tool="test", devices=devices)
    assert ran[:6] == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)], "a regression may be confirmed after that"
    assert all(cell.comparisons for cell in result.cells)
    assert not list((tmp_path / "cache" / "sessions").iterdir()), "what ended is measured afresh next time"


EDITS = (
    *("verdict", "status", "accepted", "doubted", "no second", "lo", "p_value", "baseline", "samples", "no samples"),
    *("size", "budget", "raised", "slower allowed", "nothing asked", "failed", "another artifact", "summary", "holm"),
)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_gate_result_is_refused(judge, made_up, tmp_path, edit):
    result, _ = judge(
        [made_up(b=SLOWER), made_up(b=SLOWER, seed=2)], cells=1, budget={"size": "1 MB", "latency": "1 s"}
    )
    record, path = result.to_dict(), tmp_path / "gate.json"
    (cell,) = record["cells"]
    for comparison in cell["comparisons"]:  # made up samples are of no file
        comparison["raw"]["artifacts"] = {"A": dict(cell["baseline"]), "B": dict(cell["artifact"])}
        comparison.update(sealed(comparison["raw"]))
    path.write_text(json.dumps(record))
    assert GateResult.load(path).verdict == result.verdict
    checks = {check["name"]: check for check in cell["checks"]}
    if edit == "verdict":
        record["verdict"] = "pass"
    elif edit == "status":
        for check in cell["checks"]:
            check["status"] = "pass"
        record["counts"], record["verdict"], record["exit_code"] = {"pass": 3}, "pass", 0
    elif edit in ("accepted", "doubted"):
        checks["relation.latency"]["status"] = {"accepted": "accepted", "doubted": "inconclusive"}[edit]
        record["counts"] = {checks["relation.latency"]["status"]: 1, "pass": 2}
        record["verdict"], record["exit_code"] = {"accepted": ("pass", 0), "doubted": ("inconclusive", 4)}[edit]
    elif edit == "no second":
        del cell["comparisons"][1]
    elif edit in ("p_value", "baseline"):
        checks["relation.latency"][edit] *= 1.5
    elif edit == "summary":
        record["summary"] = {"cells": 2, "point": 0.5, "lo": 0.4, "hi": 0.6}
    elif edit == "holm":
        record["holm"] = {"hypotheses": 6, "alpha": 0.025}
    elif edit == "failed":
        checks["budget.size"]["status"] = "fail"
        record["counts"] = {"fail": 2, "pass": 1}
    elif edit == "budget":
        checks["budget.size"]["limit"] = 1
    elif edit == "raised":
        checks["budget.size"]["limit"] = 2_000_000
    elif edit == "slower allowed":  # and all that would follow
        checks["relation.latency"].update(limit=2.0, status="pass")
        record["counts"], record["verdict"], record["exit_code"] = {"pass": 3}, "pass", 0
    elif edit == "nothing asked":
        del checks["budget.size"]["asked"]
    elif edit == "another artifact":
        cell["artifact"]["sha256"] = "0" * 64
    elif edit == "lo":
        checks["relation.latency"]["lo"] = 1.0
    elif edit == "samples":
        cell["comparisons"][0]["ratio"]["point"] = 1.0
    elif edit == "no samples":
        cell["comparisons"] = []
    else:
        checks["budget.size"]["value"] = 1
    path.write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=r"altered|no samples"):
        verify(path)
