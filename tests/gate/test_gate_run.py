"""The exact checks of a gate: each can fail, each only for its own reason; accepts; nothing evaluated."""

from __future__ import annotations

import datetime as dt
import json
import struct
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import safetensors.numpy
from builders import write_classifier
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

from toolchain.artifacts import open_artifact
from toolchain.data import open_source
from toolchain.data.transforms import Wanted
from toolchain.errors import ArtifactError, BaselineError, RecipeError, TargetUnavailable, WorkloadRefused
from toolchain.files import sha256, write_json
from toolchain.gate import Accept, GateConfig, GateResult, accepts_path, add_accepts, facts, load_accepts, run_gate
from toolchain.gate.config import DataSection
from toolchain.gate.facts import prepared_otherwise
from toolchain.gate.timing import Clock, timed
from toolchain.model import Preprocess
from toolchain.outputs import OUTPUT

TODAY = dt.date(2030, 1, 15)


@pytest.fixture
def judge(tmp_path):
    """Judges one cell against a baseline; keywords change the artifact, budgets and relations."""
    old = write_classifier(tmp_path / "old.onnx")

    def call(budget=None, relation=None, accepts=(), why=False, measure=timed, cell=None, **changes):
        write_classifier(tmp_path / "new.onnx", **changes)
        raw = {
            "data": {"source": "digits"},
            "baseline": {"old": {"path": "old.onnx", "sha256": open_artifact(old).sha256}},
            "cell": [
                {
                    "name": "digits",
                    "artifact": "new.onnx",
                    "baseline": "old",
                    "budget": budget or {},
                    "relation": relation or {},
                    **(cell or {}),
                }
            ],
        }
        config = GateConfig.from_dict(raw, tmp_path)
        return run_gate(config, accepts, tool="test", day=TODAY, why=why, clock=Clock(measure))

    return call


