"""Files of every structure, half of it left, and their interpreter: the file's numbers, traceable, and nothing guessed."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from builders import STRUCTURES, images, random_plan, shallow, with_random_factors
from onnx import TensorProto, helper, numpy_helper
from sweeps import swept
from torch.nn import functional

from toolchain.errors import ArtifactError, StorageError
from toolchain.export.calls import torch_call
from toolchain.export.onnx_graph import export_onnx
from toolchain.interpreter import module_of, traced
from toolchain.model import run_stage
from toolchain.on_device.runner import OrtRunner
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split

UNKNOWN_AT_EXPORT = {"Sin", "Cos", "Range", "If", "Loop"}
"""What positions, masks and sizes would be computed with, if they were no constants of the file."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Structure → (path of the ONNX file of half of it, images [3, C, H, W], what it gives for them)."""
    folder = tmp_path_factory.mktemp("interpreter")

    @cache
    def export(case, simplify=True):
        model, path = shallow(case), folder / f"{len(list(folder.iterdir()))}.onnx"
        masked = with_random_factors(model, random_plan(model))
        module = run_stage(Split(), run_stage(Slice(), masked).artifact).artifact.module
        size, names = model.preprocess.input_size, model.output_names
        export_onnx(module, path, input_size=size, opset=20, metadata={}, simplify=simplify, outputs=names)
        batch = images(model)
        return path, batch, torch_call(module)(batch.numpy())

    return export


def in_onnxruntime(path, batch):
    with OrtRunner(str(path), 1) as runner:
        return [*runner.infer({onnx.load(path).graph.input[0].name: batch.numpy()}).values()]


def require_close(found, expected, bound=1e-5):
    found = found if isinstance(found, tuple) else (found,)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        scale = max(1.0, float(np.abs(theirs).max()))
        assert float(np.abs(np.asarray(mine) - theirs).max()) <= bound * scale


