"""Pairs of a suite's rows, timed by the real harness: recorded once, again where the machine left doubt about them."""

from __future__ import annotations

import json
import shutil

import latency
import pytest
import report
import run
from records import Results
from suite import Suite

from toolchain.measure.compare import compare
from toolchain.measure.comparison import Comparison

PAIR = "dense--joint.params0.5"


@pytest.fixture
def timed(measured, tmp_path, monkeypatch):
    """(a copy of the tiny suite that names a pair, the pairs that were timed), with little to do for the harness."""
    root = shutil.copytree(measured, tmp_path / "copy")
    text = (root / "tiny.toml").read_text()
    (root / "tiny.toml").write_text(text.replace("compare =", 'latency = [["dense", "joint.params0.5"]]\ncompare =', 1))
    calls = []

    def short(*pair, target, on_progress):
        calls.append([path.name for path in pair])
        return compare(
            *pair, target=target, on_progress=on_progress, looks=1, sessions=2, blocks=4, slot_ms=1.0, warmup_s=0.01
        )

    monkeypatch.setattr(latency, "compare", short)
    return root, calls


def main(root, *more):
    return run.main([str(root / "tiny.toml"), "--work", str(root / "work"), "--results", str(root / "results"), *more])


def test_pairs_are_timed_once_and_stand_in_the_page(timed, monkeypatch):
    root, calls = timed
    monkeypatch.setattr(Comparison, "verdict", "pass")
    assert main(root, "--latency") == main(root, "--latency") == 0
    assert calls == [["dense.onnx", "joint.params0.5.onnx"]]
    path = root / "results" / "tiny" / "latency" / f"{PAIR}.json"
    page = report.regenerate(Suite.load(root / "tiny.toml"), Results(root / "results"))["README.md"]
    assert "| `dense` → `joint.params0.5` | ort-cpu | pass |" in page
    assert "Timed on: " in page
    other = [path, path]  # not the two files that were timed
    assert not latency.timed(path, other)


def test_a_pair_that_came_out_invalid_or_was_edited_is_timed_again(timed, monkeypatch):
    root, calls = timed
    monkeypatch.setattr(Comparison, "verdict", "invalid")
    assert main(root, "--latency") == main(root, "--latency") == 0
    assert len(calls) == 2
    monkeypatch.undo()
    monkeypatch.setattr(latency, "compare", lambda *pair, **_: calls.append(pair) or pytest.fail("timed"))
    path = root / "results" / "tiny" / "latency" / f"{PAIR}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "verdict": "pass"}))
    with pytest.raises(pytest.fail.Exception):
        main(root, "--latency")
    assert len(calls) == 3


def test_a_suite_without_pairs_says_so(measured, tmp_path, capsys):
    root = shutil.copytree(measured, tmp_path / "copy")
    assert main(root, "--latency") == 2
    assert "names no pairs to time" in capsys.readouterr().err
    assert main(root, "--latency", "--dry-run") == main(root, "--only", "typo") == 2
    assert "has no cell 'typo'" in capsys.readouterr().err
    assert run.main([str(tmp_path / "absent.toml")]) == 2
