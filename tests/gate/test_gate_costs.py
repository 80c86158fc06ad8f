"""Memory, cold start and download of a gate: judged by made-up starts, grown while open, read back as they were."""

from __future__ import annotations

import copy
import datetime as dt
import json
import random
from functools import partial

import pytest
from builders import write_classifier
from hypothesis import given
from hypothesis import strategies as st
from measuring import device_of

from toolchain.artifacts import open_artifact
from toolchain.errors import ArtifactError, BaselineError, DeviceLost, RecipeError, TargetUnavailable
from toolchain.gate import Accept, GateConfig, GateResult, run_gate
from toolchain.gate.starts import LOOKS
from toolchain.gate.timing import Clock, started
from toolchain.measure.intervals import order_interval
from toolchain.measure.samples import A, B
from toolchain.measure.stored import sealed
from toolchain.on_device.runner import COLD_SCHEMA
from toolchain.report.gate import gate_markdown
from toolchain.report.trackers import points

TODAY = dt.date(2030, 1, 15)
MB = 10**6


class Starter:
    """A measurer of cold starts whose numbers are made up: factors for B, noise for all, megabytes of the process itself."""

    def __init__(self, *, slower=1.0, larger=1.0, noise=0.01, told=True, changes=False):
        self.slower, self.larger, self.noise, self.told, self.changes = slower, larger, noise, told, changes
        self.asked, self.rng = [], random.Random(0)

    def run(self, schedule, progress):
        (variant,) = schedule["variants"]
        self.asked.append(variant["name"])
        is_b = variant["name"] == B
        spread = 1 + self.noise * self.rng.uniform(-1, 1)
        version = "2" if self.changes and len(self.asked) > 5 else "1"
        machine = {"cpu": "scripted", "threads": 1, "affinity": [0], "runtimes": {"onnxruntime": version}}
        held = round(40 * MB * (self.larger if is_b else 1) * spread)
        return {
            "schema": COLD_SCHEMA,
            "open_ns": round(2e8 * (self.slower if is_b else 1) * spread),
            "first_ns": 10**6,
            "rss_before_bytes": 30 * MB if self.told else None,
            "peak_rss_bytes": 30 * MB + held if self.told else None,
            "device_bytes": None,
            "fingerprint": {"machine": machine, "state": {}},
        }


class Gone:
    """A measurer whose device dropped off."""

    def run(self, schedule, progress):
        raise DeviceLost("ort-cpu", "the connection failed.")


@pytest.fixture
def judge(tmp_path):
    """Judges one cell by a measurer of made-up starts; keywords change the cell."""
    old = write_classifier(tmp_path / "old.onnx")
    write_classifier(tmp_path / "new.onnx", padding=100)

    def call(starter, budget=None, relation=None, accepts=(), **cell):
        raw = {
            "baseline": {"old": {"path": "old.onnx", "sha256": open_artifact(old).sha256}},
            "cell": [{"name": "a", "artifact": "new.onnx", "budget": budget or {}, "relation": relation or {}, **cell}],
        }
        if relation:
            raw["cell"][0]["baseline"] = "old"
        clock = Clock(start=lambda beginning, device, progress: started(beginning, device_of(starter), progress))
        return run_gate(GateConfig.from_dict(raw, tmp_path), accepts, tool="test", day=TODAY, clock=clock)

    return call


def outcome(result):
    return {check.name: check.status for _, check in result.checks}


BOTH = {"memory": 0.1, "cold_start": 0.1}


@pytest.mark.parametrize(
    ("truth", "fails"), [({}, set()), ({"larger": 1.2}, {"memory"}), ({"slower": 1.2}, {"cold_start"})]
)
def test_what_grew_breaks_its_relation_and_no_other(judge, truth, fails):
    result = judge(Starter(**truth), relation=BOTH)
    assert outcome(result) == {f"relation.{name}": "fail" if name in fails else "pass" for name in BOTH}
    assert result.exit_code == (1 if fails else 0)


@pytest.mark.parametrize(("budget", "status"), [("39 MB", "fail"), ("41 MB", "pass"), ("40 MB", "inconclusive")])
def test_memory_is_what_the_process_gained(judge, budget, status):
    starter = Starter()
    assert outcome(judge(starter, {"memory": budget})) == {"budget.memory": status}
    assert set(starter.asked) == {B}, "a budget takes no baseline"


def test_a_cold_start_is_opening_and_the_first_call(judge):
    assert outcome(judge(Starter(noise=0), {"cold_start": "201 ms"})) == {"budget.cold_start": "pass"}
    assert outcome(judge(Starter(noise=0), {"cold_start": "200.9 ms"})) == {"budget.cold_start": "fail"}


def test_starts_grow_while_a_check_is_open_and_no_further(judge):
    clear, doubtful = Starter(), Starter(larger=1.1)
    assert len(judge(clear, relation={"memory": 0.1}).evidence[0].starts[0].pairs) == LOOKS[0]
    result = judge(doubtful, relation={"memory": 0.1})
    assert len(result.evidence[0].starts[0].pairs) == LOOKS[-1]
    assert outcome(result) == {"relation.memory": "inconclusive"}
    assert result.exit_code == 4
    assert len(doubtful.asked) == 2 * (LOOKS[-1] + 1), "the first start of each file does not count"
    assert doubtful.asked[2:6] == [B, A, A, B], "who begins takes turns"