def write_classifier_by_height(path):
    """A model that names class height / 8 for every image, whatever its size."""
    constants = {
        "eight": np.array([8]),
        "depth": np.array([10]),
        "off_on": np.array([0, 1], np.float32),
        "axes": np.array([1, 2, 3]),
        "column": np.array([-1, 1]),
    }
    nodes = [
        helper.make_node("Shape", ["image"], ["height"], start=2, end=3),
        helper.make_node("Div", ["height", "eight"], ["class"]),
        helper.make_node("OneHot", ["class", "depth", "off_on"], ["row"]),
        helper.make_node("ReduceMean", ["image", "axes"], ["mean"], keepdims=0),
        helper.make_node("Reshape", ["mean", "column"], ["means"]),
        helper.make_node("Add", ["means", "row"], ["logits"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, "height", "width"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [image], [logits], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


@pytest.fixture
def size(tmp_path):
    return open_artifact(write_classifier(tmp_path / "sized.onnx")).size_bytes


def statuses(result):
    return {check.name: check.status for _, check in result.checks}


def test_equal_artifacts_hold_every_relation(judge):
    relation = {"size": 0.0, "params": 0.0, "nodes": 0.0, "accuracy": 0.0, "parity": "fp32"}
    result = judge(relation=relation, why=True)
    assert statuses(result) == {f"relation.{name}": "pass" for name in relation}
    assert (result.verdict, result.exit_code) == ("pass", 0)
    assert result.evidence[0].changes == ()


@pytest.mark.parametrize(
    ("fault", "fails"),
    [
        ({"padding": 100}, {"size", "params"}),
        ({"swap": 3}, {"accuracy", "parity"}),
        ({"noise": 1e-3}, {"parity"}),
    ],
)
def test_a_planted_fault_breaks_its_relations_and_no_other(judge, fault, fails):
    relation = {"size": 0.01, "params": 0.01, "nodes": 0.0, "accuracy": 0.01, "parity": "fp32"}
    result = judge(relation=relation, **fault)
    assert {name for name, status in statuses(result).items() if status == "fail"} == {f"relation.{n}" for n in fails}
    assert (result.verdict, result.exit_code) == ("fail", 1)


@pytest.mark.parametrize(
    ("data", "fails"), [({"source": "digits"}, True), ({}, True), ({"source": "digits", "mean": [0.0]}, False)]
)
def test_a_file_that_declares_another_preparation_of_images_is_not_the_baselines_model(tmp_path, data, fails):
    """Its outputs agree for equal inputs; whoever prepares pictures as it says gets others."""
    model = onnx.load(write_classifier(tmp_path / "old.onnx"))
    model.metadata_props[0].value = model.metadata_props[0].value.replace('"mean": [0.0]', '"mean": [0.5]')
    onnx.save(model, tmp_path / "new.onnx")
    cell = {"name": "a", "artifact": "new.onnx", "baseline": "old", "relation": {"parity": "fp32"}}
    raw = {"data": data, "baseline": {"old": {"path": "old.onnx", "built": True}}, "cell": [cell]}
    result = run_gate(GateConfig.from_dict(raw, tmp_path), tool="test", day=TODAY)
    (check,) = result.cells[0].checks
    assert (check.status, result.evidence[0].parity) == (("fail", "fail") if fails else ("pass", "pass"))
    assert ("another preparation of images than its baseline (mean)" in check.reason) == fails


@pytest.mark.parametrize(
    ("ours", "theirs", "asked", "differing", "untold"),
    [
        ({"crop_pct": 0.875}, {"crop_pct": 0.875 + 1e-7}, {}, (), ""),
        ({"crop_pct": 0.875}, {"crop_pct": 0.9}, {}, ("crop_pct",), ""),
        ({"crop_mode": "squash"}, {"crop_mode": "center"}, {}, ("crop_mode",), ""),
        ({"crop_mode": "squash"}, {"crop_mode": "center"}, {"crop_mode": "squash"}, (), ""),
        ({"crop_mode": "squash", "exif_orientation": True}, {}, {}, (), "declares crop_mode, exif_orientation, which"),
        ({"exif_orientation": True}, {}, {"exif_orientation": True}, (), ""),
        ({"interpolation": "bicubic"}, {"interpolation": "bilinear"}, {}, ("interpolation",), ""),
    ],
)
def test_a_preparation_differs_where_both_files_declare_it_and_data_does_not(ours, theirs, asked, differing, untold):
    sides = [SimpleNamespace(preprocess=Preprocess((1, 8, 8), (0.0,), (1.0,), **each)) for each in (ours, theirs)]
    data = DataSection.model_validate(asked)
    keys, notes = prepared_otherwise(*sides, data.preparation)
    assert keys == differing
    assert (untold in notes[0]) if untold else notes == ()
    assert prepared_otherwise(sides[0], SimpleNamespace(preprocess=None), data.preparation) == ((), ())


def write_labeller(path):
    """The digits classifier, of which the labels alone are left."""
    model = onnx.load(write_classifier(path))
    (scores,) = model.graph.output
    model.graph.node.append(helper.make_node("ArgMax", [scores.name], ["label"], axis=1, keepdims=1))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("label", TensorProto.INT64, ["batch", 1]))
    onnx.save(model, path)


def test_files_that_name_no_scores_fail_their_own_accuracy_and_end_no_gate(tmp_path):
    """Kind: one artifact that a check does not suit, and no verdict on the others."""
    write_labeller(tmp_path / "labels.onnx")
    write_classifier(tmp_path / "scores.onnx")
    features = onnx.load(tmp_path / "scores.onnx")
    features.metadata_props.add(key=OUTPUT, value="features")
    onnx.save(features, tmp_path / "features.onnx")
    cells = [
        {"name": "a", "artifact": "labels.onnx", "budget": {"size": "1 MB", "accuracy": 0.5}},
        {"name": "b", "artifact": "scores.onnx", "budget": {"accuracy": 0.5}},
        {"name": "c", "artifact": "scores.onnx", "baseline": "labels", "budget": {"accuracy": 0.5}},
        {"name": "d", "artifact": "features.onnx", "baseline": "scores", "budget": {"accuracy": 0.5}},
        {"name": "e", "artifact": "labels.onnx", "baseline": "features", "relation": {"features": {"error": 0.5}}},
    ]
    for cell in cells[2:4]:
        cell["relation"] = {"accuracy": 0.1, "size": 0.5}
    baselines = {name: {"path": f"{name}.onnx", "built": True} for name in ("labels", "scores", "features")}
    raw = {"data": {"source": "digits"}, "baseline": baselines, "cell": cells}
    result = run_gate(GateConfig.from_dict(raw, tmp_path), tool="test", day=TODAY)
    failed = {(cell.name, check.name): check for cell, check in result.checks if check.status != "pass"}
    assert {check.status for check in failed.values()} == {"fail"}
    assert list(failed) == [
        ("a", "budget.accuracy"),
        ("c", "relation.accuracy"),
        ("d", "budget.accuracy"),
        ("d", "relation.accuracy"),
        ("e", "relation.features"),
    ]
    assert (len(result.checks), result.exit_code) == (10, 1)
    for key in (("a", "budget.accuracy"), ("c", "relation.accuracy")):
        assert failed[key].reason.startswith(
            f"It was not judged: {tmp_path / 'labels.onnx'} gives whole numbers (int64)"
        )
        assert failed[key].reason.endswith("in its output 'label': name a file that gives the scores of all classes.")
    write_json(tmp_path / "gate.json", result.to_dict())
    assert GateResult.load(tmp_path / "gate.json") == result


def test_files_that_name_no_scores_fail_their_own_parity_and_end_no_gate(tmp_path):
    """Kind: one artifact that a check does not suit, and no verdict on the others."""
    for name in ("scores", "scores0"):
        write_classifier(tmp_path / f"{name}.onnx")
    for name in ("labels", "labels0"):
        write_labeller(tmp_path / f"{name}.onnx")
    cells = [
        {"name": name, "artifact": f"{name}.onnx", "baseline": name, "relation": {"parity": {"cosine_min": 0.99}}}
        for name in ("labels", "scores")
    ]
    baselines = {name: {"path": f"{name}0.onnx", "built": True} for name in ("labels", "scores")}
    result = run_gate(GateConfig.from_dict({"baseline": baselines, "cell": cells}, tmp_path), tool="test", day=TODAY)
    assert [check.status for _, check in result.checks] == ["fail", "pass"]
    reason = result.cells[0].checks[0].reason
    assert reason.startswith("The outputs were not judged against the baseline's: labels0.onnx and labels.onnx give ")
    assert reason.endswith("compare files that give the scores of all classes.")


def test_a_budget_is_exact_to_the_byte(judge, size):
    assert statuses(judge({"size": size})) == {"budget.size": "pass"}
    assert statuses(judge({"size": size - 1})) == {"budget.size": "fail"}
    assert statuses(judge({"params": 650, "nodes": 2})) == {"budget.params": "pass", "budget.nodes": "pass"}
    assert statuses(judge({"params": 649, "nodes": 1})) == {"budget.params": "fail", "budget.nodes": "fail"}


def test_a_relation_is_exact_to_the_byte(judge, size):
    grown = judge(relation={"size": 0.0}, padding=1).cells[0]
    gained = grown.artifact.size_bytes - size
    assert gained > 0
    share = gained / size
    assert statuses(judge(relation={"size": share * 1.0001}, padding=1)) == {"relation.size": "pass"}
    assert statuses(judge(relation={"size": share * 0.9999}, padding=1)) == {"relation.size": "fail"}


def test_accuracy_is_compared_in_images(judge):
    (check,) = judge(relation={"accuracy": 0.0}, swap=3).cells[0].checks
    lost, total = check.value - check.baseline, 359
    assert lost > 50
    assert f"of {total}" in check.reason
    assert statuses(judge(relation={"accuracy": lost / total + 1e-9}, swap=3)) == {"relation.accuracy": "pass"}
    assert statuses(judge(relation={"accuracy": lost / total - 1e-9}, swap=3)) == {"relation.accuracy": "fail"}
    right = (total - check.value) / total
    assert statuses(judge({"accuracy": round(right - 1e-6, 6)}, swap=3)) == {"budget.accuracy": "pass"}
    assert statuses(judge({"accuracy": round(right + 1e-5, 6)}, swap=3)) == {"budget.accuracy": "fail"}


DIGITS = open_source("digits", Wanted((1, 8, 8), {"mean": (0.0,), "std": (1.0,)}))


@pytest.fixture
def judge_runs(tmp_path):
    """Judges the file of a run against that of another, by what their reports say of their pictures."""

    def call(artifact, baseline, relation=True):
        for name, data in (("new", artifact), ("old", baseline)):
            path = write_classifier(tmp_path / name / "onnx" / f"{name}.onnx")
            listed = [{"path": f"onnx/{name}.onnx", "bytes": 1, "sha256": data.pop("sha256", sha256(path))}]
            if data:
                write_json(tmp_path / name / "report.json", {"files": listed, "data": data})
        cell = {"name": "digits", "artifact": "new/onnx/new.onnx", "budget": {"accuracy": 0.5}}
        raw = {"data": {"source": "digits"}, "cell": [cell]}
        if relation:
            cell |= {"baseline": "old", "relation": {"accuracy": 0.0, "size": 0.0}}
            path = "old/onnx/old.onnx"
            raw["baseline"] = {"old": {"path": path, "sha256": open_artifact(tmp_path / path).sha256}}
        return run_gate(GateConfig.from_dict(raw, tmp_path), tool="test", day=TODAY)

    return call


def said(test, content=DIGITS.content, **more):
    return {"content": content, "pictures": {"test": test, "train": "1"}, **more}


SAME, OTHER = DIGITS.pictures("test"), "0" * 64


@pytest.mark.parametrize(
    ("artifact", "baseline", "who"),
    [
        (said(OTHER), said(SAME), "the artifact"),
        (said(SAME), said(OTHER), "its baseline"),
        (said(OTHER), said("1" * 64), "the artifact and that which made its baseline"),
        (said(OTHER), {}, "the artifact"),
    ],
)
def test_accuracy_on_pictures_that_a_run_may_have_learned_from_is_undecided(judge_runs, artifact, baseline, who):
    result = judge_runs(dict(artifact), dict(baseline))
    checks = {check.name: check for check in result.cells[0].checks}
    assert {name: check.status for name, check in checks.items()} == {
        "budget.accuracy": "pass",
        "relation.size": "pass",
        "relation.accuracy": "inconclusive",
    }
    assert f"The run that made {who} split these pictures otherwise" in checks["relation.accuracy"].reason
    assert ("split these pictures otherwise" in checks["budget.accuracy"].reason) == (artifact != said(SAME))
    assert (result.verdict, result.exit_code) == ("inconclusive", 4)


@pytest.mark.parametrize(
    ("artifact", "baseline"),
    [
        (said(SAME), said(SAME)),
        ({}, {}),
        (said(OTHER, content="2" * 64), said(SAME)),
        (said(OTHER, sha256="0" * 64), said(SAME)),
        ({"source": "digits", "digest": "1"}, {"content": 3, "pictures": []}),
    ],
    ids=["the same", "no report", "another source", "another file", "an older report"],
)
def test_what_is_not_known_of_a_runs_pictures_changes_nothing(judge_runs, artifact, baseline):
    result = judge_runs(dict(artifact), dict(baseline))
    assert set(statuses(result).values()) == {"pass"}
    assert not any("pictures" in check.reason for check in result.cells[0].checks)


def test_pictures_that_change_while_the_gate_runs_leave_it_undecided(judge, monkeypatch):
    real, marks = facts.accuracy_of, iter("ab")
    monkeypatch.setattr(facts, "accuracy_of", lambda *a, **b: replace(real(*a, **b), pictures=next(marks)))
    result = judge({"accuracy": 0.5}, {"accuracy": 0.9})
    assert statuses(result) == {"budget.accuracy": "pass", "relation.accuracy": "inconclusive"}
    assert "were judged on different pictures" in result.cells[0].checks[-1].reason


@pytest.mark.parametrize("empty", ["file.bin", "folder"])
def test_what_holds_not_one_byte_is_within_no_budget(tmp_path, empty):
    (tmp_path / "file.bin").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match="not one byte"):
        sized(tmp_path / empty)


def sized(path):
    """The result of a gate that has nothing but a budget of 8 MB for a file or folder."""
    raw = {"cell": [{"name": "a", "artifact": str(path), "budget": {"size": "8 MB"}}]}
    return run_gate(GateConfig.from_dict(raw, path.parent), tool="test", day=TODAY)


def test_a_file_that_was_cut_off_is_within_no_budget(tmp_path):
    safetensors.numpy.save_file({"weight": np.zeros(1000, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "model.xml").write_text(
        '<net><layers><layer name="w" type="Const"><data element_type="f32" shape="1000" offset="0" size="4000"/></layer></layers></net>'
    )
    (tmp_path / "model.bin").write_bytes(bytes(4000))
    for name, cut in (("model.safetensors", "model.safetensors"), ("model.xml", "model.bin")):
        assert sized(tmp_path / name).verdict == "pass"
        (tmp_path / cut).write_bytes((tmp_path / cut).read_bytes()[:-100])
        with pytest.raises(ArtifactError, match="it is truncated"):
            sized(tmp_path / name)


def test_an_engine_of_another_size_than_its_record_tells_is_within_no_budget(tmp_path):
    for name in ("x.engine", "x.tflite", "x.pte"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(bytes(1000))
        (folder / "engine.json").write_text(json.dumps({"engine": name, "size_bytes": 5000}))
        with pytest.raises(ArtifactError, match=r"1,000 bytes, and the engine\.json beside it tells of 5,000"):
            sized(folder / name)
    (tmp_path / "x.engine/engine.json").write_text(json.dumps({"engine": "x.engine", "size_bytes": 1000}))
    assert sized(tmp_path / "x.engine").verdict == "pass"


@pytest.mark.parametrize(("length", "end"), [(24, 900), (32, 1300)])
def test_a_pte_file_that_ends_before_what_its_header_tells_of_is_within_no_budget(tmp_path, length, end):
    """An old header has no length of its segments, so that only a cut in the program is seen."""
    path, header = tmp_path / "x.pte", struct.pack("<4s4s4sIQQQ", bytes(4), b"ET12", b"eh00", length, 900, 1000, 300)
    path.write_bytes(header + bytes(end - len(header)))
    assert sized(path).verdict == "pass"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=f"{end - 1:,} bytes, and its header tells of {end:,}: it is truncated"):
        sized(path)


@pytest.mark.parametrize("name", ["model.bin", "folder/model.safetensors"])
def test_a_pointer_of_git_lfs_is_within_no_budget(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5000000000\n")
    with pytest.raises(ArtifactError, match="pointer of Git LFS"):
        sized(tmp_path / name.partition("/")[0])


def test_an_artifact_of_links_into_a_store_is_what_they_lead_to(tmp_path):
    """Kind: a path whose name, or whose neighbours, are lost when its links are followed."""
    whole = write_classifier(tmp_path / "whole" / "model.onnx", external=True, padding=100)
    linked = tmp_path / "linked" / "model.onnx"
    linked.parent.mkdir()
    for number, name in enumerate(("model.onnx", "model.onnx.data")):
        (tmp_path / str(number)).write_bytes(whole.with_name(name).read_bytes())
        linked.with_name(name).symlink_to(tmp_path / str(number))
    cell = {"name": "linked", "artifact": "linked/model.onnx", "budget": {"size": 1000, "params": 1000}}
    config = GateConfig.from_dict({"cell": [cell]}, tmp_path)
    (evidence,) = run_gate(config, tool="test", day=TODAY).evidence
    assert evidence.artifact.file.sha256 == open_artifact(whole).sha256
    assert evidence.artifact.counts == {"size": open_artifact(whole).size_bytes, "params": 750}


def test_a_better_artifact_passes(judge):
    relation = {"size": 0.0, "params": 0.0, "accuracy": 0.0}
    better = judge(relation=relation)
    assert set(statuses(better).values()) == {"pass"}
    assert "equal to the baseline's" in better.cells[0].checks[0].reason


def test_parity_bounds_are_each_judged(judge):
    assert statuses(judge(relation={"parity": {"cosine_min": 0.9}}, noise=1e-3)) == {"relation.parity": "pass"}
    for bounds in ({"max_abs": 1e-6}, {"cosine_min": 1.0}):
        assert statuses(judge(relation={"parity": bounds}, noise=1e-3)) == {"relation.parity": "fail"}
    result = judge(relation={"parity": {"cosine_min": -1.0, "top1_min": 1.0}}, swap=10)
    assert statuses(result) == {"relation.parity": "fail"}
    assert "top-1" in result.cells[0].checks[0].reason


def test_top1_is_judged_on_more_images_than_a_batch_of_three(judge):
    result = judge(relation={"parity": {"cosine_min": -1.0, "top1_min": 0.5}}, swap=2)
    assert statuses(result) == {"relation.parity": "pass"}
    agreeing = result.evidence[0].agreement.rung.top1_agreement
    assert 0.5 < agreeing < 1
    assert agreeing * 3 != pytest.approx(round(agreeing * 3)), "of three images it would be a third or two"


def test_a_replaced_baseline_stops_everything(judge, tmp_path):
    config = GateConfig.from_dict(
        {
            "baseline": {"old": {"path": "old.onnx", "sha256": "0" * 64}},
            "cell": [{"name": "a", "artifact": "none", "baseline": "old", "relation": {"size": 0.0}}],
        },
        tmp_path,
    )
    with pytest.raises(BaselineError):
        run_gate(config, tool="test", day=TODAY)


def test_an_artifact_of_another_origin_has_exact_checks_and_no_accuracy(stack, tmp_path):
    stack(tmp_path / "m.onnx", layers=3)
    raw = {"data": {"source": "digits"}, "cell": [{"name": "m", "artifact": "m.onnx", "budget": {"nodes": 3}}]}
    result = run_gate(GateConfig.from_dict(raw, tmp_path), tool="test", day=TODAY)
    assert statuses(result) == {"budget.nodes": "pass"}
    raw["cell"][0]["budget"] = {"accuracy": 0.5}
    with pytest.raises(RecipeError, match=r"takes \[96\] per sample, which is no image"):
        run_gate(GateConfig.from_dict(raw, tmp_path), tool="test", day=TODAY)


def test_a_file_of_another_origin_is_judged_where_data_says_how_images_are_prepared(tmp_path):
    """Kind: a gate on files that slimvit did not write. What was assumed of them is in the reason of the check."""
    for name in ("a", "b"):
        model = onnx.load(write_classifier(tmp_path / f"{name}.onnx"))
        del model.metadata_props[:]
        onnx.save(model, tmp_path / f"{name}.onnx")
    onnx.save(convert_float_to_float16(onnx.load(tmp_path / "b.onnx")), tmp_path / "b.onnx")
    data = {"source": "digits", "mean": [0.0], "std": [1.0]}
    raw = {
        "data": data,
        "baseline": {"a": {"path": "a.onnx", "sha256": open_artifact(tmp_path / "a.onnx").sha256}},
        "cell": [
            {
                "name": "b",
                "artifact": "b.onnx",
                "baseline": "a",
                "budget": {"accuracy": 0.7},
                "relation": {"accuracy": 0.01, "parity": {"cosine_min": 0.999}},
            }
        ],
    }
    result = run_gate(GateConfig.from_dict(raw, tmp_path), tool="test", day=TODAY)
    assert set(statuses(result).values()) == {"pass"}
    for check in result.cells[0].checks:
        assert "b.onnx is fp16 (1 of 1 linears and convolutions hold fp16 weights)" in check.reason
    assert "a.onnx does not say how images are prepared: nothing is cropped" in result.cells[0].checks[-1].reason
    del data["std"]
    with pytest.raises(ArtifactError, match=r"mean, std and crop_pct of \[data\]"):
        run_gate(GateConfig.from_dict(raw, tmp_path), tool="test", day=TODAY)


def test_a_cell_is_never_answered_with_what_another_cell_asked_for(tmp_path):
    """Kind: a kept answer whose key lacks a part of the question. Here a larger image has other answers."""
    write_classifier_by_height(tmp_path / "m.onnx")
    cells = [
        {"name": name, "artifact": "m.onnx", "budget": {"accuracy": 0.01}, "input_shape": [1, size, size]}
        for name, size in (("8", 8), ("16", 16), ("8 again", 8))
    ]
    raw = {"data": {"source": "digits", "mean": [0.0], "std": [1.0]}, "cell": cells}
    result = run_gate(GateConfig.from_dict(raw, tmp_path), tool="test", day=TODAY)
    small, large, again = [check.value for _, check in result.checks]
    assert small == again != large


def test_what_is_skipped_is_counted_and_only_skipping_fails(judge):
    def unavailable(*_):
        raise TargetUnavailable("ort-cpu", "there is no GPU", "buy one")

    result = judge({"size": "1 MB"}, {"latency": 0.05}, measure=unavailable)
    assert statuses(result) == {"budget.size": "pass", "relation.latency": "skipped"}
    assert (result.verdict, result.skipped_cells) == ("pass", 1)
    assert "1 of 1 cell skipped" in result.headline
    assert "there is no GPU" in result.cells[0].checks[1].reason
    nothing = judge(relation={"latency": 0.05}, measure=unavailable)
    assert (nothing.verdict, nothing.exit_code) == ("fail", 1)
    assert "nothing was evaluated" in nothing.headline


@pytest.mark.parametrize(("required", "status", "code"), [(False, "invalid", 4), (True, "fail", 1)])
def test_a_target_that_is_there_and_has_too_few_cores_is_not_skipped(judge, required, status, code):
    """A runner that lost half of its cores would never judge a latency again, and be green."""

    def refused(*_):
        raise WorkloadRefused("ort-cpu", "4 threads are more than the 2 core(s) that a measurement may use here")

    result = judge({"size": "1 MB"}, {"latency": 0.05}, measure=refused, cell={"required": required})
    assert statuses(result) == {"budget.size": "pass", "relation.latency": status}
    assert "Set threads and affinity of the cell" in result.cells[0].checks[1].reason
    assert result.exit_code == code


def accept(check, at_most, *, cell="digits", expires=TODAY, against=None):
    day = TODAY - dt.timedelta(30)
    return Accept(
        cell=cell, check=check, at_most=at_most, reason="known", accepted=day, expires=expires, against=against
    )


def states(result):
    return [use.state for use in result.accept_uses]


def test_an_accept_covers_one_check_up_to_one_value(judge, size):
    grown = judge({"size": size}, padding=10).cells[0].artifact.size_bytes
    result = judge({"size": size}, accepts=[accept("budget.size", grown)], padding=10)
    assert (statuses(result), states(result)) == ({"budget.size": "accepted"}, ["used"])
    assert result.exit_code == 0
    result = judge({"size": size}, accepts=[accept("budget.size", grown)], padding=11)
    assert (statuses(result), states(result)) == ({"budget.size": "fail"}, ["exceeded"])
    result = judge({"size": size, "params": 650}, accepts=[accept("budget.size", grown)], padding=10)
    assert statuses(result) == {"budget.size": "accepted", "budget.params": "fail"}


def test_an_accept_ends_and_is_reported_when_it_is_of_no_use(judge, size):
    day = dt.timedelta(1)
    result = judge({"size": size}, accepts=[accept("budget.size", 10**6, expires=TODAY - day)], padding=10)
    assert (statuses(result), states(result)) == ({"budget.size": "fail"}, ["expired"])
    others = [
        accept("budget.size", 10**6),
        accept("budget.size", 10**6, cell="gone"),
        accept("relation.size", 10**6),
    ]
    assert states(judge({"size": size}, accepts=others)) == ["unused", "unknown", "unknown"]


def test_an_accept_of_other_pictures_covers_nothing(judge):
    """Kind: what was accepted of one thing, taken for another that is called alike."""
    failed = judge(relation={"accuracy": 0.0}, swap=3)
    wrong, pictures = failed.cells[0].checks[0].value, failed.meaning("digits", "relation.accuracy")["against"]
    for against, state in ((pictures, "used"), (None, "used"), ("0" * 64, "moved")):
        result = judge(
            relation={"accuracy": 0.0}, accepts=[accept("relation.accuracy", wrong, against=against)], swap=3
        )
        assert (result.verdict == "pass", states(result)) == (state == "used", [state])


def test_of_several_accepts_the_last_one_counts(judge, size):
    result = judge({"size": size}, accepts=[accept("budget.size", 10**6), accept("budget.size", 1)], padding=10)
    assert (statuses(result), states(result)) == ({"budget.size": "fail"}, ["exceeded"])


def test_the_file_of_accepts_is_a_log_for_people(tmp_path):
    gate = tmp_path / "gate.toml"
    assert load_accepts(gate) == ()
    first = accept("budget.size", 12)
    tricky = first.model_copy(
        update={"reason": 'a "quote"\\ \x7f\n🙂 [[accept]]', "at_most": 1.25, "against": "0" * 64}
    )
    assert add_accepts(gate, [first]) == accepts_path(gate)
    written = accepts_path(gate).read_text().replace("# An entry", "# a note of mine\n# An entry")
    accepts_path(gate).write_text(written)
    add_accepts(gate, [tricky])
    assert load_accepts(gate) == (first, tricky)
    assert accepts_path(gate).read_text().startswith(written), "what stood there stays"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('reason = " "', "gives no reason"),
        ('check = "relation.parity"', "cannot be accepted"),
        ('check = "size"', "pattern"),
        ("expires = 2020-01-01", "expires before"),
        ("until = 2040-01-01", "unknown accepts key"),
    ],
)
def test_accepts_that_mean_nothing_are_refused(tmp_path, line, words):
    gate = tmp_path / "gate.toml"
    key = line.partition(" ")[0]
    lines = [row for row in accept("budget.size", 1).to_toml().splitlines() if not row.startswith(f"{key} ")]
    accepts_path(gate).write_text("\n".join([*lines, line]))
    with pytest.raises(RecipeError) as refused:
        load_accepts(gate)
    assert words in str(refused.value)
