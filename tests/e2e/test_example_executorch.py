"""examples/infer_executorch.cpp, compiled against the libraries of the wheel: the logits of the ONNX file, from a picture."""

import json
import shutil
import subprocess
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
from builders import TINY, dense_model

from toolchain.artifacts.onnx_file import PREPROCESS
from toolchain.errors import TargetUnavailable
from toolchain.export.onnx_graph import export_onnx
from toolchain.on_device.runner import OrtRunner
from toolchain.targets import BuildOptions, get_target

pytestmark = pytest.mark.slow  # it compiles a program

SOURCE = Path(__file__).resolve().parents[2] / "examples/infer_executorch.cpp"


PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
PICTURE = b"P6\n32 32\n255\n" + PIXELS.tobytes()


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """(the model, its ONNX file, the .pte file of it, the program)."""
    compiler, target, folder = shutil.which("g++"), get_target("executorch-xnnpack"), tmp_path_factory.mktemp("example")
    if compiler is None:
        pytest.skip("there is no g++")
    try:
        target.require_run()
    except TargetUnavailable as error:
        pytest.skip(str(error))
    model, source = dense_model(**{**TINY, "depth": 1}), folder / "m.onnx"
    export_onnx(
        model.module,
        source,
        input_size=(3, 32, 32),
        opset=20,
        metadata={PREPROCESS: json.dumps(model.preprocess.to_dict())},
        simplify=True,
    )
    wheel = Path(str(distribution("executorch").locate_file("executorch")))
    line = [compiler, "-std=c++17", "-w", "-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_EVENT_TRACER_ENABLED"]
    line += [f"-I{wheel}/include", f"-I{wheel}/include/executorch/runtime/core/portable_type/c10", str(SOURCE)]
    line += [f"-L{wheel}/lib", f"-Wl,-rpath,{wheel}/lib", "-Wl,--no-as-needed", "-lexecutorch"]
    line += ["-lexecutorch_kernels_optimized", "-lexecutorch_backend_xnnpack", "-lexecutorch_threadpool"]
    subprocess.run([*line, "-o", str(folder / "infer")], check=True)
    return model, source, target.build(source, folder, BuildOptions((1, 1, 1))).path, folder / "infer"


def infer(example, path, picture, folder):
    file = folder / "picture.ppm"
    file.write_bytes(picture)
    return subprocess.run([example[3], path, file], capture_output=True, text=True)


def test_the_program_prepares_a_picture_as_the_file_says_and_refuses_any_other(example, tmp_path):
    model, source, path, _ = example
    done = infer(example, path, PICTURE, tmp_path)
    assert done.returncode == 0, done.stderr
    got = [float(line.split()[1]) for line in done.stdout.splitlines()]
    how = model.preprocess
    image = (PIXELS.astype(np.float32) / 255 - np.float32(how.mean)) / np.float32(how.std)
    with OrtRunner(str(source), 1) as runner:
        expected = runner.infer({"image": np.ascontiguousarray(image.transpose(2, 0, 1))[None]})["logits"][0]
    assert got == pytest.approx(expected, abs=1e-5)
    wrong = {
        "whose largest value is 255": (PICTURE.replace(b"255", b"254", 1), PICTURE.replace(b"255", b"65535", 1)),
        "ends early": (PICTURE[:-1],),
        "is no binary PPM of 32 x 32": (PICTURE.replace(b"32", b"31", 1), PICTURE.replace(b"P6", b"P5", 1), b""),
    }
    for words, pictures in wrong.items():
        for picture in pictures:
            refused = infer(example, path, picture, tmp_path)
            assert (refused.returncode, refused.stdout) == (1, "")
            assert words in refused.stderr.splitlines()[-1]


def test_a_file_without_the_method_or_of_others_is_refused(example, tmp_path):
    other, wrong = tmp_path / "other.pte", tmp_path / "wrong.pte"
    content = example[2].read_bytes()
    assert content.count(b"forward") == 1
    other.write_bytes(content.replace(b"forward", b"another"))
    wrong.write_bytes(b"\0" * 64)
    for file, words in ((other, "has no method forward"), (wrong, "cannot be read")):
        refused = infer(example, file, PICTURE, tmp_path)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert words in refused.stderr.splitlines()[-1]
