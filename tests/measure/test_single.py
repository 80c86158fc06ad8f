"""bench run, calibrate and verify, on tiny models and really measured; and what their files refuse."""

import json
import os
import sys

import pytest
from builders import write_stack

from toolchain.errors import ArtifactError, MeasurementError, RecipeError, WorkloadRefused
from toolchain.measure.calibration import Calibration, built_in, calibrate
from toolchain.measure.compare import compare
from toolchain.measure.comparison import Comparison
from toolchain.measure.samples import Design, Workload
from toolchain.measure.single import Measurement, measure
from toolchain.measure.stored import sealed
from toolchain.measure.verify import RESULTS, verify
from toolchain.on_device.runner import COLD_SCHEDULE_SCHEMA, VariantError, run_cold

pytestmark = pytest.mark.clock

FOUR = Workload(batch=4)
SHORT = Design(slot_ms=2.0, warmup_s=0.02, tau=0.6)
LEAST = SHORT.model_copy(update={"sessions": 1, "blocks": 4})


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(a file, its measurement), made once; tests change copies alone."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMVIT_CACHE_DIR", str(folder / "cache"))
        path = write_stack(folder / "a.onnx")
        return path, measure(path, "ort-cpu", FOUR, SHORT.model_copy(update={"blocks": 50}), cold_starts=2)


def test_one_artifact(measured):
    path, found = measured
    shown = found.to_dict()
    assert shown["size_bytes"] == path.stat().st_size
    assert 0 < shown["latency_ms"]["lo"] <= shown["latency_ms"]["point"] <= shown["latency_ms"]["hi"] < 50
    assert shown["samples_per_second"] == pytest.approx(4e3 / shown["latency_ms"]["point"])
    assert shown["p90_ms"] >= shown["latency_ms"]["point"] * 0.9
    assert (shown["sessions"], shown["blocks"]) == (6, 300)
    assert shown["tau_min"] > 0
    cold = shown["cold_start"]
    assert cold["processes"] == 2
    assert cold["open_ms"] > shown["latency_ms"]["point"], "opening loads the runtime"
    assert cold["first_ms"] > 0
    if sys.platform == "linux":
        assert 5e6 < cold["rss_before_bytes"] < cold["peak_rss_bytes"] < 1e9
    assert cold["device_bytes"] is None


def test_memory_is_that_of_the_artifact(stack, tmp_path):
    """A file that is 60 MB larger holds about that much more."""
    if sys.platform != "linux":
        pytest.skip("the peak of a process is read from /proc")
    small = stack(tmp_path / "small.onnx", layers=2, width=64)
    large = stack(tmp_path / "large.onnx", layers=4, width=2000)
    sizes, peaks = [], []
    for path in (small, large):
        found = measure(path, "ort-cpu", FOUR, LEAST, cold_starts=2).to_dict()
        sizes.append(found["size_bytes"])
        peaks.append(found["cold_start"]["peak_rss_bytes"])
    assert peaks[1] - peaks[0] > 0.9 * (sizes[1] - sizes[0])


