"""examples/infer_executorch.cpp, compiled against the libraries of the wheel: the logits of the ONNX file, from a picture."""

import json
import shutil
import subprocess
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
from builders import dense_model

from toolchain.artifacts.onnx_file import PREPROCESS
from toolchain.errors import TargetUnavailable
from toolchain.export.onnx_graph import export_onnx
from toolchain.on_device.runner import OrtRunner
from toolchain.targets import BuildOptions, get_target

SOURCE = Path(__file__).resolve().parents[2] / "examples/infer_executorch.cpp"


def test_the_program_prepares_a_picture_as_the_file_says(tmp_path):
    compiler, target = shutil.which("g++"), get_target("executorch-xnnpack")
    if compiler is None:
        pytest.skip("there is no g++")
    try:
        target.require_run()
    except TargetUnavailable as error:
        pytest.skip(str(error))
    model, source = dense_model(), tmp_path / "m.onnx"
    export_onnx(
        model.module,
        source,
        input_size=(3, 32, 32),
        opset=20,
        metadata={PREPROCESS: json.dumps(model.preprocess.to_dict())},
        simplify=True,
    )
    path = target.build(source, tmp_path, BuildOptions((1, 1, 1))).path
    wheel = Path(str(distribution("executorch").locate_file("executorch")))
    line = [compiler, "-std=c++17", "-w", "-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_EVENT_TRACER_ENABLED"]
    line += [f"-I{wheel}/include", f"-I{wheel}/include/executorch/runtime/core/portable_type/c10", str(SOURCE)]
    line += [f"-L{wheel}/lib", f"-Wl,-rpath,{wheel}/lib", "-Wl,--no-as-needed", "-lexecutorch"]
    line += ["-lexecutorch_kernels_optimized", "-lexecutorch_backend_xnnpack", "-lexecutorch_threadpool"]
    subprocess.run([*line, "-o", str(tmp_path / "infer")], check=True)

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    (tmp_path / "picture.ppm").write_bytes(b"P6\n32 32\n255\n" + pixels.tobytes())
    done = subprocess.run([tmp_path / "infer", path, tmp_path / "picture.ppm"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = [float(line.split()[1]) for line in done.stdout.splitlines()]
    how = model.preprocess
    image = (pixels.astype(np.float32) / 255 - np.float32(how.mean)) / np.float32(how.std)
    with OrtRunner(str(source), 1) as runner:
        expected = runner.infer({"image": np.ascontiguousarray(image.transpose(2, 0, 1))[None]})["logits"][0]
    assert got == pytest.approx(expected, abs=1e-5)
