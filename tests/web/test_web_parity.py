"""The ONNX file as it is, in a real headless browser: the same wasm as in Node, and the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
from web.chromium import logits_in_chromium, noise

from toolchain.export.calls import torch_call
from toolchain.parity import TOLERANCES, compare_outputs
from toolchain.targets import get_target


@pytest.mark.slow
def test_wasm_in_a_browser_is_wasm_in_node_bit_for_bit(browser, folder):
    path, model = folder
    feeds = noise((1, 3))
    got, _ = logits_in_chromium(browser, path, "m.onnx", feeds)
    with get_target("ort-web").open(path / "m.onnx", 1) as runner:
        for each, feed in zip(got, feeds, strict=True):
            np.testing.assert_array_equal(each, runner.infer({"image": feed})["logits"])
    expected = [torch_call(model.module)(feed) for feed in feeds]
    rung = compare_outputs("deploy", "m.onnx", expected, got, tolerance=TOLERANCES["fp32"], real_images=False)
    assert rung.verdict == "pass", rung
