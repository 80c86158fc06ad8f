"""Four bits on disk: the file holds the codes of its simulation, and once opened it is the int8 file of the same codes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from builders import STRUCTURES, randomise, shallow
from onnx import TensorProto, numpy_helper
from sweeps import swept
from torch import nn

from toolchain.errors import ArtifactError, TargetUnavailable
from toolchain.export.agreement import blobs
from toolchain.export.convert import rounding_rung, weights_rung
from toolchain.export.gptq import gptq
from toolchain.export.int4 import attended, int4, second_moments
from toolchain.export.loss import Yardstick, layer_of
from toolchain.export.onnx_graph import export_onnx, linear_nodes
from toolchain.export.precision import PRECISIONS, runs_on
from toolchain.export.quantise import int8_dynamic
from toolchain.export.weights import each_linear
from toolchain.targets import TARGETS, get_target

SIZE = (3, 16, 16)
TOLERANCE = PRECISIONS["int4"].tolerance
pytestmark = pytest.mark.skipif(
    PRECISIONS["int4"].product not in get_target("ort-cpu").loads, reason="this onnxruntime casts no int4"
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The fp32 graph of a ViT of two blocks with odd widths, everything random."""
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 45, "depth": 2, "num_heads": 3, "num_classes": 10}
    path = tmp_path_factory.mktemp("int4") / "fp32.onnx"
    model = randomise(timm.create_model("vit_tiny_patch16_224", **options))
    export_onnx(model, path, input_size=SIZE, opset=20, metadata={}, simplify=True)
    return onnx.load(path)


@pytest.fixture
def made(dense):
    return int4(dense, blobs(SIZE, 64))


def tensors(model):
    return {tensor.name: tensor for tensor in model.graph.initializer}


def fours(model):
    return [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT4]


def rounded(made, model):
    """The linears of an fp32 graph that have four bits in the file."""
    return [linear for linear in list(each_linear(model))[:-1] if linear.name not in made.left]


@pytest.mark.slow
def test_every_code_of_the_file_is_that_of_the_simulation(made):
    stored = tensors(made.model)
    found = [(numpy_helper.to_array(each).astype(np.int64), each.name) for each in fours(made.model)]
    for (codes, name), linear in zip(found, rounded(made, made.reference), strict=True):
        scales = numpy_helper.to_array(stored[f"{name.removesuffix('_quantized')}_scale"])
        np.testing.assert_array_equal(codes.astype(np.float32) * scales, linear.weight[:-1].astype(np.float32))
        assert np.abs(codes).max() <= 7
    assert len(found) == 6, "all but the head, and what reads attention"
    assert weights_rung(made.reference, made.model, "file", TOLERANCE).verdict == "pass"


def as_int8(model):
    """The same file with every cast of a stored tensor worked out beforehand."""
    plain, stored = onnx.ModelProto(), tensors(model)
    plain.CopyFrom(model)
    kinds = {TensorProto.INT8: np.int8, TensorProto.FLOAT: np.float32}
    del plain.graph.node[:]
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in stored:
            values = numpy_helper.to_array(stored[node.input[0]]).astype(kinds[node.attribute[0].i])
            plain.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
        else:
            plain.graph.node.append(node)
    return plain


def opened(model, path):
    """(what a session makes of a graph, its outputs on a few images)."""
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.intra_op_num_threads, options.log_severity_level = str(path), 1, 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {"image": blobs(SIZE, 5)})
    return onnx.load(path), outputs


def test_once_opened_it_is_the_int8_file_of_the_same_codes(made, dense, tmp_path):
    ours, logits = opened(made.model, tmp_path / "ours.onnx")
    theirs, expected = opened(as_int8(made.model), tmp_path / "theirs.onnx")
    np.testing.assert_array_equal(logits, expected)
    nodes = Counter(node.op_type for node in ours.graph.node)
    assert nodes == Counter(node.op_type for node in theirs.graph.node)
    assert (nodes["DynamicQuantizeMatMul"], nodes["Cast"]) == (8, 0)
    dynamic, _ = opened(int8_dynamic(dense, blobs(SIZE, 1)).model, tmp_path / "dynamic.onnx")
    assert nodes == Counter(node.op_type for node in dynamic.graph.node), "what an int8-dynamic file runs"


def test_openvino_computes_what_ort_cpu_does(made, tmp_path):
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'slimvit[openvino]'")
    onnx.save(made.model, tmp_path / "int4.onnx")
    outputs = []
    for name in ("ort-cpu", "openvino-cpu"):
        with get_target(name).open(tmp_path / "int4.onnx", 1) as runner:
            outputs.append(runner.infer({"image": blobs(SIZE, 5)})["logits"])
    np.testing.assert_allclose(outputs[1], outputs[0], atol=0.02 * np.ptp(outputs[0]))


