"""Which file to take: the tables and the suggestion, from invented facts."""

from __future__ import annotations

import pytest
from made_up_reports import a_report, timed

from toolchain.export.precisions import MADE_FOR_NOISE
from toolchain.report.choice import int8_choices, suggestion
from toolchain.report.record import EngineRow, FileRow, Interval, LayerRow
from toolchain.report.sections import SECTIONS
from toolchain.report.sections.suggestion import int8_line
from toolchain.training.outcome import Features, Neighbours


def file(precision, size, wrong, model="compressed", total=1000, **more):
    counts = {"accuracy": None if total is None else 1 - wrong / total, "wrong": wrong, "total": total}
    sizes = {"bytes": size, "download_bytes": size - 5, "judged_on": "ort-cpu"}
    return FileRow(
        path=f"onnx/{model}.{precision}.onnx", model=model, precision=precision, **{**sizes, **counts, **more}
    )


FILES = (
    file("fp32", 4000, 100, "dense"),
    file("fp32", 2000, 110),
    file("fp16", 1000, 110),
    file("int8-dynamic", 520, 116),
    file("int8-qdq", 500, 113),
)
BENCH = [timed("fp32", 0.5), timed("fp16", 1.4, "regressed"), timed("int8-dynamic", 0.2), timed("int8-qdq", 0.25)]


def drawn(name, **changes):
    return SECTIONS[name].draw(a_report().model_copy(update=changes))


def test_a_file_that_loses_too_much_is_not_suggested():
    found = suggestion(FILES, BENCH, 0.005)
    assert found.left_out == ("onnx/compressed.int8-dynamic.onnx",), "6 of 1000 more errors, 5 are allowed"
    assert found.smallest == "onnx/compressed.int8-qdq.onnx"
    (fastest,) = found.fastest
    assert (fastest.path, fastest.ratio.point) == ("onnx/compressed.int8-qdq.onnx", 0.25)
    (fastest,) = suggestion(FILES, BENCH, 0.01).fastest
    assert fastest.path == "onnx/compressed.int8-dynamic.onnx"
    assert suggestion(FILES, BENCH, 0.0).smallest == "onnx/compressed.fp16.onnx"


def test_each_target_has_its_own_fastest_and_doubt_is_none():
    bench = [
        *BENCH[:2],
        timed("int8-qdq", 0.1, "invalid"),
        timed("fp32", 0.6, target="pi"),
        timed("int8-qdq", 0.9, target="pi"),
    ]
    found = suggestion(FILES, bench, 0.005).fastest
    assert [(row.target, row.path) for row in found] == [
        ("ort-cpu", "onnx/compressed.fp32.onnx"),
        ("pi", "onnx/compressed.fp32.onnx"),
    ]


def test_without_labels_parity_decides():
    files = [row.model_copy(update={"wrong": None, "total": None, "accuracy": None}) for row in FILES]
    found = suggestion(files, [], 0.0)
    assert (found.smallest, found.fastest, found.left_out) == ("onnx/compressed.int8-qdq.onnx", (), ())


@pytest.mark.parametrize(("knn", "left"), [(None, True), (100, False), (94, True)])
def test_features_are_chosen_by_their_neighbours_or_without_labels_by_their_error(knn, left):
    def of(right, error):
        votes = None if right is None else Neighbours(k=5, bank=9, right=right, dense_right=100, total=100)
        return Features(error=error, cosine=0.9, knn=votes)

    files = [
        file("fp32", 400, None, total=None, features=of(knn and 100, 0.1)),
        file("int8-qdq", 100, None, total=None, features=of(knn, 0.2)),
    ]
    assert bool(suggestion(files, [], 0.05).left_out) == left
    assert not suggestion(files, [], 0.11).left_out


def test_a_refused_file_is_shown_and_never_suggested():
    path = "onnx/compressed.int8-qdq.onnx"
    refused = FileRow(path=path, model="compressed", precision="int8-qdq", refused="it is another model")
    rows = (*FILES[:-1], refused)
    assert suggestion(rows, BENCH, 0.01).smallest == "onnx/compressed.int8-dynamic.onnx"
    assert drawn("files", artifacts=rows, engines=()).table.rows[-1] == (
        path,
        "–",
        "–",
        "–",
        "fail",
        "–",
        "–",
        "–",
        "it is another model",
    )