def test_a_file_as_good_as_its_baseline_hardly_ever_fails(judge):
    """At the bound itself, the worst case: at most α/2 of gates may fail."""
    failed = 0
    for seed in range(60):
        starter = Starter(noise=0.3)
        starter.rng = random.Random(seed)
        failed += outcome(judge(starter, relation={"cold_start": 1e-6}))["relation.cold_start"] == "fail"
    assert failed <= 5


def test_an_accept_covers_up_to_its_value(judge):
    entry = {"cell": "a", "check": "relation.cold_start", "reason": "known", "accepted": TODAY, "expires": TODAY}
    for at_most, status in ((1.25, "accepted"), (1.15, "fail")):
        result = judge(Starter(slower=1.2), relation={"cold_start": 0.1}, accepts=[Accept(**entry, at_most=at_most)])
        assert outcome(result) == {"relation.cold_start": status}


def test_a_system_that_does_not_tell_is_skipped_or_fails(judge):
    result = judge(Starter(told=False), {"memory": "1 GB", "cold_start": "1 s"})
    assert outcome(result) == {"budget.memory": "skipped", "budget.cold_start": "pass"}
    assert outcome(judge(Starter(told=False), {"memory": "1 GB"}, required=True)) == {"budget.memory": "fail"}


@pytest.mark.parametrize("starter", [Gone(), Starter(changes=True)])
def test_what_could_not_be_measured_is_no_pass(judge, starter):
    result = judge(starter, {"memory": "1 GB"})
    assert outcome(result) == {"budget.memory": "invalid"}
    assert result.exit_code == 4


class Absent:
    """A measurer of a device that is not there."""

    def run(self, schedule, progress):
        raise TargetUnavailable("ort-cpu", "it is switched off")


def test_a_target_that_is_not_here_is_skipped(judge):
    result = judge(Absent(), {"memory": "1 GB"})
    assert outcome(result) == {"budget.memory": "skipped"}
    assert result.exit_code == 1, "a gate that evaluated nothing has failed"
    assert outcome(judge(Absent(), {"memory": "1 GB"}, required=True)) == {"budget.memory": "fail"}


@pytest.mark.parametrize(
    ("budget", "words"), [({"cold_start": 8}, "no unit"), ({"memory": "10%"}, "belongs in a relation")]
)
def test_a_bound_without_a_meaning_is_refused(judge, budget, words):
    with pytest.raises(RecipeError, match=words):
        judge(Starter(), budget)


class Burst(Starter):
    """Another process takes the machine for the first starts."""

    def run(self, schedule, progress):
        self.slower = 1.5 if len(self.asked) < 2 * (LOOKS[0] + 1) else 1.0
        return super().run(schedule, progress)


def test_what_does_not_repeat_fails_no_job(judge):
    """Kind: a job that fails because something else ran on the machine for some seconds."""
    result = judge(Burst(), relation={"cold_start": 0.1})
    assert outcome(result) == {"relation.cold_start": "inconclusive"}
    assert "pass in starts that were taken later" in result.cells[0].checks[0].reason
    confirmed = judge(Starter(slower=1.5), relation={"cold_start": 0.1})
    assert [len(starts.pairs) for starts in confirmed.evidence[0].starts] == [LOOKS[0]] * 2
    assert "confirmed it" in confirmed.cells[0].checks[0].reason


def test_an_accept_below_the_bound_covers_nothing(judge):
    entry = {"cell": "a", "check": "relation.memory", "reason": "x", "accepted": TODAY, "expires": TODAY}
    for at_most in (0, 1.05):
        result = judge(Starter(larger=1.1), relation={"memory": 0.1}, accepts=[Accept(**entry, at_most=at_most)])
        assert outcome(result) == {"relation.memory": "inconclusive"}
        assert [use.state for use in result.accept_uses] == ["undecided"]
    over = judge(Starter(larger=1.22), relation={"memory": 0.1}, accepts=[Accept(**entry, at_most=1.2199)])
    assert "The interval holds 1.220" in over.cells[0].checks[0].reason or outcome(over) != {
        "relation.memory": "inconclusive"
    }


def test_starts_that_do_not_fit_the_cell_are_refused(judge, tmp_path):
    record = judge(Starter(), relation=BOTH).to_dict()

    def load(change):
        altered = copy.deepcopy(record["raw"])
        change(altered["evidence"][0]["starts"][0])
        (tmp_path / "gate.json").write_text(json.dumps({**record, **sealed(altered)}))
        return GateResult.load(tmp_path / "gate.json")

    for change, words in (
        (lambda starts: starts["scenario"].update(target="openvino-cpu"), "another target"),
        (lambda starts: starts["pairs"][0]["artifact"].update(peak_rss_bytes=None), "some do not"),
        (lambda starts: starts["pairs"][0]["artifact"].update(peak_rss_bytes=10**400), "peak_rss_bytes"),
        (lambda starts: starts["pairs"].pop(), "at least 8"),
    ):
        with pytest.raises(ArtifactError, match=words):
            load(change)


