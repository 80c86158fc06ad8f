"""The recorded latency suite: resumable, tied to its files, and its table follows from raw samples."""

import json
import re

import numpy as np
import pytest
import speed
from builders import dense_model, write_stack
from speed import Cell, cells, result_of, table

from toolchain.errors import TargetUnavailable
from toolchain.export.onnx_graph import export_onnx
from toolchain.export.precision import precision_of
from toolchain.measure.compare import compare
from toolchain.measure.samples import BLOCKS

PAIR = Cell("tiny", ("dense", "fp32"), ("joint50", "fp32"), "ort-cpu", 4, 1)


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Stacks of matmuls in place of models, and the real harness with little to do."""
    timed = []

    def made(model, form, precision, work):
        return write_stack(tmp_path / f"{model}.{form}.{precision}.onnx", layers=6 if form == "dense" else 2)

    def counted(*pair, **options):
        timed.append([path.name for path in pair])
        return compare(*pair, **{**options, "looks": 1, "blocks": 4}, sessions=2, slot_ms=1.0, warmup_s=0.01)

    monkeypatch.setattr(speed, "artifact", made)
    monkeypatch.setattr(speed, "compare", counted)
    monkeypatch.setattr(speed, "cells", lambda: [PAIR])
    return timed


def run(tmp_path, *options):
    return speed.main(["--results", str(tmp_path / "results"), "--work", str(tmp_path), *options])


def test_it_records_once_and_the_table_follows(short, tmp_path):
    assert run(tmp_path) == run(tmp_path) == 0
    assert short == [["tiny.dense.fp32.onnx", "tiny.joint50.fp32.onnx"]]
    results = tmp_path / "results"
    assert (results / "README.md").read_text() == table(results, [PAIR])
    found = result_of(PAIR, results)
    assert f"| {found.verdict} |" in table(results, [PAIR])
    assert "have not been measured" not in table(results, [PAIR])
    assert "1 comparisons have not been measured" in table(tmp_path / "elsewhere", [PAIR])


def test_the_overview_says_what_was_verified_or_why_not():
    dense, results = ("dense", "fp32"), speed.HERE / "results" / "speed"
    halved = Cell("small", dense, ("joint50", "fp32"), "ort-cpu", 1, 1)
    slower = Cell("small", dense, ("dense", "int8-dynamic"), "openvino-cpu", 8, 1)
    absent = Cell("tiny", dense, ("joint50", "fp32"), "ort-cpu", 4, 1)
    smaller = Cell("small", dense, ("tiny", "fp32"), "ort-cpu", 1, 1)
    bound = result_of(halved, results).verified_speedup_at_least
    overview = table(results, [halved, slower, absent, smaller]).partition("## Verified")[2].partition("## Every")[0]
    head, _, *rows = [line for line in overview.splitlines() if line.startswith("|")]
    assert head == "| Model | B | ort b1 t1 | openvino b8 t1 | ort b4 t1 |"
    (said,) = re.findall(r"≥ (\d\.\d\d) ", rows[0])
    assert 0 <= bound - float(said) < 0.01, "rounded down"
    assert rows == [
        f"| deit_small_patch16_224 | `joint50 fp32` | ≥ {said} |  |  |",
        "| deit_small_patch16_224 | `dense int8-dynamic` |  | regressed |  |",
        "| deit_tiny_patch16_224 | `joint50 fp32` |  |  | not measured |",
    ]


def test_other_files_or_an_edited_result_are_measured_again(short, tmp_path, monkeypatch):
    assert run(tmp_path) == 0
    path = tmp_path / "results" / f"{PAIR.name}.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "verdict": "pass" if stored["verdict"] != "pass" else "improved"}))
    assert run(tmp_path) == 0
    assert len(short) == 2
    made = speed.artifact
    monkeypatch.setattr(speed, "artifact", lambda *each: write_stack(made(*each), layers=3))
    assert run(tmp_path) == 0
    assert len(short) == 3


def test_weights_of_another_processor_are_the_same_file(short, tmp_path, monkeypatch):
    """Their last bits differ, and with them the digest; latency does not depend on them."""
    assert run(tmp_path) == 0
    made = speed.artifact

    def elsewhere(*each):
        path = made(*each)
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
        return path

    monkeypatch.setattr(speed, "artifact", elsewhere)
    assert run(tmp_path) == 0
    assert len(short) == 1


def test_what_this_machine_cannot_time_is_left_out_and_said(short, tmp_path, monkeypatch, capsys):
    elsewhere = Cell("small", ("dense", "fp16"), ("joint50", "fp16"), "trt", 1, 1)

    def none(target, paths):
        if target == "trt":
            raise TargetUnavailable("trt", "no GPU")

    monkeypatch.setattr(speed, "require_target", none)
    monkeypatch.setattr(speed, "cells", lambda: [PAIR, elsewhere])
    assert run(tmp_path) == 0
    assert short == [["tiny.dense.fp32.onnx", "tiny.joint50.fp32.onnx"]]
    said = capsys.readouterr().out
    assert "1 comparisons are left out: target 'trt' is unavailable: no GPU" in said
    assert "1 of 1 comparisons to do" in said


def test_calls_that_are_long_get_half_of_the_blocks():
    blocks = {cell.name: cell.blocks for cell in cells()}
    assert blocks["small.dense-fp32--joint50-fp32.ort-cpu.b1.t1"] == BLOCKS
    assert blocks["tiny.dense-fp32--joint50-fp32.ort-cpu.b8.t1"] == BLOCKS // 2
    assert blocks["small.dense-fp32--joint50-fp32.ort-cpu.b8.t2"] == BLOCKS // 2
    assert blocks["base.dense-fp32--joint50-fp32.openvino-cpu.b1.t1"] == BLOCKS // 2
    assert blocks["small.dense-fp16--joint50-fp16.ort-cuda.b64.t1"] == BLOCKS


def test_a_dry_run_measures_nothing(short, tmp_path, capsys):
    assert run(tmp_path, "--dry-run") == 0
    assert "1 of 1 comparisons to do" in capsys.readouterr().out
    assert not short
    assert speed.main(["--only", "absent"]) == 2


def test_the_suite_is_what_was_asked_for():
    names = [cell.name for cell in cells()]
    assert len(names) == len(set(names))
    for model in ("tiny", "small"):
        for form, precision, target, batch, threads in (
            ("split50", "fp32", "ort-cpu", 1, 1),
            ("joint50", "int8-dynamic", "openvino-cpu", 8, 2),
            ("joint30", "fp32", "openvino-cpu", 1, 2),
            ("dense", "int8-dynamic", "ort-cpu", 8, 1),
        ):
            assert f"{model}.dense-fp32--{form}-{precision}.{target}.b{batch}.t{threads}" in names
    assert all(cell.batch == cell.threads == 1 for cell in cells() if cell.model == "base")


def test_int8_files_are_made_from_the_fp32_ones(tmp_path):
    whole, size = tmp_path / "tiny.dense.fp32.onnx", (3, 32, 32)
    module = dense_model(num_classes=7, img_size=32, patch_size=16, embed_dim=48, depth=2).module
    export_onnx(module, whole, input_size=size, opset=20, metadata={}, simplify=True)
    path = speed.artifact("tiny", "dense", "int8-dynamic", tmp_path)
    assert precision_of(path).name == "int8-dynamic"
    assert path.stat().st_size < 0.7 * whole.stat().st_size
    assert {each.name for each in tmp_path.iterdir()} == {whole.name, path.name}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["split50", "joint30"])
def test_the_models_are_what_their_names_say(tmp_path, form):
    import onnx

    dense, small = (onnx.load(speed.artifact("tiny", each, "fp32", tmp_path)) for each in ("dense", form))
    params = [int({p.key: p.value for p in each.metadata_props}["params"]) for each in (dense, small)]
    assert params[1] / params[0] == pytest.approx(0.3 if form == "joint30" else 0.5, abs=0.01)
    sizes = [sum(np.prod(tensor.dims) for tensor in each.graph.initializer) for each in (dense, small)]
    assert sizes[1] / sizes[0] == pytest.approx(params[1] / params[0], abs=0.01)


@pytest.mark.parametrize("threads", [1, 2])
def test_half_of_deit_s_is_as_fast_as_promised(threads):
    """Verified over the dense file in fp32; the promise is for one thread."""
    cell = Cell("small", ("dense", "fp32"), ("joint50", "fp32"), "ort-cpu", 1, threads)
    found = result_of(cell, speed.HERE / "results" / "speed")
    assert found.verdict == "improved"
    assert found.verified_speedup_at_least >= (1.75 if threads == 1 else 1.5)


def test_the_committed_table_follows_from_the_committed_samples():
    results = speed.HERE / "results" / "speed"
    if not results.exists():
        pytest.skip("the latency suite is not recorded yet")
    assert (results / "README.md").read_text() == table(results, cells())