def test_all_else_is_stored_in_half_the_bytes(made, dense):
    kinds = Counter(each.data_type for each in made.model.graph.initializer if np.prod(each.dims) >= 64)
    scales = sum(name.endswith("_scale") and np.prod(each.dims) >= 64 for name, each in tensors(made.model).items())
    assert kinds[TensorProto.FLOAT] == scales, "scales alone are fp32"
    assert tensors(made.model)["pos_embed"].data_type == TensorProto.FLOAT16
    assert len(fours(made.model)[0].raw_data) == -(-45 * 135 // 2), "two codes a byte"
    linear_bytes = 4 * sum(each.weight[:-1].size for each in rounded(made, dense))
    assert sum(len(each.raw_data) for each in fours(made.model)) <= linear_bytes / 8 + 8


@pytest.mark.parametrize(("scale", "kept"), [(1.0, False), (1e8, True), (1e-5, True)])
def test_what_fp16_cannot_hold_stays_as_it_is(dense, scale, kept):
    """Kind: a tensor whose numbers are cut off, or so small that fp16 has no digits left for them."""
    changed, values = onnx.ModelProto(), numpy_helper.to_array(tensors(dense)["pos_embed"]) * np.float32(scale)
    changed.CopyFrom(dense)
    tensors(changed)["pos_embed"].CopyFrom(numpy_helper.from_array(values, "pos_embed"))
    stored = tensors(int4(changed, blobs(SIZE, 4)).model)["pos_embed"]
    np.testing.assert_array_equal(numpy_helper.to_array(stored), values if kept else values.astype(np.float16))
    assert stored.data_type == (TensorProto.FLOAT if kept else TensorProto.FLOAT16)


def linear_alone():
    """A graph whose input [n, 2, 3] is what its linear reads."""
    weight = numpy_helper.from_array(np.eye(3, dtype=np.float32), "w")
    image, out = (onnx.helper.make_tensor_value_info(name, 1, ["n", 2, 3]) for name in ("image", "y"))
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["image", "w"], ["y"])], "g", [image], [out], [weight]
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)


def test_moments_are_those_of_what_a_linear_reads():
    """In two calls."""
    rows = np.random.default_rng(0).standard_normal((40, 2, 3)).astype(np.float32) + 2
    ended = np.hstack([rows.reshape(-1, 3), np.ones((80, 1))])
    np.testing.assert_allclose(
        second_moments(linear_alone(), ["image"], rows)["image"], ended.T @ ended / 80, rtol=1e-5
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_moments_that_are_not_finite_are_an_error_with_a_name(value):
    rows = np.ones((40, 2, 3), np.float32)
    rows[35, 1, 2] = value
    with pytest.raises(ArtifactError, match=r"squares of image .* are not finite"):
        second_moments(linear_alone(), ["image"], rows)


def test_it_brings_an_older_graph_to_the_opset_that_casts_int4(made):
    assert [entry.version for entry in made.model.opset_import if entry.domain == ""] == [21]
    onnx.checker.check_model(made.model, full_check=True)


def test_biases_take_up_what_rounding_does_on_average(made, dense):
    for before, after in zip(rounded(made, dense), rounded(made, made.reference), strict=True):
        mean = made.moments[after.name][-1]  # [in + 1], its last is 1
        np.testing.assert_allclose(mean @ (after.weight - before.weight), 0, atol=1e-4)
        assert not np.array_equal(before.weight[-1], after.weight[-1])


@pytest.mark.slow
def test_what_reads_a_constant_is_rounded_as_well(tmp_path):
    """The query of an attention pool: it varies by nothing but the rounding of sums."""
    path = tmp_path / "fp32.onnx"
    model = shallow("attention pool")
    export_onnx(model.module, path, input_size=model.preprocess.input_size, opset=20, metadata={}, simplify=True)
    pooled = onnx.load(path)
    assert rung(int4(pooled, blobs(model.preprocess.input_size, 40)), pooled).verdict == "pass"


def rung(made, dense):
    return rounding_rung(dense, made.reference, made.moments, TOLERANCE)


def rounded_to_the_nearest_of_half_as_many(made):
    for tensor in made.reference.graph.initializer:
        if tensor.name == linear_nodes(made.reference)[2].input[1]:
            values = numpy_helper.to_array(tensor)
            step = np.abs(values).max() / 3
            tensor.CopyFrom(numpy_helper.from_array((np.rint(values / step) * step).astype(np.float32), tensor.name))


def one_never_rounded_for_anything(made):
    made.moments["blocks.9"] = next(iter(made.moments.values()))


def not_a_number(made):
    tensors(made.reference)["blocks.0.mlp.fc1.bias"].CopyFrom(
        numpy_helper.from_array(np.full(180, np.nan, np.float32), "blocks.0.mlp.fc1.bias")
    )


@pytest.mark.parametrize(
    "plant", [rounded_to_the_nearest_of_half_as_many, one_never_rounded_for_anything, not_a_number]
)
def test_a_linear_that_is_worse_than_rounded_to_the_nearest_breaks_the_rung(made, dense, plant: Callable):
    assert rung(made, dense).verdict == "pass"
    plant(made)
    broken = rung(made, dense)
    assert broken.verdict == "fail"
    assert "times as far off as by rounding to the nearest" in broken.reason


def test_a_single_code_that_is_another_breaks_the_rung_of_weights(made):
    tensor = fours(made.model)[3]
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]
    broken = weights_rung(made.reference, made.model, "file", TOLERANCE)
    assert (broken.verdict, "2 times as far off as its type rounds" in broken.reason) == ("fail", True)


