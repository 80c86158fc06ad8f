"""Which file to take: the rows, the tables and the suggestion, from invented facts."""

from __future__ import annotations

import pytest

from toolchain.report.artifacts import artifact_rows, engine_rows, int8_choices, layer_rows, suggestion
from toolchain.report.tables import artifact_table, engine_table, int8_line, size_table, suggestion_lines


def stage(precision, size, wrong, total=1000, **more):
    accuracy = None if total is None else 1 - wrong / total
    counts = {"accuracy": accuracy, "wrong": wrong, "total": total}
    layers = {"blocks.0.mlp.fc1": size - 30, "blocks.1.mlp.fc1": 20, "head": 10}
    facts = {
        "precision": precision,
        "bytes": size,
        "download_bytes": size - 5,
        "layers": layers,
        "judged_on": "ort-cpu",
    }
    return {**facts, **counts, "refused": None, **more}


@pytest.fixture
def facts():
    return {
        "dense": {"bytes": 1},
        "onnx-dense": stage("fp32", 4000, 100),
        "onnx-compressed": stage("fp32", 2000, 110),
        "onnx-fp16": stage("fp16", 1000, 110),
        "onnx-int8-dynamic": stage("int8-dynamic", 520, 116),
        "onnx-int8-qdq": stage("int8-qdq", 500, 113),
        "bench-ort-cpu.b1.t1": {},
    }


def timed(precision, point, verdict="improved", target="ort-cpu"):
    where = {"target": target, "batch": 1, "threads": 1}
    return {**where, "precision": precision, "ratio": {"point": point}, "verdict": verdict}


BENCH = [timed("fp32", 0.5), timed("fp16", 1.4, "regressed"), timed("int8-dynamic", 0.2), timed("int8-qdq", 0.25)]


def test_every_file_has_a_row(facts):
    rows = artifact_rows(facts)
    assert [(row["path"], row["bytes"], row["wrong"]) for row in rows] == [
        ("onnx/dense.fp32.onnx", 4000, 100),
        ("onnx/compressed.fp32.onnx", 2000, 110),
        ("onnx/compressed.fp16.onnx", 1000, 110),
        ("onnx/compressed.int8-dynamic.onnx", 520, 116),
        ("onnx/compressed.int8-qdq.onnx", 500, 113),
    ]


def test_a_file_that_loses_too_much_is_not_suggested(facts):
    found = suggestion(artifact_rows(facts), BENCH, 0.005)
    assert found["left_out"] == ["onnx/compressed.int8-dynamic.onnx"], "6 of 1000 more errors, 5 are allowed"
    assert found["smallest"] == "onnx/compressed.int8-qdq.onnx"
    (fastest,) = found["fastest"]
    assert (fastest["path"], fastest["ratio"]["point"]) == ("onnx/compressed.int8-qdq.onnx", 0.25)
    (fastest,) = suggestion(artifact_rows(facts), BENCH, 0.01)["fastest"]
    assert fastest["path"] == "onnx/compressed.int8-dynamic.onnx"
    assert suggestion(artifact_rows(facts), BENCH, 0.0)["smallest"] == "onnx/compressed.fp16.onnx"


def test_each_target_has_its_own_fastest_and_doubt_is_none(facts):
    bench = [
        *BENCH[:2],
        timed("int8-qdq", 0.1, "invalid"),
        timed("fp32", 0.6, target="pi"),
        timed("int8-qdq", 0.9, target="pi"),
    ]
    found = suggestion(artifact_rows(facts), bench, 0.005)["fastest"]
    assert [(row["target"], row["path"]) for row in found] == [
        ("ort-cpu", "onnx/compressed.fp32.onnx"),
        ("pi", "onnx/compressed.fp32.onnx"),
    ]


def test_without_labels_parity_decides(facts):
    unlabelled = {
        name: {**found, "wrong": None, "total": None, "accuracy": None} if name.startswith("onnx-") else found
        for name, found in facts.items()
    }
    found = suggestion(artifact_rows(unlabelled), [], 0.0)
    assert (found["smallest"], found["fastest"], found["left_out"]) == ("onnx/compressed.int8-qdq.onnx", [], [])


def test_a_refused_file_is_shown_and_never_suggested(facts):
    facts["onnx-int8-qdq"] = {"precision": "int8-qdq", "refused": "it is another model"}
    rows = artifact_rows(facts)
    assert rows[-1]["bytes"] is None
    assert suggestion(rows, BENCH, 0.01)["smallest"] == "onnx/compressed.int8-dynamic.onnx"
    assert set(layer_rows(facts)[0]["bytes"]) == {row["path"] for row in rows[:-1]}
    assert artifact_table({"artifacts": rows}).rows[-1] == (
        "onnx/compressed.int8-qdq.onnx",
        "–",
        "–",
        "–",
        "–",
        "it is another model",
    )


def test_the_tables_add_up(facts):
    rows, layers = artifact_rows(facts), layer_rows(facts)
    assert {path: sum(row["bytes"][path] for row in layers) for path in layers[0]["bytes"]} == {
        row["path"]: row["bytes"] for row in rows
    }
    table = size_table({"layers": layers})
    assert table.header[:3] == ("layers", "dense.fp32", "compressed.fp32")
    assert [row[0] for row in table.rows] == ["blocks.*.mlp.fc1", "head"], "the same layer of all blocks is one kind"
    assert artifact_table({"artifacts": rows[:2]}).rows == (), "the headline says it all"
    report = {"artifacts": rows, "suggestion": suggestion(rows, BENCH, 0.005)}
    assert suggestion_lines(report)[1] == (
        "Fastest file on ort-cpu, batch 1, 1 thread (at most 0.50 % of the images lost): onnx/compressed.int8-qdq.onnx, "
        "0.250 of the dense time."
    )
    assert suggestion_lines({**report, "artifacts": rows[:2]}) == []


