"""The record of one model as every file: a real run of a small recipe, and the page that follows from it."""

import json
import shutil

import pytest
import targets

from toolchain.measure.compare import compare
from toolchain.pipeline import shipping

RECIPE = """
[model]
name = "vit_tiny_patch16_224"
kwargs = { img_size = 8, patch_size = 2, in_chans = 1, num_classes = 10, embed_dim = 32, depth = 2, num_heads = 2 }
pretrained = false
[data]
source = "none"
[compress]
method = "joint"
[budget]
params = 0.6
[export]
precisions = ["fp32", "int8"]
[bench]
"""


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """(the options of the command, after it carried out a recipe)."""
    short = {"sessions": 2, "blocks": 4, "looks": 1, "slot_ms": 2.0, "warmup_s": 0.01}
    monkeypatch.setattr(shipping, "bench_compare", lambda *pair, **given: compare(*pair, **{**given, **short}))
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "small.toml").write_text(RECIPE)
    options = [f"--{name}={tmp_path / name}" for name in ("recipes", "results", "work")]
    assert targets.main(options) == 0
    return options


def test_a_run_is_recorded_whole_and_its_page_follows(recorded, tmp_path):
    results = tmp_path / "results"
    page = (results / "README.md").read_text()
    record = json.loads((results / "small.json").read_text())
    dense, *files = record["report"]["artifacts"]
    for row in files:
        assert f"| `{row['path']}` | {row['bytes']:,} | {100 * row['bytes'] / dense['bytes']:.1f} %" in page
    assert page.count(" [") >= 3, "each file's speedup has its interval"
    seconds = record["seconds"]
    later = ("onnx-dense", "onnx-compressed", "onnx-int8-dynamic", "onnx-int8-qdq")
    assert targets.after_compression(seconds) == pytest.approx(sum(seconds[name] for name in later))
    assert "0 fail" in page
    assert "int8 on ort-cpu" in page
    (results / "README.md").unlink()
    shutil.rmtree(tmp_path / "work")
    assert targets.main([*recorded, "--report"]) == 0
    assert (results / "README.md").read_text() == page


def test_a_name_that_is_none_is_refused(tmp_path, capsys):
    assert targets.main([f"--recipes={tmp_path}", "--only=other"]) == 2
    assert "no recipe has 'other'" in capsys.readouterr().err


def test_the_committed_page_follows_from_its_records():
    results = targets.HERE / "results" / "targets"
    if not list(results.glob("*.json")):
        pytest.skip("no run as every file is recorded yet")
    assert (results / "README.md").read_text() == targets.page(results)


@pytest.mark.parametrize("name", ["deit_small", "fashion_mnist"])
def test_what_is_claimed_of_every_file_is_what_was_recorded(name):
    """The figures that README names as limits: rungs, bytes, time, and what int8 costs and gains."""
    results = targets.HERE / "results" / "targets"
    record = json.loads((results / f"{name}.json").read_text())
    report, rows = record["report"], {}
    for row in record["report"]["artifacts"]:
        rows.setdefault(row["precision"] if row["model"] == "compressed" else "dense", row)
    assert {rung["verdict"] for rung in report["parity"]} <= {"pass", "not_run"}
    assert all(rung["reason"] for rung in report["parity"] if rung["verdict"] == "not_run")
    assert targets.after_compression(record["seconds"]) <= 600
    engines = [each["path"] for each in report["files"] if each["path"].endswith((".engine", ".xml"))]
    assert len(engines) >= 3
    for kind in ("int8-dynamic", "int8-qdq"):
        assert rows[kind]["bytes"] <= 0.16 * rows["dense"]["bytes"]
        if rows[kind]["total"]:
            assert rows[kind]["wrong"] - rows["fp32"]["wrong"] <= 0.003 * rows[kind]["total"]
    if name == "deit_small":
        verified = {row["precision"]: row["verified_speedup_at_least"] or 0 for row in report["bench"]}
        assert max(verified["int8-dynamic"], verified["int8-qdq"]) >= 3.8
        assert verified["fp32"] >= 1.75