def test_it_comes_back_and_every_edit_is_refused(measured, tmp_path):
    path, found = measured
    file = tmp_path / "run.json"
    found.save(file)
    assert Measurement.load(file).to_dict() == found.to_dict()
    assert isinstance(verify(file, a=path, here=True), Measurement)
    text = file.read_text()
    edits = {
        "latency": lambda s: s["latency_ms"].update(point=0.001),
        "memory": lambda s: s["cold_start"].update(peak_rss_bytes=1.0),
        "a cold start": lambda s: s["raw"]["cold"].pop(),
        "a session": lambda s: s["raw"]["sessions"].pop(),
        "a sample": lambda s: s["raw"]["sessions"][0]["blocks"][0]["samples_ns"]["A"].pop(),
    }
    for edit in edits.values():
        stored = json.loads(text)
        edit(stored)
        file.write_text(json.dumps(stored))
        with pytest.raises(ArtifactError, match=r"run\.json"):
            verify(file)
    file.write_text(text[: len(text) // 2])
    with pytest.raises(ArtifactError):
        verify(file)


def test_a_result_is_of_its_artifacts_and_of_its_machine(stack, tmp_path):
    a, b = stack(tmp_path / "a.onnx"), stack(tmp_path / "b.onnx", layers=5)
    file = tmp_path / "compared.json"
    compare(a, b, "ort-cpu", FOUR, SHORT).save(file)
    assert isinstance(verify(file, a=a, b=b, here=True), Comparison)
    with pytest.raises(ArtifactError, match=r"is not of .*b\.onnx: it timed a\.onnx"):
        verify(file, a=b)
    with pytest.raises(ArtifactError, match=r"is not of .*a\.onnx: it timed b\.onnx"):
        verify(file, b=a)
    moved = json.loads(file.read_text())
    for machine in (moved["environment"], *_machines(moved["raw"])):
        machine["cpu"] = "another"
    moved.update(sealed(moved["raw"]))
    file.write_text(json.dumps(moved))
    verify(file)
    with pytest.raises(ArtifactError, match=r"measured on another machine: cpu 'another' → "):
        verify(file, here=True)


def _machines(raw):
    for session in raw["sessions"]:
        for fingerprint in session["fingerprint"].values():
            yield fingerprint["machine"]


def test_what_is_no_result_is_said_to_be_none(measured, tmp_path):
    _, found = measured
    found.save(tmp_path / "run.json")
    with pytest.raises(RecipeError, match="leave --b out"):
        verify(tmp_path / "run.json", b=tmp_path / "b.onnx")
    (tmp_path / "other.json").write_text('{"schema": "slimvit.bench/1"}')
    with pytest.raises(ArtifactError, match=r"has schema 'slimvit.bench/1'; verified are 'slimvit.bench/2'"):
        verify(tmp_path / "other.json")


def test_calibration_gives_a_row_for_each_look_of_a_comparison(tmp_path, stack):
    found = calibrate(stack(tmp_path / "a.onnx"), "ort-cpu", FOUR, Design(blocks=4, slot_ms=2.0, warmup_s=0.01))
    assert [(row.look, row.sessions, row.blocks) for row in found.rows] == [(1, 6, 24), (2, 12, 48), (3, 18, 96)]
    assert all(row.tau_min > 0 for row in found.rows)
    assert 0 < found.rows[0].seconds < found.rows[1].seconds < found.rows[2].seconds
    assert found.rows[0].tau_min == found.comparison.at_look(1).tau_min != found.comparison.tau_min
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(found.to_dict()))
    assert verify(file, a=tmp_path / "a.onnx", here=True) == found
    record = json.loads(file.read_text())
    record["rows"][0]["tau_min"] /= 2
    file.write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match="says rows"):
        verify(file)
    short = found.comparison.at_look(2)
    with pytest.raises(ValueError, match="the next are missing"):
        Calibration(comparison=short, seconds=found.seconds[:2])
    with pytest.raises(ValueError, match="ascending seconds"):
        Calibration(comparison=found.comparison, seconds=found.seconds[::-1])


def test_the_built_in_artifact_runs(tmp_path):
    found = measure(built_in(tmp_path / "c.onnx"), design=LEAST, cold_starts=0)
    assert found.to_dict()["cold_start"] is None
    assert found.scenario.inputs[0].shape == (1, 197, 384)


def test_cores_can_be_chosen(stack, tmp_path):
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system does not let a process choose its cores")
    here = sorted(os.sched_getaffinity(0))
    path = stack(tmp_path / "a.onnx")
    found = measure(path, "ort-cpu", Workload(affinity=(here[-1],)), LEAST, cold_starts=1)
    assert found.environment["affinity"] == [here[-1]]
    with pytest.raises(MeasurementError, match=r"cannot be measured here: cores \[4711\] are not there"):
        measure(path, "ort-cpu", Workload(affinity=(4711,)), LEAST)
    assert sorted(os.sched_getaffinity(0)) == here


def test_a_cold_start_that_fails_says_why(tmp_path):
    schedule = {
        "schema": COLD_SCHEDULE_SCHEMA,
        "threads": 1,
        "affinity": None,
        "inputs": {"count": 1, "seed": 0, "tensors": [{"shape": [1, 4], "dtype": "float32"}]},
        "variants": [{"name": "A", "path": str(tmp_path / "absent.onnx"), "runtime": "ort-cpu", "inputs": ["x"]}],
    }
    with pytest.raises(VariantError, match=r"absent\.onnx does not run on ort-cpu"):
        run_cold(schedule)


def test_a_result_of_chosen_cores_is_of_this_machine(stack, tmp_path):
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system does not let a process choose its cores")
    core = max(os.sched_getaffinity(0))
    found = measure(stack(tmp_path / "a.onnx"), "ort-cpu", Workload(affinity=(core,)), LEAST, cold_starts=0)
    found.save(tmp_path / "r.json")
    assert verify(tmp_path / "r.json", here=True).scenario.affinity == (core,)


@pytest.mark.parametrize("target", ["ort-cpu", "openvino-cpu"])
def test_more_threads_than_cores_are_refused_and_the_file_is_not_to_blame(stack, tmp_path, target):
    if target == "openvino-cpu":
        pytest.importorskip("openvino")
    with pytest.raises(WorkloadRefused, match=f"target '{target}' cannot do this: 4096 threads are more than the"):
        measure(stack(tmp_path / "a.onnx"), target, Workload(threads=4096), SHORT, cold_starts=1)
    if hasattr(os, "sched_getaffinity"):
        core = min(os.sched_getaffinity(0))
        with pytest.raises(WorkloadRefused, match="2 threads are more than the 1 core"):
            measure(tmp_path / "a.onnx", target, Workload(threads=2, affinity=(core,)), SHORT, cold_starts=1)


def test_every_kind_of_result_is_known_by_its_own_schema():
    assert {schema: kind.name for schema, kind in RESULTS.items()} == {schema: schema for schema in RESULTS}