def test_the_tables_add_up():
    layers = tuple(
        LayerRow(layer=layer, bytes={row.path: size(row) for row in FILES})
        for layer, size in (
            ("blocks.0.mlp.fc1", lambda row: row.bytes - 30),
            ("blocks.1.mlp.fc1", lambda _: 20),
            ("head", lambda _: 10),
        )
    )
    table = drawn("layers", layers=layers).table
    assert table.header[:3] == ("layers", "dense.fp32", "compressed.fp32")
    assert [row[0] for row in table.rows] == ["blocks.*.mlp.fc1", "head"], "the same layer of all blocks is one kind"
    assert table.rows[0][1] == "4.0 kB"
    assert drawn("files", artifacts=FILES[:2], engines=()).table.rows == (), "the headline says it all"
    lines = drawn("suggestion", artifacts=FILES, suggestion=suggestion(FILES, BENCH, 0.005)).lines
    assert lines == (
        "Of the files that get at most 0.50 % more of the images wrong than the compressed fp32 file:",
        "Smallest: onnx/compressed.int8-qdq.onnx.",
        "Fastest on ort-cpu, batch 1, 1 thread: onnx/compressed.int8-qdq.onnx, 0.250 of the dense time.",
        "Left out, as less accurate: onnx/compressed.int8-dynamic.onnx.",
    )
    assert drawn("suggestion", artifacts=FILES[:2], engines=()).lines == ()


def test_a_file_that_was_made_for_noise_is_not_suggested_without_a_word():
    files = (*FILES, file("int4", 300, None, total=None))
    unjudged = tuple(row.model_copy(update={"accuracy": None, "wrong": None, "total": None}) for row in files)
    given = suggestion(unjudged, BENCH, 0.005)
    assert given.smallest == "onnx/compressed.int4.onnx"
    noise = [
        drawn("suggestion", artifacts=unjudged, suggestion=given, synthetic=synthetic).lines
        for synthetic in (True, False)
    ]
    assert [line for line in noise[0] if "seeded noise" in line] == [f"int4: {MADE_FOR_NOISE}"]
    assert noise[1] == tuple(line for line in noise[0] if "seeded noise" not in line)
    fastest = suggestion(unjudged, [timed("int8-qdq", 0.2), timed("fp32", 0.4)], 0.005)
    lines = drawn("suggestion", artifacts=unjudged, suggestion=fastest, synthetic=True).lines
    assert {f"{name}: {MADE_FOR_NOISE}" for name in ("int4", "int8-qdq")} <= set(lines)


def duel(point, lo, hi, verdict="pass"):
    rivals = ("int8-dynamic", "int8-qdq")
    return timed("int8", point, verdict, ratio=Interval(point=point, lo=lo, hi=hi), rivals=rivals)


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
    assert (row.chosen, row.verified, row.slower_than_fp32) == (chosen, verified, False)
    assert chosen in int8_line(row)
    assert ("not verified" in int8_line(row)) is not verified


def test_int8_that_is_slower_than_fp32_is_not_chosen():
    bench = [timed("fp32", 0.5), timed("int8-qdq", 0.6), timed("int8-dynamic", 0.7)]
    (row,) = int8_choices([duel(0.9, 0.85, 0.95, "improved")], bench)
    assert (row.chosen, row.slower_than_fp32) == (None, True)
    assert "neither; the faster one is slower than fp32" in int8_line(row)
    elsewhere = [each.model_copy(update={"target": "pi"}) for each in bench]
    assert int8_choices([], []) == ()
    (row,) = int8_choices([duel(0.9, 0.85, 0.95)], [])
    assert (row.chosen, row.slower_than_fp32) == (None, None), "what was not timed is not known"
    assert "fp32 has no valid time" in int8_line(row)
    assert len(int8_choices([duel(0.9, 0.85, 0.95)], elsewhere)) == 1


def test_one_kind_of_int8_alone_is_held_against_fp32_too():
    (row,) = int8_choices([], [timed("fp32", 0.5), timed("int8-qdq", 0.6)])
    assert (row.chosen, row.ratio, row.slower_than_fp32) == (None, None, True)
    assert int8_line(row) == "int8 on ort-cpu, batch 1, 1 thread: slower than fp32."
    (row,) = int8_choices([], [timed("fp32", 0.5), timed("int8-qdq", 0.4)])
    assert (row.chosen, int8_line(row)) == ("int8-qdq", "int8 on ort-cpu, batch 1, 1 thread: int8-qdq.")
    assert int8_choices([], [timed("fp32", 0.5, "invalid"), timed("int8-qdq", 0.6)]) == ()


def test_the_kind_of_int8_that_lost_the_comparison_is_not_suggested():
    """Against the dense file it may have taken less, in another run."""
    rows, bench = FILES, [timed("int8-qdq", 0.25), timed("int8-dynamic", 0.24)]
    for point, path in ((0.9, "onnx/compressed.int8-qdq.onnx"), (1.1, "onnx/compressed.int8-dynamic.onnx")):
        int8 = int8_choices([duel(point, point, point)], [*bench, timed("fp32", 0.5)])
        (fastest,) = suggestion(rows, bench, 0.01, int8).fastest
        assert fastest.path == path


def test_what_was_timed_is_suggested():
    """A device says by its name neither its runtime nor what that runs."""
    bench = [timed("fp32", 0.5, target="workstation", path="deploy"), timed("fp32", 0.5, target="ort-cpu")]
    assert [row.path for row in suggestion(FILES, bench, 0.0).fastest] == ["deploy", "onnx/compressed.fp32.onnx"]


