"""ONNX Runtime Web in Node: what runs is what was asked for, a fault in a file shows, and a child that dies is an error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys

import numpy as np
import onnx
import psutil
import pytest
from builders import variant
from made_up_reports import timed
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from sweeps import swept

from toolchain.devices.transport import LocalTransport
from toolchain.errors import ArtifactError, RecipeError, TargetUnavailable
from toolchain.export.calls import torch_call
from toolchain.export.onnx_graph import export_onnx
from toolchain.export.precision import PRECISIONS
from toolchain.on_device.runner import COLD_SCHEDULE_SCHEMA, SCHEDULE_SCHEMA
from toolchain.parity import TOLERANCES, compare_outputs
from toolchain.pipeline.assemble import downloads
from toolchain.progress import Progress
from toolchain.targets import get_target
from toolchain.targets.ort_web import target as ort_web
from toolchain.targets.ort_web.child import Installed, NodeRunner
from toolchain.targets.ort_web.target import ORT_WEB

SIZE = (3, 32, 32)


@pytest.fixture(scope="module")
def there():
    try:
        ORT_WEB.probe()
    except TargetUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(a tiny ViT, its file)."""
    model, path = variant("classic"), tmp_path_factory.mktemp("tiny") / "m.onnx"
    export_onnx(model.module, path, input_size=SIZE, opset=20, metadata={}, simplify=True)
    return model, path


def images(batch, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, *SIZE)).astype(np.float32)


def linear(path, kind=TensorProto.FLOAT, width=8):
    """One product, or for a type without it the input itself."""
    io = [helper.make_tensor_value_info(name, kind, ["batch", width]) for name in ("image", "logits")]
    weight = np.random.default_rng(0).standard_normal((width, width)).astype(np.float32)
    product = kind == TensorProto.FLOAT
    node = helper.make_node(*(("MatMul", ["image", "w"]) if product else ("Identity", ["image"])), ["logits"])
    graph = helper.make_graph([node], "g", io[:1], io[1:], [numpy_helper.from_array(weight, "w")] if product else [])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def rung_of(model, path, tolerance=TOLERANCES["fp32"]):
    """The rung of the torch model against a file in ONNX Runtime Web, at batch 1 and 3."""
    feeds = [images(1), images(3, seed=1)]
    with ORT_WEB.open(path, 1) as runner:
        got = [runner.infer({"image": feed})["logits"] for feed in feeds]
    expected = [torch_call(model.module)(feed) for feed in feeds]
    return compare_outputs("deploy", path.name, expected, got, tolerance=tolerance, real_images=False)


@pytest.mark.usefixtures("there")
@pytest.mark.slow
def test_another_structure_is_the_model(tmp_path):
    model = variant("Swin")
    export_onnx(model.module, tmp_path / "m.onnx", input_size=SIZE, opset=20, metadata={}, simplify=True)
    assert rung_of(model, tmp_path / "m.onnx").verdict == "pass"


@pytest.mark.slow
@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("name", swept(["fp16", "int8-dynamic", "int8-qdq", "int4"], ["int8-dynamic"]))
def test_files_of_every_precision_that_it_loads_are_those_of_ort_cpu(tiny, tmp_path, name):
    assert PRECISIONS[name].product in ORT_WEB.loads
    path = tmp_path / f"{name}.onnx"
    onnx.save(PRECISIONS[name].convert(onnx.load(tiny[1]), images(8)).model, path)
    outputs = []
    for target in ("ort-cpu", "ort-web"):
        with get_target(target).open(path, 1) as runner:
            outputs.append(runner.infer({"image": images(3)})["logits"].astype(np.float64))
    np.testing.assert_allclose(*outputs, atol=1e-3 * max(1.0, np.abs(outputs[0]).max()))


def changed(source, path, name, change):
    """A copy of a file in which one tensor is another."""
    model = onnx.load(source)
    (tensor,) = [each for each in model.graph.initializer if each.name == name]
    values = change(numpy_helper.to_array(tensor).copy())
    assert not np.array_equal(values, numpy_helper.to_array(tensor))
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)
    return path


def bias_dropped(source, path):
    return changed(source, path, "blocks.1.mlp.fc1.bias", np.zeros_like)


