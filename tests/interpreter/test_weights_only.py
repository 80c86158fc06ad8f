"""An int8-dynamic graph with its activations as they are: the same integers, and floats between them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from builders import dense_model
from onnx import numpy_helper

from toolchain.errors import ArtifactError
from toolchain.export.onnx_graph import export_onnx
from toolchain.export.quantise import int8_dynamic
from toolchain.export.weights import linears
from toolchain.interpreter import module_of, weights_only


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(the fp32 graph, its int8-dynamic graph)."""
    path = tmp_path_factory.mktemp("weights-only") / "m.onnx"
    export_onnx(dense_model().module, path, input_size=(3, 32, 32), opset=20, metadata={}, simplify=True)
    whole = onnx.load(path)
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    return whole, int8_dynamic(whole, images).model


def test_it_computes_with_the_weights_of_the_file_and_rounds_nothing_else(files):
    """Kind: a weight by the scale of another, or a bias that is lost: the fp32 file with these very weights gives the same."""
    whole, int8 = files
    module = module_of(weights_only(int8))
    expected = onnx.ModelProto()
    expected.CopyFrom(whole)
    names = {each.name: each.name.removesuffix("_quant").removesuffix("_MatMul") for each in linears(int8)}
    weights = {names[each.name]: each.weight[:-1] for each in linears(int8)}
    replaced = 0
    stored = {each.name: each for each in expected.graph.initializer}
    for node in expected.graph.node:
        if node.op_type in ("Gemm", "MatMul") and node.input[1] in stored and node.name in weights:
            turned = any(each.name == "transB" and each.i for each in node.attribute)
            weight = weights[node.name].T if turned else weights[node.name]
            replaced += 1
            stored[node.input[1]].CopyFrom(numpy_helper.from_array(weight.astype(np.float32), node.input[1]))
    assert replaced == 9
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    got, wanted, unrounded = module(images), module_of(expected)(images), module_of(whole)(images)
    scale = float(wanted.abs().max())
    assert float((got - wanted).abs().max()) <= 1e-5 * scale
    assert float((got - unrounded).abs().max()) > 1e-4 * scale, "the weights were rounded"


def test_codes_times_scales_are_the_parameters(files):
    _, int8 = files
    module = module_of(weights_only(int8))
    assert len(module.codes) == 8
    for name, (codes, scale) in module.codes.items():
        assert codes.dtype == np.int8
        np.testing.assert_allclose(getattr(module, name).numpy(), codes * scale[:, None], rtol=1e-6)


def test_a_graph_without_products_of_integers_is_given_back(files):
    whole, int8 = files
    assert weights_only(whole) is whole
    before = int8.SerializeToString()
    weights_only(int8)
    assert int8.SerializeToString() == before, "what is given is not changed"


@pytest.mark.parametrize("op", ["Cast", "Mul"])
def test_a_product_of_integers_among_other_nodes_is_refused(op, files):
    damaged = onnx.ModelProto()
    damaged.CopyFrom(files[1])
    integer = next(node for node in damaged.graph.node if node.op_type == "MatMulInteger")
    after = next(node for node in damaged.graph.node if integer.output[0] in node.input)
    if op == "Mul":
        after = next(node for node in damaged.graph.node if after.output[0] in node.input)
    after.op_type = "Sqrt"
    with pytest.raises(ArtifactError, match=f"no {op} alone reads"):
        weights_only(damaged)
