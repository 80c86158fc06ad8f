"""The profile of a file's nodes: sums, order, and that the process which takes it is a fresh one."""

from __future__ import annotations

import json

import pytest

from toolchain.analysis import operators
from toolchain.analysis.operators import Profile, profile_operators
from toolchain.errors import ArtifactError, MeasurementError, RecipeError, TargetUnavailable
from toolchain.measure.samples import Workload
from toolchain.progress import SILENT
from toolchain.targets import NodeTime
from toolchain.targets.ort import node_times

pytestmark = pytest.mark.clock

NODES = (
    NodeTime("a", "MatMul", 4e6),
    NodeTime("b", "MatMul", 2e6),
    NodeTime("c", "Softmax", 3e6),
    NodeTime("d", "Add", 1e6),
)


def test_nodes_are_summed_by_operator_and_ordered_by_cost():
    profile = Profile("m.onnx", "ort-cpu", 1, 1, 30, NODES)
    assert profile.total_ms == 10.0
    assert [node.name for node in profile.costliest(3)] == ["a", "c", "b"]
    assert [(row.op, row.count, row.ms, row.share) for row in profile.by_operator()] == [
        ("MatMul", 2, 6.0, 0.6),
        ("Softmax", 1, 3.0, 0.3),
        ("Add", 1, 1.0, 0.1),
    ]
    record = json.loads(json.dumps(profile.to_dict(), allow_nan=False))
    assert sum(row["share"] for row in record["operators"]) == pytest.approx(1)
    assert [row["name"] for row in record["nodes"]] == ["a", "c", "b", "d"]


@pytest.mark.parametrize("target", ["ort-cpu", "openvino-cpu"])
def test_every_product_is_seen_and_costs_most_of_the_time(stack, tmp_path, target):
    if target != "ort-cpu":
        pytest.importorskip("openvino", reason="openvino is not installed: pip install 'slimvit[openvino]'")
    path = stack(tmp_path / "m.onnx", width=384, layers=3)
    found = profile_operators(path, target, Workload(batch=64), calls=10)
    products = [node for node in found.nodes if node.op in ("MatMul", "FullyConnected")]
    assert len(products) == 3
    assert sum(node.ns for node in products) > 0.5 * sum(node.ns for node in found.nodes)
    assert found.total_ms > 3 * 64 * 384**2 / 1e12 * 1e3, "no core does a million million products a second"
    assert (found.name, found.calls) == ("m.onnx", 10)


def test_neither_the_warm_up_nor_an_interrupted_call_counts():
    """Events of the first calls are dropped; of the others the middle half is averaged, finer than ONNX Runtime's microseconds."""
    events = [
        {"cat": "Node", "name": "n_kernel_time", "dur": took, "args": {"op_name": "MatMul"}}
        for took in (900, 800, 10, 11, 10, 3000)
    ]
    events += [{"cat": "Node", "name": "n_fence_before", "dur": 5, "args": {}}, {"cat": "Session", "name": "run"}]
    assert node_times(events, warm_up=2) == [NodeTime("n", "MatMul", 10_500.0)]
    assert node_times(events[:3], warm_up=2) == [NodeTime("n", "MatMul", 10_000.0)], "of one call, that one"


def test_it_is_taken_in_a_process_of_its_own_that_leaves_nothing(stack, tmp_path, monkeypatch, watched):
    calls = watched(operators.subprocess, "run")
    path = stack(tmp_path / "m.onnx")
    monkeypatch.chdir(tmp_path)
    profile_operators(path, calls=2)
    assert len(calls) == 1
    assert list(tmp_path.iterdir()) == [path], "ONNX Runtime writes its profile where it is told to, and it is removed"


def test_what_cannot_be_profiled_is_refused(stack, tmp_path, monkeypatch):
    path = stack(tmp_path / "m.onnx")
    with pytest.raises(TargetUnavailable, match="ort-cpu, openvino-cpu and openvino-cpu-bf16 can"):
        profile_operators(path, target="eager")
    with pytest.raises(RecipeError, match="at least 1"):
        profile_operators(path, calls=0)
    with pytest.raises(RecipeError, match="fixed batch"):
        profile_operators(stack(tmp_path / "fixed.onnx", batch=2), workload=Workload(batch=3))
    (tmp_path / "bad.onnx").write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ArtifactError, match=r"bad\.onnx"):
        profile_operators(tmp_path / "bad.onnx")
    with pytest.raises(ArtifactError, match=r"cannot load .*absent\.onnx"):  # what the process itself finds
        operators._in_a_process("ort-cpu", request(tmp_path / "absent.onnx"), SILENT)
    with pytest.raises(RecipeError, match=r"cores \[4711\] are not there"):
        profile_operators(path, workload=Workload(affinity=(4711,)))
    with pytest.raises(RecipeError, match=r"4096 threads are more than"):
        profile_operators(path, workload=Workload(threads=4096))
    (tmp_path / "sitecustomize.py").write_text("import os\nos._exit(1)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(MeasurementError, match="exit code 1"):
        profile_operators(path)


def request(path):
    inputs = {"count": 1, "seed": 0, "tensors": [{"shape": [1, 96], "dtype": "float32"}]}
    return {
        "path": str(path),
        "target": "ort-cpu",
        "threads": 1,
        "affinity": None,
        "warm_up": 1,
        "calls": 1,
        "names": ["image"],
        "inputs": inputs,
    }
