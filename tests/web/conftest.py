"""The browser of the tests of web pages, and what these have in common."""

from __future__ import annotations

import pytest
from builders import variant
from web.chromium import launched

from toolchain.errors import TargetUnavailable
from toolchain.export.onnx_graph import export_onnx
from toolchain.targets.ort_web.target import installed


@pytest.fixture(scope="module")
def package():
    """The folder node_modules with ONNX Runtime Web; skips the test where it is not installed."""
    try:
        return installed().folder / "node_modules"
    except TargetUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder(package, tmp_path_factory):
    """(a folder that a page is served from, the model in it)."""
    path, model = tmp_path_factory.mktemp("page"), variant("classic")
    (path / "node_modules").symlink_to(package)
    export_onnx(model.module, path / "m.onnx", input_size=(3, 32, 32), opset=20, metadata={}, simplify=True)
    return path, model


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; skips the test where there is none."""
    with launched() as found:
        yield found
