"""The example of docs/ci.md, run as it stands there, and this project's own gate."""

from __future__ import annotations

import datetime as dt
import re
import tomllib
from pathlib import Path

import pytest
from builders import write_classifier
from measuring import GateScript

from toolchain.artifacts import open_artifact
from toolchain.gate import Accept, GateConfig, run_gate
from toolchain.gate.timing import Clock
from toolchain.report.gate import why_table

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/ci.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
TODAY = dt.date(2027, 1, 1)


@pytest.fixture
def example(tmp_path):
    """Runs the page's gate.toml on files at the places that it names; keywords change the new model."""
    text = next(block for block in BLOCKS if "[[cell]]" in block)
    release = write_classifier(tmp_path / "baseline/model.onnx")

    def call(accepts=(), **changes):
        write_classifier(tmp_path / "model.onnx", **changes)
        gate = tmp_path / "gate.toml"
        gate.write_text(text.replace("0" * 64, open_artifact(release).sha256))
        measure = GateScript({"b": 0.01})
        return run_gate(GateConfig.load(gate), accepts, tool="test", day=TODAY, why=True, clock=Clock(measure))

    return call


def test_the_example_of_features_is_one_that_a_gate_reads(tmp_path):
    (text,) = [block for block in BLOCKS if "features = {" in block]
    (tmp_path / "gate.toml").write_text(text.replace("…", "0" * 64))
    (cell,) = GateConfig.load(tmp_path / "gate.toml").cell
    assert cell.relation.features.error == 0.2


def test_the_example_runs_and_passes(example):
    result = example()
    assert {check.name for _, check in result.checks} == {
        *(f"budget.{name}" for name in ("size", "params", "nodes", "accuracy", "latency")),
        *(f"relation.{name}" for name in ("size", "accuracy", "parity", "latency")),
    }
    assert result.counts == {"pass": 9}


def test_the_accept_on_the_page_is_what_the_example_needs(example):
    (block,) = [block for block in BLOCKS if "[[accept]]" in block]
    accepts = [Accept(**entry) for entry in tomllib.loads(block)["accept"]]
    grown = example(padding=5000)
    failing = {check.name for _, check in grown.checks if check.status == "fail"}
    assert failing == {"budget.params", "relation.size"}
    assert why_table(grown.cells[0]).title in PAGE
    assert grown.cells[0].artifact.size_bytes == accepts[0].at_most
    covered = example(accepts, padding=5000)
    assert {check.name for _, check in covered.checks if check.status == "fail"} == failing - {accepts[0].check}
    assert [use.state for use in covered.accept_uses] == ["used"]


def test_every_check_and_option_is_on_the_page():
    for cell in GateConfig.model_fields["cell"].annotation.__args__[:1]:
        for section in (cell.model_fields["budget"].annotation, cell.model_fields["relation"].annotation):
            assert [name for name in section.model_fields if f"| `{name}` |" not in PAGE] == []
    for option in (
        "json",
        "markdown",
        "junit",
        "github-benchmark",
        "bencher",
        "why",
        "check",
        "from",
        "reason",
        "expires",
    ):
        assert f"--{option}" in PAGE


@pytest.mark.parametrize("path", sorted(ROOT.glob("models/*/gate.toml")), ids=lambda path: path.parent.name)
def test_the_projects_own_gate_loads_and_judges_the_size(path):
    config = GateConfig.load(path)
    assert all({"budget.size", "budget.params"} <= set(cell.checks) for cell in config.cell)
    recipe = tomllib.loads((path.parent / "recipe.toml").read_text())
    assert config.cell[0].budget.params <= recipe["budget"]["params"] * 1_194_122
    makefile = (ROOT / "Makefile").read_text()
    assert f"gate --config {path.relative_to(ROOT).as_posix()}" in makefile
    assert "make gate" in (ROOT / ".ci/run").read_text()