@pytest.mark.matrix
@pytest.mark.parametrize("case", swept(STRUCTURES, ["NaFlex gated", "hybrid"]))
def test_the_file_of_every_structure_is_the_model_and_is_understood_at_any_batch(case, exported):
    path, batch, expected = exported(case)
    module = module_of(path)
    for count in (1, 3):
        found = in_onnxruntime(path, batch[:count])
        require_close(tuple(found), [expected[:count]], 1e-4)
        require_close(module(batch[:count]), found)
    assert not UNKNOWN_AT_EXPORT & {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("case", swept(["classic", "Swin", "differential", "hybrid"], ["classic", "hybrid"]))
def test_it_can_be_traced_and_its_products_with_weights_are_linears(case, exported):
    path, batch, _ = exported(case, simplify=False)
    program = torch.export.export(module_of(path), (batch,))
    require_close(program.module()(batch), in_onnxruntime(path, batch))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    graph = onnx.load(path).graph
    matrices = {each.name for each in graph.initializer if len(each.dims) == 2}
    products = sum(node.op_type in ("MatMul", "Gemm") and node.input[1] in matrices for node in graph.node)
    assert called.count("aten.linear.default") == products > 0
    biased = sum("linear" in str(node.target) and len(node.args) == 3 for node in program.graph.nodes)
    assert biased > 0


# Nothing is guessed


def graph_of(*nodes, constants=(), inputs=("x",), outputs=("y",), domain=""):
    """A model of some nodes over float inputs of any shape."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in dict(constants).items()],
    )
    imports = [helper.make_opsetid("", 20), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (helper.make_node("NonZero", ["x"], ["y"], name="which"), "'which' is a NonZero"),
        (helper.make_node("Gelu", ["x"], ["y"], name="fast", domain="com.microsoft"), "com.microsoft.Gelu"),
    ],
)
def test_an_operator_that_is_not_understood_is_refused_by_name(node, words):
    with pytest.raises(ArtifactError, match=words):
        module_of(graph_of(node, domain=node.domain))


@pytest.mark.parametrize(
    ("operator", "attributes"),
    [
        ("Pad", {"mode": "reflect"}),
        ("MaxPool", {"kernel_shape": [2, 2], "ceil_mode": 1}),
        ("MaxPool", {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}),
    ],
)
def test_an_attribute_that_is_not_understood_is_refused_by_its_node(operator, attributes):
    inputs = ["x", "pads"] if operator == "Pad" else ["x"]
    pads = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
    module = module_of(graph_of(helper.make_node(operator, inputs, ["y"], name="odd", **attributes), constants=pads))
    with pytest.raises(ArtifactError, match=r"'odd'.*(not|alone is) understood"):
        module(torch.zeros(1, 1, 4, 4))


def test_a_shape_that_depends_on_the_image_is_refused():
    nodes = [
        helper.make_node("Cast", ["x"], ["sizes"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["x", "sizes"], ["y"], name="odd"),
    ]
    with pytest.raises(ArtifactError, match=r"'odd'.*depend on what the image shows"):
        module_of(graph_of(*nodes))(torch.ones(2))


@pytest.mark.parametrize("opset", [11, 12])
def test_an_opset_in_which_operators_mean_something_else_is_refused(opset):
    """Kind: a file of an old exporter, whose Softmax over axis 1 is one over all axes from there on."""
    model = graph_of(helper.make_node("Softmax", ["x"], ["y"], axis=1))
    assert module_of(model)(torch.zeros(1, 2, 4))[0, 0, 0] == 0.5
    model.opset_import[0].version = opset
    with pytest.raises(ArtifactError, match=rf"opset {opset}.*understands 13 and later ones.*version_converter"):
        module_of(model)


def test_a_second_output_that_is_read_is_refused_and_one_that_is_not_is_let_be():
    """Kind: a LayerNormalization whose mean is read, of which a converter ended in a KeyError."""
    nodes = [
        helper.make_node("LayerNormalization", ["x", "s"], ["n", "mean"], name="norm"),
        helper.make_node("Neg", ["n"], ["y"]),
    ]
    constants = {"s": np.ones(4, np.float32)}
    assert module_of(graph_of(*nodes, constants=constants))(torch.eye(4)).shape == (4, 4)
    nodes[1] = helper.make_node("Sub", ["n", "mean"], ["y"])
    with pytest.raises(ArtifactError, match="'mean' is an output beside the first of its node"):
        module_of(graph_of(*nodes, constants=constants))(torch.eye(4))


def test_what_torch_raises_of_a_graph_is_an_error_of_its_file():
    with pytest.raises(ArtifactError, match=r"torch cannot export m\.onnx: of sizes 3 and 4"), traced(Path("m.onnx")):
        raise RuntimeError("torch goes on for pages\nof sizes 3 and 4")
    with pytest.raises(StorageError, match="full"), traced(Path("m.onnx")):
        raise StorageError("full")


def test_what_is_no_onnx_file_is_said(tmp_path):
    with pytest.raises(StorageError, match="cannot read"):
        module_of(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_bytes(b"this is no model")
    with pytest.raises(ArtifactError, match="no ONNX model"):
        module_of(tmp_path / "text.onnx")


# Linears


def test_one_square_weight_may_be_read_in_both_ways():
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Gemm", ["a", "w"], ["b"], transB=1),
        helper.make_node("Mul", ["b", "w"], ["y"]),
    ]
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    found = module_of(graph_of(*nodes, constants={"w": weight.numpy()}))(x)
    assert torch.allclose(found, (x @ weight @ weight.T) * weight, atol=1e-6)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        # the product is read twice
        ([("Add", ["p", "b"], ["s"]), ("Mul", ["s", "p"], ["y"])], lambda p, b: (p + b) * p),
        # what is added is no vector
        ([("Add", ["p", "m"], ["y"])], lambda p, b: p + torch.ones(2, 3)),
        # what is added is first
        ([("Add", ["b", "p"], ["y"])], lambda p, b: p + b),
        # a bias is subtracted
        ([("Sub", ["p", "b"], ["y"])], lambda p, b: p - b),
    ],
)
def test_a_bias_goes_into_a_linear_only_where_that_is_the_same(nodes, expected):
    weight, bias = torch.randn(3, 3), torch.randn(3)
    constants = {"w": weight.numpy(), "b": bias.numpy(), "m": np.ones((2, 3), np.float32)}
    rest = [helper.make_node(*node) for node in nodes]
    module = module_of(graph_of(helper.make_node("MatMul", ["x", "w"], ["p"]), *rest, constants=constants))
    x = torch.randn(2, 3)
    assert torch.allclose(module(x), expected(functional.linear(x, weight.T), bias), atol=1e-6)


def test_names_and_order_are_those_of_the_file():
    nodes = [helper.make_node("Sub", ["first", "second"], ["late"]), helper.make_node("Neg", ["late"], ["early"])]
    module = module_of(graph_of(*nodes, inputs=("second", "first"), outputs=("early", "late")))
    assert (module.input_names, module.output_names) == (("second", "first"), ("early", "late"))
    early, late = module(torch.tensor([1.0]), torch.tensor([5.0]))
    assert (early.item(), late.item()) == (-4.0, 4.0)


def test_a_single_known_index_is_no_lookup():
    """Kind: a class token that is looked up: a converter then meets conditions on an index that everybody knows."""
    index = {"last": np.array(-1)}
    module = module_of(graph_of(helper.make_node("Gather", ["x", "last"], ["y"], axis=1), constants=index))
    pictures = torch.randn(2, 3, 4)
    assert torch.equal(module(pictures), pictures[:, -1])
    called = [
        str(node.target) for node in torch.export.export(module, (pictures,)).graph.nodes if node.op == "call_function"
    ]
    assert called == ["aten.select.int"]
    rows = module_of(graph_of(helper.make_node("Gather", ["x", "rows"], ["y"], axis=1), constants={"rows": [[-1, 0]]}))
    assert torch.equal(rows(pictures), pictures[:, [[-1, 0]]])


def test_a_graph_knows_which_parameter_a_matrix_became():
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    module = module_of(graph_of(helper.make_node("MatMul", ["x", "a.weight"], ["y"]), constants={"a.weight": weight}))
    ((attribute, name),) = module.stored.items()
    assert name == "a.weight"
    np.testing.assert_array_equal(getattr(module, attribute).numpy(), weight.T)