def duel(point, lo, hi, verdict="pass"):
    where = {"target": "ort-cpu", "batch": 1, "threads": 1}
    control = {"point": 1.0, "lo": 0.995, "hi": 1.005}
    ratio = {"point": point, "lo": lo, "hi": hi}
    return {**where, "precision": "int8", "ratio": ratio, "control": control, "verdict": verdict}


@pytest.mark.parametrize(
    ("found", "chosen", "verified"),
    [
        (duel(0.9, 0.85, 0.95, "improved"), "int8-qdq", True),
        (duel(1.02, 1.01, 1.03), "int8-dynamic", True),
        (duel(1.02, 1.004, 1.03), "int8-dynamic", False),  # the control strays as far
        (duel(0.99, 0.97, 1.01), "int8-qdq", False),
        (duel(0.9, 0.85, 0.95, "invalid"), "int8-qdq", False),
    ],
)
def test_the_faster_kind_of_int8_is_chosen_by_their_own_comparison(found, chosen, verified):
    """Against the dense file int8-dynamic took less, in another run: that decides nothing."""
    (row,) = int8_choices([found], BENCH)
    assert (row["chosen"], row["verified"], row["slower_than_fp32"]) == (chosen, verified, False)
    assert chosen in int8_line(row)
    assert ("not verified" in int8_line(row)) is not verified


def test_int8_that_is_slower_than_fp32_is_not_chosen():
    bench = [timed("fp32", 0.5), timed("int8-qdq", 0.6), timed("int8-dynamic", 0.7)]
    (row,) = int8_choices([duel(0.9, 0.85, 0.95, "improved")], bench)
    assert (row["chosen"], row["slower_than_fp32"]) == (None, True)
    assert "neither; the faster one is slower than fp32" in int8_line(row)
    elsewhere = [{**each, "target": "pi"} for each in bench]
    assert int8_choices([], []) == []
    (row,) = int8_choices([duel(0.9, 0.85, 0.95)], [])
    assert (row["chosen"], row["slower_than_fp32"]) == (None, None), "what was not timed is not known"
    assert "fp32 has no valid time" in int8_line(row)
    assert len(int8_choices([duel(0.9, 0.85, 0.95)], elsewhere)) == 1


def test_one_kind_of_int8_alone_is_held_against_fp32_too():
    (row,) = int8_choices([], [timed("fp32", 0.5), timed("int8-qdq", 0.6)])
    assert (row["chosen"], row["ratio"], row["slower_than_fp32"]) == (None, None, True)
    assert int8_line(row) == "int8 on ort-cpu, batch 1, 1 thread: slower than fp32."
    (row,) = int8_choices([], [timed("fp32", 0.5), timed("int8-qdq", 0.4)])
    assert (row["chosen"], int8_line(row)) == ("int8-qdq", "int8 on ort-cpu, batch 1, 1 thread: int8-qdq.")
    assert int8_choices([], [timed("fp32", 0.5, "invalid"), timed("int8-qdq", 0.6)]) == []


def test_the_kind_of_int8_that_lost_the_comparison_is_not_suggested(facts):
    """Against the dense file it may have taken less, in another run."""
    rows, bench = artifact_rows(facts), [timed("int8-qdq", 0.25), timed("int8-dynamic", 0.24)]
    for point, path in ((0.9, "onnx/compressed.int8-qdq.onnx"), (1.1, "onnx/compressed.int8-dynamic.onnx")):
        int8 = int8_choices([duel(point, point, point)], [*bench, timed("fp32", 0.5)])
        (fastest,) = suggestion(rows, bench, 0.01, int8)["fastest"]
        assert fastest["path"] == path


def test_what_eager_timed_is_the_model_folder(facts):
    bench = [timed("fp32", 0.5, target="eager")]
    assert suggestion(artifact_rows(facts), bench, 0.0)["fastest"][0]["path"] == "deploy"


def test_an_engine_stands_beside_the_dense_file_with_what_it_computes_in(facts):
    engine = {
        "target": "trt-rtx",
        "precision": "fp16",
        "path": "engines/trt-rtx.fp16/a.engine",
        "bytes": 3000,
        "download_bytes": 900,
        "compute_capabilities": ["8.9"],
        "matmul_dtypes": {"HALF": 13},
        "attention_layers": 2,
        "fused_attention": None,
        "parity": [{"verdict": "not_run"}],
    }
    facts["engine-trt-rtx.fp16"] = engine
    facts["engine-openvino-cpu"] = {**engine, "path": "m.xml", "attention_layers": None, "matmul_dtypes": None}
    facts["engine-trt"] = {**engine, "path": "b.engine", "fused_attention": 1, "parity": [{"verdict": "pass"}]}
    facts["engine-older"] = {"target": "trt", "file": "c.engine", "parity": []}  # of a run by an earlier version
    rows = engine_rows(facts)
    assert [row["of_dense"] for row in rows] == [0.75] * 3
    assert engine_table({"engines": rows}).rows == (
        ("engines/trt-rtx.fp16/a.engine", "3.0 kB", "0.9 kB", "75.0 %", "13 HALF", "? of 2 fused", "not_run"),
        ("m.xml", "3.0 kB", "0.9 kB", "75.0 %", "", "–", "not_run"),
        ("b.engine", "3.0 kB", "0.9 kB", "75.0 %", "13 HALF", "1 of 2 fused", "pass"),
    )
    assert engine_table({}).rows == ()
