"""Products are found, counted as `cost` counts them, and written into files in which a runtime does the same work."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from builders import dense_model, random_plan, variant
from onnx import TensorProto, helper, numpy_helper
from sweeps import swept

from toolchain.analysis.products import products, read_graph, write_products
from toolchain.cost import Widths, trace
from toolchain.errors import ArtifactError, RecipeError
from toolchain.export import onnx_graph
from toolchain.export.int4 import int4
from toolchain.export.onnx_graph import export_onnx
from toolchain.pipeline.latency_budget import variant_of
from toolchain.targets.products import own_inputs


def exported(module, path, size):
    """A file that computes every token, as cost counts them: a classifier's own leaves the last block's out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_graph, "selected_early", lambda model: model)
        export_onnx(module, path, input_size=size, opset=20, metadata={}, simplify=True)
    return path


def macs(path, batch=1):
    return sum(product.total_macs for product in products(read_graph(path, batch)))


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    return exported(dense_model().module, tmp_path_factory.mktemp("products") / "tiny.onnx", (3, 32, 32))


@pytest.mark.slow
@pytest.mark.parametrize("case", swept(["classic", "registers", "packed SwiGLU", "differential"], ["classic"]))
def test_multiply_accumulates_are_those_that_cost_counts(case, tmp_path):
    model = variant(case)
    size = model.preprocess.input_size
    path = exported(model.module, tmp_path / "m.onnx", size)
    assert macs(path) == trace(model.module, model.family, size).macs
    assert macs(path, batch=3) == 3 * macs(path)


@pytest.mark.slow
def test_a_compressed_model_has_the_products_that_are_left(tiny, tmp_path):
    deploy = variant_of(tiny, Widths.of(random_plan(tiny)))
    size = deploy.preprocess.input_size
    path = exported(deploy.module, tmp_path / "m.onnx", size)
    expected = trace(deploy.module, deploy.family, size).macs
    assert macs(path) == expected < trace(tiny.module, tiny.family, size).macs


def test_products_of_one_shape_are_one_kind(tiny_file):
    found = products(read_graph(tiny_file, 2))
    assert [product.total_macs for product in found] == sorted((p.total_macs for p in found), reverse=True)
    assert {str(p): p.count for p in found} == {
        "Conv 2×3×32×32 · 48×3×16×16": 1,
        "Gemm 10×48 · 48×144": 2,
        "Gemm 10×48 · 48×48": 2,
        "Gemm 10×48 · 48×192": 2,
        "Gemm 10×192 · 192×48": 2,
        "MatMul 2×3×5×16 · 2×3×16×5": 2,
        "MatMul 2×3×5×5 · 2×3×5×16": 2,
        "Gemm 2×48 · 7×48": 1,
    }
    nodes = onnx.load(tiny_file).graph.node
    assert sum(p.count for p in found) == sum(node.op_type in ("MatMul", "Gemm", "Conv") for node in nodes)


def test_a_file_of_products_computes_what_the_model_computes(tiny_file, tmp_path):
    """With the model's own weights: the head of the model, and the head alone on the model's own features."""
    graph = read_graph(tiny_file, 2)
    head = next(product for product in products(graph) if product.inputs[1] == (7, 48))
    node = next(node for node in graph.model.graph if node.outputs[0].name == head.nodes[0])
    whole = onnx.load(tiny_file)
    whole.graph.output.append(helper.make_tensor_value_info(node.inputs[0].name, TensorProto.FLOAT, [2, 48]))
    image = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    logits, features = ort.InferenceSession(whole.SerializeToString()).run(None, {"image": image})
    alone = ort.InferenceSession(write_products(graph, [head], tmp_path / "head.onnx"))
    (name,) = (value.name for value in alone.get_inputs())
    np.testing.assert_allclose(alone.run(None, {name: features})[0], logits, rtol=1e-5, atol=1e-6)


def optimised(path, folder):
    """Operator → how many of them ONNX Runtime runs for a file."""
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimised.onnx"), 3
    ort.InferenceSession(str(path), options)
    ops = [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]
    return {op: ops.count(op) for op in ops}


def test_no_product_is_optimised_away(tiny_file, tmp_path):
    """Products without weights are the danger: two of them on equal inputs would be one."""
    graph = read_graph(tiny_file, 2)
    ran = optimised(write_products(graph, products(graph), tmp_path / "all.onnx"), tmp_path)
    assert {op: ran[op] for op in ("Gemm", "MatMul", "Conv")} == {"Gemm": 9, "MatMul": 4, "Conv": 1}


