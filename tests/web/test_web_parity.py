"""The ONNX file as it is, in a real headless browser: the same wasm as in Node, and the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
from builders import variant
from web.chromium import browser_or_skip, logits_in_chromium

from toolchain.errors import TargetUnavailable
from toolchain.export.calls import torch_call
from toolchain.export.onnx_graph import export_onnx
from toolchain.parity import TOLERANCES, compare_outputs
from toolchain.targets import get_target
from toolchain.targets.ort_web.target import installed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(a folder that a page is served from, the model in it)."""
    browser_or_skip()
    try:
        package = installed().folder / "node_modules"
    except TargetUnavailable as error:
        pytest.skip(str(error))
    path, model = tmp_path_factory.mktemp("page"), variant("classic")
    (path / "node_modules").symlink_to(package)
    export_onnx(model.module, path / "m.onnx", input_size=(3, 32, 32), opset=20, metadata={}, simplify=True)
    return path, model


def feeds():
    return [np.random.default_rng(batch).standard_normal((batch, 3, 32, 32)).astype(np.float32) for batch in (1, 3)]


def test_wasm_in_a_browser_is_wasm_in_node_bit_for_bit(folder):
    path, model = folder
    got, _ = logits_in_chromium(path, "m.onnx", feeds())
    with get_target("ort-web").open(path / "m.onnx", 1) as runner:
        for each, feed in zip(got, feeds(), strict=True):
            np.testing.assert_array_equal(each, runner.infer({"image": feed})["logits"])
    expected = [torch_call(model.module)(feed) for feed in feeds()]
    rung = compare_outputs("deploy", "m.onnx", expected, got, tolerance=TOLERANCES["fp32"], real_images=False)
    assert rung.verdict == "pass", rung


@pytest.mark.slow
def test_webgpu_computes_the_model(folder):
    """For parity alone: without a GPU this is SwiftShader, whose time says nothing of any device."""
    path, model = folder
    got, told = logits_in_chromium(path, "m.onnx", feeds(), provider="webgpu", timeout_ms=600_000)
    expected = [torch_call(model.module)(feed) for feed in feeds()]
    rung = compare_outputs("deploy", "m.onnx", expected, got, tolerance=TOLERANCES["fp32"], real_images=False)
    assert rung.verdict == "pass", (rung, told)