def engine(target, precision, size, wrong, verdict="pass", **more):
    counts = {"accuracy": 1 - wrong / 1000, "wrong": wrong, "total": 1000} if wrong is not None else {}
    name = f"a.{precision}"
    return EngineRow(
        **{
            "target": target,
            "model": "compressed",
            "precision": precision,
            "path": f"engines/{target}.{precision}/{name}",
            "file": name,
            "bytes": size,
            "download_bytes": size,
            "verdict": verdict,
            **counts,
            **more,
        }
    )


ENGINES = (
    engine("litert-cpu", "fp32", 2100, 110, model="dense", path="engines/litert-cpu.dense/a"),
    engine("litert-cpu", "fp32", 2000, 110),
    engine("litert-cpu", "int8-dynamic", 450, 112),
    engine("ncnn", "fp16", 400, 130),
    engine("trt-rtx", "int8-qdq", 300, None, "not_run"),
)


def test_engines_stand_beside_the_files_and_are_suggested_where_they_were_held_against_them():
    tflite, lossy = ENGINES[2].path, ENGINES[3].path
    bench = [
        *BENCH,
        timed("int8-dynamic", 0.4, target="litert-cpu", path=tflite, baseline=ENGINES[0].path, compressed_ms=0.1),
        timed("fp16", 0.1, target="ncnn", path=lossy, baseline="b", compressed_ms=0.01),
    ]
    given = suggestion(FILES, bench, 0.005, engines=ENGINES)
    assert given.smallest == tflite, "the engine of 300 bytes was not run, that of 400 loses too much"
    assert lossy in given.left_out
    (quickest,) = given.quickest
    assert (quickest.target, quickest.path, quickest.ms) == ("litert-cpu", tflite, 0.1)
    table = drawn("files", artifacts=FILES, engines=ENGINES, bench=tuple(bench)).table
    rows = {row[0]: row for row in table.rows}
    assert len(rows) == len(FILES) + len(ENGINES)
    assert table.header[-1] == "ms, batch 1, 1 thread", "nothing was refused"
    assert rows[tflite][4:] == ("pass", "88.80 %", "112", "litert-cpu 0.100")
    assert rows[ENGINES[0].path][-1] == "litert-cpu 0.610", "the baseline of what was timed"
    assert rows[ENGINES[-1].path][4:7] == ("not run", "–", "–")
    assert rows["onnx/dense.fp32.onnx"][-1] == "ort-cpu 0.610"
    (line,) = [
        each for each in drawn("suggestion", artifacts=FILES, suggestion=given).lines if each.startswith("Least time")
    ]
    assert f"{tflite} on litert-cpu, 0.100 ms" in line


def test_one_runtime_alone_is_not_the_fastest_of_all():
    elsewhere = timed("fp32", 0.1, target="pi")  # a device of targets.toml: another machine, or other cores of this one
    assert suggestion(FILES, [*BENCH, elsewhere], 0.005).quickest == ()


def test_a_package_that_was_interpreted_alone_is_shown_and_not_suggested():
    package = engine("coreml", "int8-dynamic", 10, None, interpreted=True)
    assert suggestion(FILES, BENCH, 0.005, engines=[package]).smallest == "onnx/compressed.int8-qdq.onnx"
    assert drawn("files", artifacts=FILES, engines=(package,)).table.rows[-1][4] == "pass, interpreted"


def test_the_kind_of_int8_that_won_the_duel_removes_no_other_where_its_file_is_left_out():
    """Another runtime's file of that kind may be accurate enough."""
    bench = [*BENCH, timed("int8-dynamic", 0.1, target="litert-cpu", path=ENGINES[2].path)]
    int8 = int8_choices([duel(1.1, 1.1, 1.1)], bench)
    assert int8[-1].chosen == "int8-dynamic"
    (fastest, _) = suggestion(FILES, bench, 0.005, int8, ENGINES).fastest
    assert fastest.path == "onnx/compressed.int8-qdq.onnx"


def test_an_engine_says_what_it_computes_in():
    given = (
        engine(
            "trt-rtx", "fp16", 3, None, compute_capabilities=("8.9",), matmul_dtypes={"HALF": 13}, attention_layers=2
        ),
        engine("openvino-cpu", "fp32", 3, 1),
        engine("trt", "fp16", 3, None, matmul_dtypes={"HALF": 13}, attention_layers=2, fused_attention=1),
    )
    rows = drawn("engines", engines=given).table.rows
    assert [row[1:] for row in rows] == [
        ("13 HALF", "? of 2 fused", "8.9"),
        ("", "–", "–"),
        ("13 HALF", "1 of 2 fused", "–"),
    ]
    assert drawn("engines", engines=()).table.rows == ()
