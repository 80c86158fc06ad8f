"""A format of another package: one kind of artifact and one target, registered, and everything that reads artifacts takes it."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import write_classifier
from toy_format import TOY, ToyFormat

from toolchain.artifacts import ARTIFACTS, open_artifact
from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.errors import RecipeError
from toolchain.export.engine import BuildEngine
from toolchain.gate import GateConfig, run_gate
from toolchain.measure.experiment import require_target
from toolchain.model import run_stage
from toolchain.pipeline.run import run
from toolchain.recipe import EngineSection, Recipe
from toolchain.targets import TARGETS, BuildOptions, get_target

MODEL = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depth": 2, "num_heads": 2}
RECIPE = {
    "model": {"name": "vit_tiny_patch16_224", "kwargs": MODEL, "pretrained": False},
    "data": {"source": "none"},
    "compress": {"method": "hybrid", "attention": "none", "neurons": "magnitude", "allocation": "uniform"},
    "budget": {"params": 0.6},
    "engine": {"targets": ["toy"]},
}

VERBS = """
import json, sys
from toolchain.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as end:
        if end.code:
            raise
    sys.stdout.write(chr(0))
"""
"""One process for several verbs: most of the time of each is its imports."""


@pytest.fixture
def registered(register):
    register(ARTIFACTS, ToyFormat)
    register(TARGETS, TOY)


@pytest.fixture
def toy(registered, tmp_path):
    return get_target("toy").build(write_classifier(tmp_path / "a.onnx"), tmp_path, BuildOptions()).path


def test_it_has_files_bytes_a_digest_and_inputs(toy):
    artifact = open_artifact(toy)
    assert (artifact.name, artifact.size_bytes) == ("toy", toy.stat().st_size)
    assert sum(artifact.layers.values()) == artifact.size_bytes
    assert artifact.signature(2).inputs[0].shape == (2, 1, 8, 8)
    with pytest.raises(RecipeError, match=r"a\.toy"):
        _ = artifact.params


def test_targets_open_the_kinds_that_they_say(toy):
    require_target("toy", [toy])
    with pytest.raises(RecipeError, match=r"'toy' takes toy files, got .*a\.onnx"):
        require_target("toy", [toy.with_name("a.onnx")])
    with pytest.raises(RecipeError, match=r"'ort-cpu' takes ONNX files, got .*a\.toy"):
        require_target("ort-cpu", [toy])


def test_a_gate_holds_its_size(toy):
    cell = {"name": "a", "artifact": toy.name, "budget": {"size": "1 MB"}}
    (check,) = (
        run_gate(GateConfig.from_dict({"cell": [cell]}, toy.parent), tool="test", day=dt.date(2026, 1, 1))
        .cells[0]
        .checks
    )
    assert (check.status, check.value) == ("pass", toy.stat().st_size)


def test_a_run_builds_it_and_holds_it_against_its_file(registered, tmp_path, monkeypatch):
    """The toy is an engine like any other: built, opened, compared, weighed, reported, and replaced by the next one."""
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path / "cache"))
    report = run(Recipe.from_dict(RECIPE), tmp_path / "run")
    path = tmp_path / "run" / "engines" / "toy" / "compressed.fp32.toy"
    (row,) = report.engines
    assert (row.target, row.bytes) == ("toy", path.stat().st_size)
    assert row.verdict == "pass"
    stage = BuildEngine(EngineSection(targets=("toy",)), "toy", path.parent)
    assert run_stage(stage, OnnxFile(tmp_path / "run" / "onnx" / "compressed.fp32.onnx")).artifact.path == path


@pytest.mark.slow
def test_an_installed_package_declares_it_by_entry_points(tmp_path):
    """In a process of its own: a distribution on the path, whose metadata names both objects."""
    info = tmp_path / "site" / "toy_format-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-format\nVersion: 1\n")
    groups = "[slimvit.artifacts]\ntoy = toy_format:ToyFormat\n\n[slimvit.targets]\ntoy = toy_format:TOY\n"
    (info / "entry_points.txt").write_text(groups)
    onnx = write_classifier(tmp_path / "a.onnx")
    paths = [str(tmp_path / "site"), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

    engine = tmp_path / "e" / "a.toy"
    verbs = [["engine", onnx, "--target", "toy", "--out", engine.parent], ["inspect", engine]]
    command = [sys.executable, "-c", VERBS, json.dumps([[*map(str, verb), "--json"] for verb in verbs])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=240)
    built, facts = map(json.loads, done.stdout.split("\0")[:-1])
    assert (built["engine"], built["parity"]["verdict"]) == (engine.name, "pass")
    assert (facts["kind"], facts["bytes"]) == ("toy", engine.stat().st_size)
