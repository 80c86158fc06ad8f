"""A target of another package: one object and one registration, and it can be probed, listed, opened, compared on, named."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from builders import write_stack
from measuring import Scripted, device_of

from toolchain.cli.main import main
from toolchain.measure.compare import compare
from toolchain.measure.samples import Design
from toolchain.recipe import Recipe
from toolchain.targets import TARGETS, get_target, is_target

TOY = """
from toolchain.targets import Target, TargetInfo, TargetProfile
from toolchain.targets.ort import ORT_CPU


class Toy(Target):
    name, measures, profile = "toy", True, TargetProfile({"mlp_hidden": 16})
    takes, loads = ORT_CPU.takes, ORT_CPU.loads

    def probe(self):
        return TargetInfo(self.name, "toys", "1", "a box")

    def _open(self, path, threads):
        return ORT_CPU.open(path, threads)


TOY = Toy()
"""
FOUND = """
import json, sys
from pathlib import Path
from toolchain.measure.compare import compare
from toolchain.measure.samples import Design, Workload
from toolchain.targets import TARGETS, get_target
a, b = map(Path, sys.argv[1:])
with get_target("toy").open(a, 1) as runner:
    pass
found = compare(a, b, "toy", Workload(batch=4), Design(sessions=1, blocks=4, looks=1, slot_ms=1.0, warmup_s=0.01))
print(json.dumps([get_target("toy").probe().device, "toy" in TARGETS, found.scenario.target]))
"""


def toy_target():
    space: dict[str, object] = {}
    exec(TOY, space)
    return space["TOY"]


@pytest.fixture
def toy():
    return toy_target()


def test_one_object_and_one_call_register_a_target(toy, register, tmp_path, capsys):
    register(TARGETS, toy)
    a, b = write_stack(tmp_path / "a.onnx"), write_stack(tmp_path / "b.onnx", layers=5)
    assert is_target("toy")
    with get_target("toy").open(a, 1) as runner:
        assert runner is not None
    comparison = compare(a, b, device_of(Scripted(), "toy"), design=Design(looks=1))
    assert (comparison.scenario.target, comparison.verdict) == ("toy", "pass")
    with pytest.raises(SystemExit):
        main(["targets", "--json"])
    rows = {row["target"]: row for row in json.loads(capsys.readouterr().out)}
    assert (rows["toy"]["available"], rows["toy"]["device"]) == (True, "a box")
    assert "ever been run" in rows["trt"]["never_run"]
    recipe = {"model": {"name": "vit_tiny_patch16_224"}, "budget": {"params": 0.5}, "bench": {"targets": ["toy"]}}
    assert Recipe.from_dict(recipe).bench.targets == ("toy",)


@pytest.mark.clock
def test_an_installed_package_declares_a_target_by_an_entry_point(tmp_path):
    """Measuring processes are fresh ones: they find it as this one does."""
    (tmp_path / "toys.py").write_text(TOY)
    info = tmp_path / "toys-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[slimvit.targets]\ntoy = toys:TOY\n")
    a, b = write_stack(tmp_path / "a.onnx"), write_stack(tmp_path / "b.onnx", layers=5)
    import os

    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "SLIMVIT_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", FOUND, str(a), str(b)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["a box", True, "toy"]
