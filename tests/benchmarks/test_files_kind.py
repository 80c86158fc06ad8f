"""A model as every file that ships: what is recorded of a real run of a small recipe, and the page that follows from it."""

from __future__ import annotations

import pytest
from benching import carry_out
from pages import formats
from pages.files import after_compression, int8_line, page, timed
from pages.text import speedup
from recipes import tiny_recipe
from records import Results
from suite import HERE, Suite

pytestmark = pytest.mark.slow
RECIPE = tiny_recipe(
    """[compress]
method = "joint"
[budget]
params = 0.6
[export]
precisions = ["fp32", "int8"]
[bench]
""",
    source="none",
)
RESULTS = Results(HERE / "results")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(the suite, its results, the run's record), after a recipe was carried out."""
    tmp_path = tmp_path_factory.mktemp("files")
    (tmp_path / "small.toml").write_text(RECIPE)
    (tmp_path / "files.toml").write_text(
        'title = "Files"\npage = "files"\n[[cells]]\nkind = "files"\nrecipes = ["small.toml"]\n'
    )
    assert carry_out(tmp_path / "files.toml") == 0
    suite, results = Suite.load(tmp_path / "files.toml"), Results(tmp_path / "results")
    record = results.read("files", "small")
    assert record is not None
    assert carry_out(tmp_path / "files.toml") == 0
    assert results.read("files", "small") == record, "a run that is recorded is not carried out again"
    return suite, results, record


def test_a_run_is_recorded_whole_and_its_page_follows(recorded):
    suite, results, record = recorded
    text = page(suite, results)["README.md"]
    dense, *files = record.result["artifacts"]
    for row in files:
        assert f"| `{row['path']}` | {row['bytes']:,} | {100 * row['bytes'] / dense['bytes']:.1f} %" in text
    assert text.count(" [") >= 3, "each file's speedup has its interval"
    later = ("onnx-dense", "onnx-compressed", "onnx-int8-dynamic", "onnx-int8-qdq")
    assert after_compression(record.seconds) == pytest.approx(sum(record.seconds[name] for name in later))
    assert "0 fail" in text
    assert "int8 on ort-cpu" in text
    pairs, duel = timed(record, results)
    assert set(pairs) == {"fp32", "int8-dynamic", "int8-qdq"}
    assert duel is not None
    beside = results.below("files", "small")
    assert {each.kind for each in beside} == {"pair"}
    assert {each.definition["a"] for each in beside} == {"dense fp32", "compressed int8-dynamic"}


def test_the_slower_kind_of_int8_is_named_and_neither_where_fp32_is_faster(made_up):
    faster, slower = made_up(b=-0.5), made_up(b=0.5)
    even = made_up()
    assert "int8 on ort-cpu, batch 1, 1 thread: int8-qdq (int8-qdq took 0.6" in int8_line(faster, {})
    assert "int8-dynamic (int8-qdq took 1.6" in int8_line(slower, {})
    assert "a difference is not verified" in int8_line(even, {})
    assert "not verified" not in int8_line(faster, {})
    assert "neither; the faster one is slower than fp32" in int8_line(faster, {"int8-qdq": even, "fp32": faster})


@pytest.mark.parametrize("name", ["deit_small", "fashion_mnist_vit"])
def test_what_is_claimed_of_every_file_is_what_was_recorded(name):
    """The figures that README names as limits: rungs, bytes, time, and what int8 costs and gains."""
    record = RESULTS.read("targets", name)
    assert record is not None
    found, rows = record.result, {}
    for row in found["artifacts"]:
        rows.setdefault(row["precision"] if row["model"] == "compressed" else "dense", row)
    assert {rung["verdict"] for rung in found["parity"]} <= {"pass", "not_run"}
    assert all(rung["reason"] for rung in found["parity"] if rung["verdict"] == "not_run")
    assert after_compression(record.seconds) <= 600
    engines = [each["path"] for each in found["files"] if each["path"].endswith((".engine", ".xml"))]
    assert len(engines) >= 3
    for kind in ("int8-dynamic", "int8-qdq"):
        assert rows[kind]["bytes"] <= 0.16 * rows["dense"]["bytes"]
        if rows[kind]["total"]:
            assert rows[kind]["wrong"] - rows["fp32"]["wrong"] <= 0.003 * rows[kind]["total"]
    assert rows["int4"]["bytes"] <= 0.09 * rows["dense"]["bytes"]
    if rows["int4"]["total"]:
        assert rows["int4"]["wrong"] - rows["fp32"]["wrong"] <= 0.003 * rows["int4"]["total"]
    if name == "deit_small":
        pairs, _ = timed(record, RESULTS)
        verified = {name: pair.verified_speedup_at_least or 0 for name, pair in pairs.items()}
        assert max(verified["int8-dynamic"], verified["int8-qdq"]) >= 3.8
        assert verified["fp32"] >= 1.75


def test_the_page_of_every_runtime_has_a_row_for_each_file(recorded):
    suite, results, record = recorded
    text = formats.page(suite, results)["README.md"]
    dense, *files = record.result["artifacts"]
    pairs = formats.timed(record, results)
    assert set(pairs) == {("ort-cpu", precision) for precision in ("fp32", "int8-dynamic", "int8-qdq")}
    assert f"| `{dense['path']}` | {dense['bytes']:,} | 100.0 % | pass | – | ort-cpu |" in text
    for row in files:
        pair = pairs["ort-cpu", row["precision"]]
        assert f"| `{row['path']}` | {row['bytes']:,} | " in text
        assert f"| ort-cpu | {pair.latency_ms('B'):.3f} | {speedup(pair)} |" in text


@pytest.mark.parametrize("name", ["deit_small_everywhere", "fashion_mnist_everywhere"])
def test_what_is_claimed_of_every_runtime_is_what_was_recorded(name):
    """Every format is built and held against its file; half of the parameters is faster on each runtime than the dense file there."""
    record = RESULTS.read("formats", name)
    assert record is not None
    run, pairs = record.result, formats.timed(record, RESULTS)
    built = {row["target"]: row["verdict"] for row in run["engines"]}
    runs = ("openvino-cpu", "litert-cpu", "executorch-xnnpack", "ncnn", "coreml")
    assert built == {**dict.fromkeys(runs, "pass"), "trt-rtx": "not_run"}
    assert {rung["verdict"] for rung in run["parity"]} == {"pass", "not_run"}
    assert after_compression(record.seconds) <= 720
    if name == "deit_small_everywhere":
        for target in ("litert-cpu", "executorch-xnnpack", "ncnn"):
            assert (pairs[target, "fp32"].verified_speedup_at_least or 0) >= 1.6
        assert (pairs["litert-cpu", "int8-dynamic"].verified_speedup_at_least or 0) >= 3
    else:
        wrong = {row["path"]: row["wrong"] for row in (*run["artifacts"], *run["engines"]) if row["wrong"] is not None}
        assert len(wrong) >= 10
        best = wrong["onnx/compressed.fp32.onnx"]
        assert all(abs(each - best) <= 0.005 * 10_000 for path, each in wrong.items() if "dense" not in path)