def heads_swapped(source, path):
    """What the output of attention reads of its three heads, turned by one."""
    (proj,) = [node for node in onnx.load(source).graph.node if "blocks.0.attn.proj.bias" in node.input]
    transposed = any(each.name == "transB" and each.i for each in proj.attribute)
    assert proj.op_type == "Gemm"
    return changed(source, path, proj.input[1], lambda weight: np.roll(weight, 16, axis=int(transposed)))


@pytest.mark.slow
@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("plant", swept([bias_dropped, heads_swapped], [heads_swapped]))
def test_a_fault_in_the_file_is_caught_by_the_rung(tiny, tmp_path, plant):
    model, path = tiny
    assert rung_of(model, path).verdict == "pass"
    rung = rung_of(model, plant(path, tmp_path / "faulty.onnx"))
    assert rung.verdict == "fail"
    assert "max |Δ|" in rung.reason


@pytest.mark.slow
@pytest.mark.usefixtures("there")
def test_a_wrong_scale_of_an_int8_file_is_caught_by_its_rung(tiny, tmp_path):
    model, source = tiny
    honest = tmp_path / "int8-dynamic.onnx"
    onnx.save(PRECISIONS["int8-dynamic"].convert(onnx.load(source), images(8)).model, honest)
    tolerance = PRECISIONS["int8-dynamic"].tolerance
    assert rung_of(model, honest, tolerance).verdict == "pass"
    scales = [each.name for each in onnx.load(honest).graph.initializer if each.name.endswith("_scale")]
    rung = rung_of(model, changed(honest, tmp_path / "faulty.onnx", scales[0], lambda scale: 8 * scale), tolerance)
    assert (rung.verdict, "cosine" in rung.reason) == ("fail", True), rung


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("kind", ["float16", "float64", "uint8", "int8", "int32", "int64", "bool"])
def test_arrays_of_every_type_cross_both_ways(tmp_path, kind):
    array = np.array([[0, 1, 2, 100, 7, 1, 0, 3]], kind)
    with ORT_WEB.open(linear(tmp_path / "m.onnx", helper.np_dtype_to_tensor_dtype(array.dtype)), 1) as runner:
        got = runner.infer({"image": array})["logits"]
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array)


@pytest.mark.slow
@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("location", ["m.onnx.data", "weights.bin", "below/weights ä.bin"])
def test_weights_in_a_file_beside_are_read(tiny, tmp_path, location):
    path = tmp_path / "m.onnx"
    (tmp_path / "below").mkdir()
    onnx.save(onnx.load(tiny[1]), path, save_as_external_data=True, location=location, size_threshold=1024)
    assert rung_of(tiny[0], path).verdict == "pass"


