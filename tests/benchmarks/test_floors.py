"""Shares of the ideal speedup: recorded once, tied to their files, and the page follows from raw samples."""

from __future__ import annotations

import dataclasses

import pytest
from benching import Short, carry_out
from builders import write_stack
from engine import Bench
from kinds import KINDS
from kinds.floor import floor_of
from pages.floor import page
from records import Results
from suite import HERE, Suite

pytestmark = pytest.mark.slow

SUITE = """\
title = "A floor"
page = "floor"
models.tiny = { name = "deit_tiny_patch16_224", macs = 1e9 }
forms.joint50 = { compress = { method = "joint" }, budget = { params = 0.5 } }

[[cells]]
kind = "floor"
model = ["tiny"]
pairs = [["dense fp32", "joint50 fp32"]]
"""
NAME = "tiny.dense-fp32--joint50-fp32.ort-cpu.b1.t1"


@pytest.fixture(scope="module")
def floor():
    """The recorded floor of DeiT-S."""
    record = Results(HERE / "results").read("floor", "small.dense-fp32--joint50-fp32.ort-cpu.b1.t1")
    assert record is not None
    return record


@pytest.fixture
def bench(tmp_path, floor):
    """A suite whose one cell has the recorded floor, of the files that are there."""
    (tmp_path / "floor.toml").write_text(SUITE)
    suite, folder = Suite.load(tmp_path / "floor.toml"), tmp_path / "work" / "shapes"
    folder.mkdir(parents=True)
    found, models = floor_of(floor), {}
    for form, name, layers in (("dense", "A", 6), ("joint50", "B", 2)):
        path = write_stack(folder / f"tiny.{form}.fp32.onnx", layers=layers)
        facts = found.models[name].artifact.model_copy(update={"size_bytes": path.stat().st_size})
        models[name] = found.models[name].model_copy(update={"artifact": facts})
    result = found.model_copy(update={"models": models}).to_dict()
    bench = Bench(suite, Results(tmp_path / "results"), tmp_path / "work")
    key = KINDS["floor"].key(suite.cells[0], bench)
    bench.results.save(dataclasses.replace(floor, cell=NAME, key=key, result=result))
    return bench


def rewrite(bench, **result):
    record = bench.results.read("floor", NAME)
    bench.results.save(dataclasses.replace(record, result={**record.result, **result}))


def test_it_is_measured_once_and_the_page_follows(tmp_path):
    (tmp_path / "floor.toml").write_text(SUITE)
    (tmp_path / "work" / "shapes").mkdir(parents=True)
    for form, layers in (("dense", 6), ("joint50", 2)):
        write_stack(tmp_path / "work" / "shapes" / f"tiny.{form}.fp32.onnx", layers=layers)
    harness = Short()
    assert carry_out(tmp_path / "floor.toml", harness=harness) == 0
    assert harness.timed == [["tiny.dense.fp32.onnx", "tiny.joint50.fp32.onnx"]]
    text = page(Suite.load(tmp_path / "floor.toml"), Results(tmp_path / "results"))["README.md"]
    assert "| 3.00 |" in text, "the ideal is 6 layers over 2"
    assert "1. Measured on: " in text


def test_a_valid_record_of_these_files_is_left_as_it_is(bench):
    (cell,) = bench.suite.cells
    assert bench.is_done(cell)
    write_stack(bench.work / "shapes" / "tiny.joint50.fp32.onnx", layers=3)
    assert not bench.is_done(cell)


def test_an_edited_result_is_measured_again(bench, floor):
    rewrite(bench, realised={**floor.result["realised"], "ideal": 2.0})
    assert not bench.is_done(bench.suite.cells[0])


def test_what_the_control_does_not_support_is_measured_again(bench):
    """The same samples, judged at a tolerance that their control is too wide for."""
    valid = floor_of(bench.results.read("floor", NAME))
    strict = valid.design.model_copy(update={"tau": valid.tau_min / 2})
    doubtful = valid.model_copy(update={"design": strict})
    assert not doubtful.is_valid
    rewrite(bench, **doubtful.to_dict())
    assert bench.record(bench.suite.cells[0]) is not None
    assert not bench.is_done(bench.suite.cells[0])
    text = page(bench.suite, bench.results)["README.md"]
    assert "| no: the control supports" in text


def test_most_of_the_ideal_speedup_is_real(floor):
    """What the project promises of DeiT-S at half of its parameters; measured, not computed here."""
    found = floor_of(floor)
    assert found.is_valid
    assert found.realised.to_dict()["share"]["point"] >= 0.90
