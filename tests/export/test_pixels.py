"""Preprocessing inside the graph: the same logits from pixels, in every precision, and undone exactly."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import pytest
from builders import dense_model

from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.errors import ArtifactError
from toolchain.export import pixels
from toolchain.export.agreement import parity_of
from toolchain.export.calls import opened
from toolchain.export.convert import Convert
from toolchain.export.onnx_graph import export_onnx
from toolchain.export.pixels import of_pixels, representable, takes_pixels, to_pixels, with_pixels, without_pixels
from toolchain.export.stage import onnx_metadata
from toolchain.model import Preprocess, TimmModel, run_stage
from toolchain.surgery.replay import save_model

HOW = Preprocess((3, 32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.9, "center")


def drawn(count, seed=0):
    """uint8 pixels [N, H, W, C] of coloured blobs."""
    rng = np.random.default_rng(seed)
    return np.kron(rng.integers(0, 256, (count, 4, 4, 3)), np.ones((1, 8, 8, 1), int)).astype(np.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(the model's folder, the file that takes images, the file that takes pixels)."""
    folder = tmp_path_factory.mktemp("files")
    made = dense_model(num_classes=7, img_size=32, patch_size=16, embed_dim=48, depth=2)
    model = TimmModel(made.ref, made.module, made.family, made.groups, HOW, made.provenance)
    for name, finish in (("images", None), ("pixels", partial(with_pixels, preprocess=HOW))):
        export_onnx(
            model.module,
            folder / f"{name}.onnx",
            input_size=HOW.input_size,
            opset=20,
            metadata=onnx_metadata(model, "test"),
            simplify=True,
            finish=finish,
        )
    return save_model(model, folder / "model"), folder / "images.onnx", folder / "pixels.onnx"


def test_pixels_and_images_say_the_same():
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    images = of_pixels(every, HOW)
    assert (to_pixels(images, HOW) == every).all()
    mean, std = (np.array(values)[:, None, None] for values in (HOW.mean, HOW.std))
    np.testing.assert_allclose(images, ((every / 255).transpose(0, 3, 1, 2) - mean) / std, atol=1e-6)
    noise = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    step = 1 / 255 / min(HOW.std)
    inside = np.abs(noise) < 1.5
    assert np.abs(representable(noise, HOW) - noise)[inside].max() <= step / 2 + 1e-6


def test_the_graph_does_the_preprocessing_itself(files):
    _, takes_images, takes = files
    given = drawn(5)
    with opened("ort-cpu", takes_images) as expected, opened("ort-cpu", takes) as got:
        want = expected(of_pixels(given, HOW))
        np.testing.assert_allclose(got(of_pixels(given, HOW)), want, atol=1e-5)
    import onnxruntime as ort

    session = ort.InferenceSession(takes, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    assert (entry.name, entry.type, entry.shape) == ("image", "tensor(uint8)", ["batch", 32, 32, 3])
    np.testing.assert_allclose(session.run(["logits"], {"image": given})[0], want, atol=1e-5)


def test_it_is_undone_exactly(files):
    _, takes_images, takes = files
    plain = onnx.load(takes_images)
    back = without_pixels(onnx.load(takes), HOW)
    assert back.graph.node == plain.graph.node
    assert {t.name: t.raw_data for t in back.graph.initializer} == {t.name: t.raw_data for t in plain.graph.initializer}
    assert not takes_pixels(back)
    assert without_pixels(plain, HOW) is plain
    foreign = onnx.load(takes)
    for node in foreign.graph.node:
        node.name = node.name.replace(pixels.OWN, "other.")
    with pytest.raises(ArtifactError, match="is not slimvit's"):
        without_pixels(foreign, HOW)


@pytest.mark.parametrize("name", ["fp16", "int8-dynamic", "int8-qdq", "int4"])
def test_every_precision_keeps_taking_pixels(files, tmp_path, name):
    folder, _, takes = files
    images = of_pixels(drawn(32, 1), HOW)
    stage = Convert(name, tmp_path / "x.onnx", images, of_pixels(drawn(16, 2), HOW), real_images=False)
    made = run_stage(stage, OnnxFile(takes))
    model = onnx.load(made.artifact.path)
    assert takes_pixels(model)
    assert [node.op_type for node in model.graph.node[:4]] == ["Cast", "Mul", "Add", "Transpose"]
    assert parity_of(folder, made.artifact.path, "none").rung.verdict == "pass"


def test_a_model_folder_and_its_file_of_pixels_are_one_model(files):
    folder, takes_images, takes = files
    for a, b in ((folder, takes), (takes, folder), (takes_images, takes)):
        rung = parity_of(a, b, "none").rung
        assert (rung.verdict, rung.reason) == ("pass", "")


def test_a_wrong_mean_in_the_graph_is_another_model(files, tmp_path):
    folder, _, takes = files
    model = onnx.load(takes)
    shift = next(t for t in model.graph.initializer if t.name == f"{pixels.OWN}shift")
    shift.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(shift) + np.float32(0.1), shift.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    assert parity_of(folder, tmp_path / "wrong.onnx", "none").rung.verdict == "fail"
