"""Shares of the ideal speedup: recorded once, tied to their files, and the page follows from raw samples."""

import json

import floors
import pytest
from builders import write_stack
from floors import floor_of, table
from speed import Cell

from toolchain.analysis.floor import measure_floor
from toolchain.analysis.realised import Floor

PAIR = Cell("tiny", ("dense", "fp32"), ("joint50", "fp32"), "ort-cpu", 1, 1)


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Stacks of matmuls in place of models, and the real harness with little to do."""
    timed = []

    def made(_model, form, _precision, _work):
        return write_stack(tmp_path / f"{form}.onnx", layers=6 if form == "dense" else 2)

    def counted(*pair):
        timed.append([path.name for path in pair])
        return measure_floor(*pair, sessions=2, blocks=4, slot_ms=1.0, warmup_s=0.01)

    monkeypatch.setattr(floors, "artifact", made)
    monkeypatch.setattr("speed.artifact", made)
    monkeypatch.setattr(floors, "measure_floor", counted)
    monkeypatch.setattr(floors, "cells", lambda: [PAIR])
    monkeypatch.setattr(Floor, "is_valid", True)
    return timed


def run(tmp_path, *options):
    return floors.main(["--results", str(tmp_path / "results"), "--work", str(tmp_path), *options])


def test_it_records_once_and_the_page_follows(short, tmp_path):
    assert run(tmp_path) == run(tmp_path) == run(tmp_path, "--report") == 0
    assert short == [["dense.onnx", "joint50.onnx"]]
    page = (tmp_path / "results" / "README.md").read_text()
    assert page == table(tmp_path / "results")
    assert "| 3.00 |" in page, "the ideal is 6 layers over 2"


def test_an_edited_result_is_measured_again(short, tmp_path):
    assert run(tmp_path) == 0
    path = tmp_path / "results" / f"{PAIR.name}.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "realised": {**stored["realised"], "ideal": 2.0}}))
    assert floor_of(PAIR, tmp_path / "results") is None
    assert run(tmp_path) == 0
    assert len(short) == 2


def test_what_the_control_does_not_support_is_measured_again(short, tmp_path, monkeypatch):
    monkeypatch.setattr(Floor, "is_valid", False)
    assert run(tmp_path) == run(tmp_path) == 0
    assert len(short) == 2
    with pytest.raises(SystemExit):
        run(tmp_path, "--only", "typo")


def test_the_committed_page_follows_from_the_committed_samples():
    results = floors.HERE / "results" / "floor"
    if not results.exists():
        pytest.skip("shares of the ideal speedup are not recorded yet")
    assert (results / "README.md").read_text() == table(results)


def test_most_of_the_ideal_speedup_is_real():
    """What the project promises of DeiT-S at half of its parameters; measured, not computed here."""
    (cell,) = [each for each in floors.cells() if each.model == "small"]
    found = floors.floor_of(cell, floors.HERE / "results" / "floor")
    assert found.is_valid
    assert found.realised.to_dict()["share"]["point"] >= 0.90