def test_a_baseline_that_the_job_built_is_told(tmp_path):
    write_classifier(tmp_path / "old.onnx")
    write_classifier(tmp_path / "new.onnx")
    cell = {"name": "a", "artifact": "new.onnx", "baseline": "old", "relation": {"size": 0.0}}
    raw = {"baseline": {"old": {"path": "old.onnx", "built": True}}, "cell": [cell]}
    result = run_gate(GateConfig.from_dict(raw, tmp_path), tool="test", day=TODAY)
    assert "The baseline of a was built by this job, and held to no digest." in gate_markdown(result)
    raw["cell"][0]["artifact"] = "old.onnx"
    with pytest.raises(BaselineError, match="is the artifact itself"):
        run_gate(GateConfig.from_dict(raw, tmp_path), tool="test", day=TODAY)
    raw["baseline"]["old"]["path"] = "hf://org/name/a.onnx"
    with pytest.raises(RecipeError, match="name its sha256"):
        GateConfig.from_dict(raw, tmp_path)


def test_a_result_is_read_back_and_an_altered_start_is_noticed(judge, tmp_path):
    result = judge(Starter(larger=1.3), {"download": "1 MB"}, BOTH)
    record = result.to_dict()
    path = tmp_path / "gate.json"
    path.write_text(json.dumps(record))
    assert GateResult.load(path) == result
    start = record["raw"]["evidence"][0]["starts"][0]["pairs"][0]["artifact"]
    start["peak_rss_bytes"] -= 10 * MB
    path.write_text(json.dumps(record))
    with pytest.raises(ArtifactError):
        GateResult.load(path)


def test_more_starts_than_decide_are_refused(judge):
    """Kind: measuring on until the answer suits."""
    decided = judge(Starter(), relation={"memory": 0.1})
    doubtful = judge(Starter(noise=0.02), relation={"memory": 0.01})
    assert len(doubtful.evidence[0].starts[0].pairs) > LOOKS[0]
    for result, starts in (
        (decided, doubtful.evidence[0].starts[0]),
        (
            doubtful,
            doubtful.evidence[0]
            .starts[0]
            .model_copy(update={"pairs": doubtful.evidence[0].starts[0].pairs[: LOOKS[0]]}),
        ),
    ):
        forged = result.model_copy(update={"evidence": (result.evidence[0].model_copy(update={"starts": (starts,)}),)})
        with pytest.raises(ValueError, match="which is not when they decide"):
            forged.require_protocol()


def test_charts_and_tables_have_every_number_once(judge):
    result = judge(Starter(larger=1.3), {"memory": "1 GB", "cold_start": "1 s", "download": "1 MB"}, BOTH)
    names = [point.measure for point in points(result)]
    assert names == [
        *("size", "bytes of download", "bytes of memory", "ms of cold start"),
        *("memory ratio", "cold start ratio"),
    ]
    text = gate_markdown(result)
    assert "processes; at most" in text
    assert "Measured on: scripted" in text


def test_download_is_what_is_fetched(judge, tmp_path):
    """A file of which a hundred zeros are packed: it ships as more bytes than are fetched."""
    artifact = open_artifact(write_classifier(tmp_path / "zeros.onnx", padding=100))
    result = judge(Starter(), {"download": artifact.download_bytes, "size": artifact.size_bytes - 1})
    assert outcome(result) == {"budget.size": "fail", "budget.download": "pass"}


@given(st.lists(st.floats(-1, 1), min_size=8, max_size=40, unique=True), st.floats(0.01, 0.2))
def test_order_statistics_hold_the_median(values, alpha):
    found = order_interval(values, alpha)
    assert found.lo <= found.point <= found.hi
    assert {found.lo, found.hi} <= set(values)


def test_order_statistics_cover_as_often_as_they_say():
    rng, missed = random.Random(0), 0
    for _ in range(2000):
        found = order_interval([rng.expovariate(1.0) for _ in range(16)], 0.05)
        missed += not found.lo <= 0.6931471805599453 <= found.hi
    assert 0.005 < missed / 2000 <= 0.05
    with pytest.raises(ValueError, match="measure more"):
        order_interval([1.0] * 5, 0.05)


@pytest.mark.clock
def test_real_starts_reach_the_result(tmp_path):
    """No verdict on time is asserted; memory is what a small model takes with ONNX Runtime."""
    write_classifier(tmp_path / "new.onnx")
    raw = {"cell": [{"name": "a", "artifact": "new.onnx", "budget": {"memory": "2 GB", "cold_start": "60 s"}}]}
    result = run_gate(GateConfig.from_dict(raw, tmp_path), tool="test", day=TODAY, clock=Clock(start=partial(started)))
    memory, start = result.cells[0].checks
    assert memory.status == start.status == "pass"
    assert 1 * MB < memory.value < 500 * MB
    assert start.value > 1
