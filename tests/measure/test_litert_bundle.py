"""A comparison of .tflite files on a device without slimvit: the bundle says what that needs, and runs with it alone."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from toolchain.measure.bundle import Question, pack, unpack
from toolchain.measure.samples import Design, Workload
from toolchain.on_device import bundle_run

pytest.importorskip("ai_edge_litert.interpreter", reason="pip install 'slimvit[litert]'")
pytestmark = pytest.mark.clock

DATA = Path(__file__).parents[1] / "targets/litert"
QUESTION = Question(
    "litert-cpu",
    Workload(batch=3),
    Design(sessions=2, blocks=4, slot_ms=2.0, warmup_s=0.02, tau=0.6, looks=1),
)


def test_a_bundle_of_tflite_files_is_packed_measured_and_unpacked(tmp_path):
    a, b = (Path(shutil.copy(DATA / f"tiny.{kind}.tflite", tmp_path)) for kind in ("fp32", "int8-dynamic"))
    bundle, folder = tmp_path / "bundle.tar", tmp_path / "device"
    pack(a, b, bundle, QUESTION)
    with tarfile.open(bundle) as tar:
        tar.extractall(folder, filter="data")
    assert json.loads((folder / "bundle.json").read_text())["modules"] == ["numpy", "ai_edge_litert"]
    assert "with numpy and ai_edge_litert" in (folder / "README.txt").read_text()
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    done = subprocess.run(["sh", "run.sh"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    comparison = unpack(folder / "result.json", bundle)
    assert comparison.scenario.batch == 3
    assert comparison.latency_ms("A") > 0


def test_what_the_device_lacks_is_what_the_bundle_needs():
    assert bundle_run.lacks(["numpy"]) == ""
    assert "no_such_runtime cannot be imported" in bundle_run.lacks(["numpy", "no_such_runtime"])
    assert bundle_run.lacks(["numpy", "no_such_runtime"]).endswith("-m pip install numpy no_such_runtime")
