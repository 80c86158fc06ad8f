"""WebGPU in a headless Chromium, for parity alone: without a GPU it is SwiftShader, whose time says nothing of any device."""

from __future__ import annotations

import pytest
from web.chromium import WEBGPU, launched, logits_in_chromium, noise

from toolchain.export.calls import torch_call
from toolchain.parity import TOLERANCES, compare_outputs


@pytest.mark.slow
def test_webgpu_computes_the_model(folder):
    path, model = folder
    feeds = noise((1, 3))
    with launched(*WEBGPU) as browser:
        got, told = logits_in_chromium(browser, path, "m.onnx", feeds, provider="webgpu", timeout_ms=600_000)
    expected = [torch_call(model.module)(feed) for feed in feeds]
    rung = compare_outputs("deploy", "m.onnx", expected, got, tolerance=TOLERANCES["fp32"], real_images=False)
    assert rung.verdict == "pass", (rung, told)