CASES = ("classic", "EVA-02 base", "Swin", "attention pool", "average pooling")


@pytest.mark.parametrize("case", swept([case for case in CASES if case in STRUCTURES], {"classic"}))
def test_linears_that_read_attention_are_found_in_every_family(case, tmp_path):
    model, path = shallow(case), tmp_path / "fp32.onnx"
    export_onnx(model.module, path, input_size=model.preprocess.input_size, opset=20, metadata={}, simplify=True)
    graph = onnx.load(path)
    owners = [name for name, _ in model.module.named_modules() if name.endswith(("attn.proj", "attn_pool.proj"))]
    assert {layer_of(graph, name) for name in attended(graph)} == set(owners)


@pytest.mark.slow
def test_both_halves_of_a_linear_that_is_split_read_attention(tmp_path):
    model, path = shallow("classic"), tmp_path / "fp32.onnx"
    attention = model.module.blocks[0].attn
    attention.proj = nn.Sequential(nn.Linear(48, 8, bias=False), nn.Linear(8, 48))
    export_onnx(model.module, path, input_size=model.preprocess.input_size, opset=20, metadata={}, simplify=True)
    graph = onnx.load(path)
    read = [node.input[1] for node in linear_nodes(graph) if node.name in attended(graph)]
    shapes = [tuple(tensors(graph)[weight].dims) for weight in read]
    assert [{*shape} for shape in shapes] == 2 * [{8, 48}]


def test_linears_that_read_attention_keep_eight_bits_and_less_is_lost(made, dense):
    assert sorted(layer_of(dense, name) for name in made.left) == ["blocks.0.attn.proj", "blocks.1.attn.proj"]
    eights = [
        each for each in made.model.graph.initializer if each.data_type == TensorProto.INT8 and len(each.dims) == 2
    ]
    assert len(eights) == len(made.left)
    images = blobs(SIZE, 64)
    yardstick = Yardstick.of(dense, images)
    codes = {
        linear.name: gptq(linear.weight[:-1], np.eye(45)) for linear in each_linear(dense) if linear.name in made.left
    }
    plain = onnx.ModelProto()
    plain.CopyFrom(made.reference)
    nodes = {node.name: node for node in plain.graph.node}
    for name, each in codes.items():
        node = nodes[name]
        tensor = tensors(plain)[node.input[1]]
        turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        tensor.CopyFrom(numpy_helper.from_array(each.weight.T if turned else each.weight, tensor.name))
    assert yardstick.lost(made.model) < yardstick.lost(plain)


def test_linears_that_share_a_weight_are_refused(dense):
    shared = onnx.ModelProto()
    shared.CopyFrom(dense)
    first, second = (linear_nodes(shared)[index] for index in (2, 6))
    assert first.op_type == second.op_type
    second.input[1] = first.input[1]
    with pytest.raises(ArtifactError, match="several linears share"):
        int4(shared, blobs(SIZE, 4))


def test_where_no_runtime_casts_int4_the_reason_is_said(register):
    for name in ("ort-cpu", "ort-web", "openvino-cpu"):
        older = copy.copy(TARGETS[name])
        older.loads = ("FLOAT",)
        register(TARGETS, older)
    with pytest.raises(TargetUnavailable, match=r"nothing here runs int4: .* it needs onnxruntime 1\.23 or newer"):
        runs_on(PRECISIONS["int4"])
