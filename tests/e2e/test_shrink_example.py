"""examples/shrink_detector.py, run as its first lines say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "shrink_detector.py"


@pytest.mark.slow
def test_the_detector_exports_with_a_smaller_backbone(tmp_path: Path):
    path = tmp_path / "detector.onnx"
    done = subprocess.run([sys.executable, EXAMPLE, path], check=True, capture_output=True, text=True, timeout=300)
    before, after = [int(word.replace(",", "")) for word in done.stdout.split() if word.replace(",", "").isdigit()][:2]
    assert after < 0.6 * before
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert len(model.graph.output) == 2