def kept_elsewhere(path):
    """A sum of weights that lie in one file each, of the graph and of a node."""
    for index in range(3):
        np.full(8, 10.0**index, np.float32).tofile(path.parent / f"{index}.bin")

    def stored(index):
        tensor = TensorProto(name=f"w{index}", data_type=TensorProto.FLOAT, dims=[8], raw_data=b"")
        set_external_data(tensor, f"{index}.bin")
        tensor.ClearField("raw_data")
        return tensor

    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8]) for name in ("image", "logits")]
    nodes = [
        helper.make_node("Constant", [], ["w1"], value=stored(1)),
        helper.make_node("Add", ["w0", "w1"], ["a"]),
        helper.make_node("Add", ["a", "w2"], ["b"]),
        helper.make_node("Add", ["image", "b"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "g", io[:1], io[1:], [stored(0), stored(2)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.usefixtures("there")
def test_weights_are_read_from_every_file_that_is_named_and_one_that_is_missing_is_said(tmp_path):
    path = kept_elsewhere(tmp_path / "m.onnx")
    (tmp_path / "m.onnx.data").write_bytes(b"of something else")
    with ORT_WEB.open(path, 1) as runner:
        np.testing.assert_array_equal(
            runner.infer({"image": np.zeros((1, 8), np.float32)})["logits"], np.full((1, 8), 111.0)
        )
    (tmp_path / "1.bin").unlink()
    with (
        pytest.raises(ArtifactError, match=r"lie in '1\.bin', which is not in .*; put that file there"),
        ORT_WEB.open(path, 1),
    ):
        pass


@pytest.mark.usefixtures("there")
def test_threads_are_those_that_were_asked_for_or_refused(tmp_path):
    path = linear(tmp_path / "m.onnx")
    if len(os.sched_getaffinity(0)) > 1:
        with ORT_WEB.open(path, 2) as runner:
            assert runner.infer({"image": np.ones((1, 8), np.float32)})["logits"].shape == (1, 8)
    with pytest.raises(TargetUnavailable, match="4096 threads are more than"), ORT_WEB.open(path, 4096):
        pass


@pytest.mark.usefixtures("there")
def test_what_is_fed_wrongly_is_said_and_the_child_goes_on(tmp_path):
    with ORT_WEB.open(linear(tmp_path / "m.onnx"), 1) as runner:
        with pytest.raises(RecipeError, match=r"inputs \['image'\] are not fed"):
            runner.infer({"picture": np.ones((1, 8), np.float32)})
        with pytest.raises(ArtifactError, match=r"ONNX Runtime Web [\d.]+ cannot run .*m\.onnx"):
            runner.infer({"image": np.ones((1, 9), np.float32)})
        assert runner.infer({"image": np.ones((2, 8), np.float32)})["logits"].shape == (2, 8)
    with pytest.raises(RuntimeError, match="with"):
        runner.infer({"image": np.ones((1, 8), np.float32)})


@pytest.mark.usefixtures("there")
def test_a_child_that_dies_is_an_error_and_leaves_nothing_behind(tmp_path):
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with ORT_WEB.open(linear(tmp_path / "m.onnx"), 1) as runner:
        os.kill(runner.pid, signal.SIGKILL)
        with pytest.raises(ArtifactError, match=r"m\.onnx: Node ended in ONNX Runtime Web \(-9\)"):
            runner.infer({"image": np.ones((1, 8), np.float32)})
    assert {child.pid for child in psutil.Process().children(recursive=True)} == before


@pytest.mark.usefixtures("there")
def test_the_child_ends_with_its_parent(tmp_path):
    """Kind: a Node process that goes on computing, or waiting, when a run is killed."""
    path = linear(tmp_path / "m.onnx")
    script = (
        "import sys, time; from pathlib import Path; from toolchain.targets.ort_web.target import ORT_WEB\n"
        f"with ORT_WEB.open(Path({str(path)!r}), 1) as runner:\n"
        "    print(runner.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    child.wait(timeout=60)


def fake_node(folder, answer):
    """A program called node that says that it is new enough, and then does something else."""
    program = folder / "node"
    program.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo v20.1.0; exit; fi\n{answer}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            "echo a place >&2; echo 'FATAL ERROR: out of memory' >&2; echo '    at x' >&2; exit 7",
            r"\(7\): FATAL ERROR: out of",
        ),
        ("exit 3", r"\(3\): it said nothing"),
        (r"printf '\005\000\000\000hello'", "no answer"),
    ],
)
def test_the_last_words_of_a_child_are_the_error(tmp_path, answer, words):
    found = Installed(fake_node(tmp_path, answer), tmp_path, {"onnxruntime-web": "1", "node": "20"})
    runner = NodeRunner(tmp_path / "m.onnx", 1, found, target="ort-web")
    before = psutil.Process().children()  # tests in the same process may have started others
    with pytest.raises(ArtifactError, match=rf"m\.onnx: .*{words}"), runner:
        pass
    assert {*psutil.Process().children()} <= {*before}


def test_a_program_that_cannot_be_started_is_an_error_and_leaves_nothing_open(tmp_path):
    found = Installed(str(tmp_path / "absent"), tmp_path, {"onnxruntime-web": "1", "node": "20"})
    runner = NodeRunner(tmp_path / "m.onnx", 1, found, target="ort-web")
    with pytest.raises(TargetUnavailable, match=r"absent cannot be started: No such file .*; name one that is"), runner:
        pass
    assert runner._log is None


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two threads need two cores")
def test_fewer_threads_than_asked_for_are_refused(tmp_path):
    found = Installed(
        fake_node(tmp_path, r"""printf '\015\000\000\000{"threads":1}'"""), tmp_path, {"onnxruntime-web": "1"}
    )
    with (
        pytest.raises(TargetUnavailable, match="asked for 2 threads and runs with 1"),
        NodeRunner(tmp_path / "m.onnx", 2, found, target="ort-web"),
    ):
        pass


@pytest.mark.slow
@pytest.mark.usefixtures("there")
def test_a_session_knows_its_runtime_and_what_the_child_took(tmp_path):
    """Kind: a child's work that counts as other processes' load, and its memory that counts as none."""
    variants = [{"name": "A", "path": str(linear(tmp_path / "m.onnx")), "runtime": "ort-web", "inputs": ["image"]}]
    common = {
        "session": 0,
        "threads": 1,
        "inputs": {"count": 1, "seed": 0, "tensors": [{"shape": [1, 8], "dtype": "float32"}]},
        "variants": variants,
    }
    timed = {"schema": SCHEDULE_SCHEMA, "seed": 0, "blocks": 2, "slot_ms": 1, "warmup": {"calls": 2, "seconds": 0.0}}
    session = LocalTransport().run({**common, **timed}, Progress())
    runtimes = session["fingerprint"]["after"]["machine"]["runtimes"]
    assert runtimes.keys() >= {"onnxruntime-web", "node"}
    cold = LocalTransport().run({**common, "schema": COLD_SCHEDULE_SCHEMA}, Progress())
    assert cold["peak_rss_bytes"] - cold["rss_before_bytes"] > 50e6, "Node alone takes as much"


def refused(monkeypatch, tmp_path):
    """What is raised before a file is looked at."""
    for call in (ORT_WEB.probe, lambda: ORT_WEB.open(tmp_path / "absent.onnx", 1)):
        with pytest.raises(TargetUnavailable) as caught:
            call()
    return caught.value


def test_without_node_it_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    error = refused(monkeypatch, tmp_path)
    assert ("no program node" in error.reason, error.install) == (True, "apt-get install nodejs npm")
    (tmp_path / "node").write_text("#!/bin/sh\necho v16.20.0\n")
    (tmp_path / "node").chmod(0o755)
    assert "is Node.js 16.20.0; it needs 18" in refused(monkeypatch, tmp_path).reason


@pytest.mark.parametrize("version", ["", "1.2.3"])
def test_without_the_package_it_says_how_to_get_it(monkeypatch, tmp_path, version):
    """Nothing is installed by itself; a folder with a space must not break the line."""
    folder = tmp_path / "a folder"
    if version:
        record = folder / "node_modules" / "onnxruntime-web" / "package.json"
        record.parent.mkdir(parents=True)
        record.write_text(json.dumps({"version": version}))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    fake_node(tmp_path, "exit 1")
    monkeypatch.setenv("SLIMVIT_ORT_WEB", str(folder))
    error = refused(monkeypatch, tmp_path)
    assert (f"holds onnxruntime-web {version}" if version else "is not installed in") in error.reason
    assert f"mkdir -p '{folder}' && cp " in error.install
    assert error.install.endswith(f"npm ci --ignore-scripts --prefix '{folder}'")


@pytest.mark.slow
def test_the_line_that_is_printed_installs_it(monkeypatch, tmp_path):
    """Needs npm's registry."""
    if shutil.which("npm") is None:
        pytest.skip("there is no program npm")
    monkeypatch.setenv("SLIMVIT_ORT_WEB", str(tmp_path / "a folder"))
    with pytest.raises(TargetUnavailable) as caught:
        ORT_WEB.probe()
    subprocess.run(caught.value.install, shell=True, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    assert ORT_WEB.probe().version == ort_web.pinned_version()


def test_it_is_expected_in_the_cache_folder_unless_another_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("SLIMVIT_ORT_WEB", raising=False)
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path))
    assert ort_web.install_folder() == tmp_path / "ort-web"


@pytest.mark.usefixtures("there")
def test_the_bytes_of_the_wasm_are_told():
    info = ORT_WEB.probe()
    wasm = ort_web.install_folder() / "node_modules/onnxruntime-web/dist" / info.details["wasm"]
    assert int(info.details["wasm_bytes"]) == wasm.stat().st_size > 10e6
    assert info.version == ort_web.pinned_version()


@pytest.mark.usefixtures("there")
def test_a_report_tells_what_a_page_downloads_beside_the_file():
    name, count = get_target("ort-web").runtime_download()
    cells = [timed("fp32", 0.5, target=target) for target in ("ort-cpu", "ort-web", "ort-web", "a board")]
    (line,) = downloads(cells)
    assert name in line
    assert f"{count / 1e6:.2f} MB" in line
    assert count > 5e6
