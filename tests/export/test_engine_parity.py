"""An engine against its file: what is asked of engines that take few images at once."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from toolchain.artifacts.onnx_file import PRECISION, OnnxFile
from toolchain.export.engine_parity import engine_rung
from toolchain.outputs import OUTPUT
from toolchain.targets import EngineBuild


@pytest.mark.parametrize(("output", "width", "stored"), [("regression", 1, np.float32), ("features", 6, np.float16)])
def test_an_engine_of_single_images_is_held_to_its_file_on_several(tmp_path, output, width, stored):
    """Kind: of one image no output differs between images, so that every engine of such a batch failed."""
    rng, path = np.random.default_rng(0), tmp_path / "m.onnx"
    weight = numpy_helper.from_array(rng.standard_normal((12, width)).astype(stored), "stored")
    nodes = [
        helper.make_node("Cast", ["stored"], ["weight"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["out"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 2, 2])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", width])
    model = helper.make_model(helper.make_graph(nodes, "g", [image], [out], [weight]))
    helper.set_model_props(model, {OUTPUT: output, PRECISION: "fp32" if stored is np.float32 else "fp16"})
    onnx.save(model, path)
    built = EngineBuild(path, {"target": "ort-cpu", "batches": [1]})
    images = rng.standard_normal((5, 3, 2, 2)).astype(np.float32)
    found = engine_rung(OnnxFile(path), built, (1, 1, 1), lambda count: images[:count], None)
    assert (found.verdict, found.reason) == ("pass", "")


@pytest.mark.parametrize("wrong", ["", "first", "second", "none"])
def test_every_output_of_a_file_of_others_is_held_and_found_by_its_name(tmp_path, wrong):
    """Kind: an image tower that gives an embedding and its tokens, of which the first alone was compared."""
    rng, weight = np.random.default_rng(0), np.random.default_rng(1).standard_normal((12, 6)).astype(np.float32)

    def written(path, names, changed=""):
        stored = {name: weight + (rng.standard_normal(weight.shape) if name == changed else 0) for name in names}
        constants = [numpy_helper.from_array(values.astype(np.float32), f"{name}.w") for name, values in stored.items()]
        nodes = [helper.make_node("Flatten", ["image"], ["flat"])]
        nodes += [helper.make_node("MatMul", ["flat", f"{name}.w"], [name]) for name in names]
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 2, 2])
        outs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 6]) for name in names]
        onnx.save(helper.make_model(helper.make_graph(nodes, "g", [image], outs, constants)), path)
        return path

    source = written(tmp_path / "a.onnx", ["second", "first"])
    engine = written(tmp_path / "b.onnx", ["first", *(["second"] if wrong != "none" else [])], wrong)
    images = rng.standard_normal((5, 3, 2, 2)).astype(np.float32)
    built = EngineBuild(engine, {"target": "ort-cpu"})
    found = engine_rung(OnnxFile(source), built, (1, 1, 3), lambda count: images[:count], None)
    assert found.verdict == ("fail" if wrong else "pass"), found.reason