def test_inputs_of_one_shape_share_memory_and_have_names_of_their_own(tiny_file, tmp_path):
    graph = read_graph(tiny_file, 2)
    attention = next(product for product in products(graph) if product.op == "MatMul")
    path = write_products(graph, [attention], tmp_path / "m.onnx")
    made, again = own_inputs(path), own_inputs(path)
    assert len(made) == 4
    assert len({array.ctypes.data for array in made.values()}) == 2
    assert all((made[name] == again[name]).all() for name in made)


@pytest.mark.parametrize("kind", ["dynamic", "static", "int4"])
def test_a_quantised_model_has_the_same_products_in_integers(kind, tiny_file, tmp_path):
    quantization = pytest.importorskip("onnxruntime.quantization")
    path = tmp_path / "int8.onnx"

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.left = [{"image": np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)}]

        def get_next(self):
            return self.left.pop() if self.left else None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "dynamic":
            quantization.quantize_dynamic(tiny_file, path, op_types_to_quantize=["MatMul", "Gemm"])
        elif kind == "int4":
            onnx.save(int4(onnx.load(tiny_file), Reader().left[0]["image"]).model, path)
        else:
            quantization.quantize_static(tiny_file, path, Reader(), op_types_to_quantize=["MatMul", "Gemm", "Conv"])
    graph = read_graph(path, 2)
    found = products(graph)
    assert sum(product.total_macs for product in found) == macs(tiny_file, batch=2)
    linears = [product for product in found if product.op not in ("Conv", "MatMul") and product.dtype != "float"]
    assert {product.dtype for product in linears} <= {"int8", "uint8"}
    ran = optimised(write_products(graph, linears, tmp_path / "linears.onnx"), tmp_path)
    integers = {"MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearMatMul", "DynamicQuantizeMatMul"}
    assert sum(count for op, count in ran.items() if op in integers) == sum(product.count for product in linears)
    assert sum(product.count for product in linears) == 9 - (kind == "int4"), "int4 leaves the head as it is"
    assert "Gemm" not in ran, "a float product here would be timed for an integer one"


def test_weights_beside_the_file_are_read(tiny_file, tmp_path):
    beside = tmp_path / "beside.onnx"
    onnx.save_model(onnx.load(tiny_file), beside, save_as_external_data=True, location="w", size_threshold=64)
    graph = read_graph(beside, 2)
    assert sum(p.total_macs for p in products(graph)) == macs(tiny_file, batch=2)
    written = [
        write_products(g, products(g), tmp_path / f"{g.path.stem}-all.onnx") for g in (graph, read_graph(tiny_file, 2))
    ]
    ours, theirs = ({t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer} for path in written)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def small(path, nodes, inputs, weights=()):
    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", io, [out], [numpy_helper.from_array(a, name) for name, a in weights])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_each_operator_is_counted_by_its_definition(tmp_path):
    ones = lambda *shape: np.ones(shape, np.float32)  # noqa: E731
    x = [("x", ["batch", 4])]
    gemm = small(
        tmp_path / "a", [helper.make_node("Gemm", ["w", "x"], ["y"], transA=1, transB=1)], x, [("w", ones(4, 5))]
    )
    gemm = gemm.rename(tmp_path / "a.onnx")
    assert macs(gemm, batch=3) == 5 * 3 * 4
    image = [("x", ["batch", 6, 8, 8])]
    conv = helper.make_node("Conv", ["x", "w"], ["y"], group=3, strides=[2, 2])
    conv = small(tmp_path / "b.onnx", [conv], image, [("w", ones(9, 2, 2, 2))])
    assert macs(conv, batch=2) == 2 * 9 * 4 * 4 * (2 * 2 * 2)
    batched = small(
        tmp_path / "c.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [("x", ["b", 2, 3, 4])],
        [("w", ones(4, 5))],
    )
    assert macs(batched, batch=7) == 7 * 2 * 3 * 4 * 5


def test_what_is_not_counted_is_refused_and_not_left_out(tmp_path):
    einsum = helper.make_node("Einsum", ["x", "x"], ["y"], equation="bi,bj->bij")
    path = small(tmp_path / "m.onnx", [einsum], [("x", ["batch", 4])])
    with pytest.raises(RecipeError, match=r"Einsum ×1, whose products are not counted"):
        macs(path)


def test_a_shape_that_is_unknown_is_refused(tmp_path):
    nodes = [helper.make_node("NonZero", ["x"], ["n"]), helper.make_node("Cast", ["n"], ["f"], to=TensorProto.FLOAT)]
    nodes.append(helper.make_node("MatMul", ["w", "f"], ["y"]))
    path = small(tmp_path / "m.onnx", nodes, [("x", ["batch", 4])], [("w", np.ones((3, 2), np.float32))])
    with pytest.raises(ArtifactError, match=r"shape of '\w+' cannot be inferred"):
        macs(path)
