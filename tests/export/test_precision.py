"""Precisions on a small ViT with a low-rank pair: what is written is run, and every planted fault has its rung."""

from __future__ import annotations

import copy
import itertools
from collections import Counter, OrderedDict
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from builders import STRUCTURES, randomise, variant
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from sweeps import swept
from torch import nn

from toolchain.artifacts import open_artifact
from toolchain.artifacts.onnx_file import PRECISION, OnnxFile
from toolchain.errors import ArtifactError, ParityError, RecipeError, TargetUnavailable
from toolchain.export import precision, smooth
from toolchain.export.convert import Convert
from toolchain.export.engine import BuildEngine
from toolchain.export.observe import largest_channels
from toolchain.export.onnx_graph import export_onnx, linear_nodes
from toolchain.export.precision import PRECISIONS
from toolchain.export.precisions import MADE_FOR_NOISE
from toolchain.export.weights import each_linear, largest_error
from toolchain.model import run_stage
from toolchain.recipe import EngineSection
from toolchain.targets import get_target
from toolchain.targets.tensorrt import network as trt_network

SIZE = (3, 32, 32)
INT8 = ("int8-dynamic", "int8-qdq")
INTEGERS = (*INT8, "int4")


def images(count, seed, size=SIZE):
    """Blobs of different size and colour: noise alone looks the same to a ViT."""
    rng = np.random.default_rng(seed)
    channels, height, width = size
    blobs = np.kron(rng.standard_normal((count, channels, -(-height // 8), -(-width // 8))), np.ones((1, 1, 8, 8)))
    return blobs[..., :height, :width].astype(np.float32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The fp32 file of a ViT of two blocks, everything random; blocks.0.attn.qkv is a low-rank pair."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=64, depth=2, num_heads=2, num_classes=10)
    pair = {"down": nn.Linear(64, 8, bias=False), "up": nn.Linear(8, 192)}
    model.blocks[0].attn.qkv = nn.Sequential(OrderedDict(pair))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            if "norm" in name and name.endswith("weight"):
                parameter[::16] *= 8  # a few channels are much larger, as in trained ViTs
        model.head.weight.mul_(50)
    path = tmp_path_factory.mktemp("source") / "compressed.fp32.onnx"
    export_onnx(model, path, input_size=SIZE, opset=20, metadata={"slimvit.model": "tiny"}, simplify=True)
    return OnnxFile(path)


def converting(source, folder):
    def run(name, **changes):
        stage = Convert(name, folder / f"{name}.onnx", images(64, 1), images(32, 2), real_images=False)
        return run_stage(replace(stage, **changes), source)

    return run


@pytest.fixture
def convert(source, tmp_path):
    return converting(source, tmp_path)


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """Precision → what the stage made, for tests that only read it."""
    return cache(converting(source, tmp_path_factory.mktemp("converted")))


@pytest.fixture(scope="module")
def graphs(source):
    """Precision → what it makes of the graph."""
    return cache(lambda name: PRECISIONS[name].convert(onnx.load(source.path), images(64, 1)))


def skip_unless_it_runs(name):
    try:
        precision.runs_on(PRECISIONS[name])
    except TargetUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_file_of_another_precision_is_the_model(converted, source, name):
    skip_unless_it_runs(name)
    made = converted(name)
    assert [rung.verdict for rung in made.rungs] == ["pass"] * len(made.rungs)
    model = onnx.load(made.artifact.path)
    assert {entry.key: entry.value for entry in model.metadata_props} == {"slimvit.model": "tiny", PRECISION: name}
    assert made.facts.graph.size_bytes < 0.7 * source.path.stat().st_size, "the patch embedding may stay in fp32"
    with get_target(made.facts.target).open(made.artifact.path, 1) as runner:
        for batch in (1, 2, 5):
            assert runner.infer({"image": images(batch, 3)})["logits"].shape == (batch, 10)
    kinds = [linear.kind for linear in each_linear(model)]
    assert len(kinds) == len([*each_linear(onnx.load(source.path))]) == 10, (
        "two blocks of four, the low-rank pair, the head"
    )
    finer = {TensorProto.INT8} if name == "int4" else set()  # of the linears that read attention
    assert set(kinds[:-1]) == PRECISIONS[name].weight_types | finer
    if name in INT8:
        assert kinds[-1] == TensorProto.FLOAT, "the head stays as it is"
    if name == "int4":
        assert kinds[-1] == TensorProto.FLOAT16, "the head is stored in half"


@pytest.mark.parametrize("name", ["fp16", *INTEGERS])
def test_it_has_as_many_parameters_as_the_model(converted, source, name):
    """Kind: a gate on parameters fails a file of few bits, whose scales are counted as well."""
    ours, fp32 = (open_artifact(path).params for path in (converted(name).artifact.path, source.path))
    assert ours == fp32


@pytest.mark.parametrize("name", ["fp16", *INTEGERS])
def test_its_bytes_are_attributed_to_the_same_layers(converted, source, name):
    found = []
    for path in (source.path, converted(name).artifact.path):
        layers = {layer for layer, _ in open_artifact(path).parts}
        found.append({layer for layer in layers if layer.startswith("blocks.")})
    assert found[0] == found[1] >= {"blocks.0.attn.qkv.down", "blocks.0.attn.qkv.up", "blocks.1.mlp.fc1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp16", *INTEGERS])
def test_a_second_time_gives_the_same_bytes(convert, tmp_path, name):
    first = convert(name).artifact.path.read_bytes()
    assert convert(name, path=tmp_path / "again" / "other.onnx").artifact.path.read_bytes() == first


class MatMulInteger(OpRun):
    """The operator as ONNX Runtime computes it on x86 without VNNI: each two products are added in 16 bits and cut off.

    Held against ONNX Runtime itself on an emulated Haswell, with weights of eight bits.
    """

    op_domain = ""

    def _run(self, a, b, a_zero=0, b_zero=0):
        assert not np.any(b_zero), "weights are symmetric"
        rows, weights = a.reshape(-1, a.shape[-1]).astype(np.int64), b.astype(np.int64)
        pairs = rows[:, 0::2, None] * weights[None, 0::2] + rows[:, 1::2, None] * weights[None, 1::2]
        sums = np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=1) - int(a_zero) * weights.sum(axis=0)
        return (sums.reshape(*a.shape[:-1], -1).astype(np.int32),)


def test_an_int8_file_is_the_same_model_on_a_processor_without_vnni(converted):
    """Kind: a file that is proven on one processor and is another model on the next. With weights of eight bits the cosine
    of these logits falls to 0.78."""
    model, feeds = onnx.load(converted("int8-dynamic").artifact.path), {"image": images(8, 3)}
    (exact,), (cut,) = (ReferenceEvaluator(model, new_ops=ops).run(None, feeds) for ops in ([], [MatMulInteger]))
    np.testing.assert_array_equal(cut, exact)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 2:
            doubled = (2 * numpy_helper.to_array(tensor).astype(np.int64)).clip(-127, 127)
            tensor.CopyFrom(numpy_helper.from_array(doubled.astype(np.int8), tensor.name))
            scale(model, f"{tensor.name.removesuffix('_quantized')}_scale", 0.5)
    (cut,) = ReferenceEvaluator(model, new_ops=[MatMulInteger]).run(None, feeds)
    assert np.abs(cut - exact).max() > 1, "as files with larger weights are not: the operator above is what cuts off"


@pytest.mark.parametrize("name", INT8)
def test_no_two_products_of_an_int8_file_overflow_16_bits(converted, name):
    """Whatever the activation, a signed one too: it is made unsigned before it is multiplied."""
    weights = [
        numpy_helper.to_array(tensor).astype(np.int64)
        for tensor in onnx.load(converted(name).artifact.path).graph.initializer
        if tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 2
    ]
    assert len(weights) == 9
    for weight in weights:
        assert 255 * np.abs(weight[0::2] + weight[1::2]).max() < 2**15
        assert 60 <= np.abs(weight).max() <= 64


def test_only_linears_with_weights_are_quantised(converted):
    census = converted("int8-qdq").facts.graph
    assert census.nodes_after["QuantizeLinear"] == 9
    products = census.nodes_after["MatMul"] + census.nodes_after.get("Gemm", 0)
    assert products == census.nodes_before["MatMul"] + census.nodes_before.get("Gemm", 0)
    census = converted("int8-dynamic").facts.graph
    assert census.nodes_after["MatMulInteger"] == 9


def test_onnx_runtime_runs_each_int8_linear_as_one_operator(convert, tmp_path):
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimised.onnx"), 3
    ort.InferenceSession(str(convert("int8-dynamic").artifact.path), options, providers=["CPUExecutionProvider"])
    fused = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert fused["DynamicQuantizeMatMul"] == 9
    assert fused["LayerNormalization"] == 5
    assert not fused.keys() & {"DynamicQuantizeLinear", "MatMulInteger", "MatMulIntegerToFloat"}
    assert "SkipLayerNormalization" not in fused, "slower than an addition and a normalization: ADR 26"


def test_smoothing_changes_no_function_and_evens_out_channels(source):
    model = onnx.load(source.path)
    names = [norm.output for norm in smooth.norms(model)]
    assert len(names) == 4, "of five: the one before the head is read by a Gather"
    largest = largest_channels(model, names, images(64, 1))
    even = smooth.smoothed(model, smooth.smoothing(model, largest))
    after = largest_channels(even, names, images(64, 1))
    for name in names:
        assert np.ptp(np.log(after[name])) < 0.7 * np.ptp(np.log(largest[name]))
    error, _ = largest_error(each_linear(model), each_linear(even))
    assert error > 1e3, "the weights are others"
    assert len(even.graph.initializer) == len(model.graph.initializer)


def test_a_norm_that_something_else_reads_is_left_alone(source):
    model = onnx.load(source.path)
    first = smooth.norms(model)[0]
    model.graph.node.append(onnx.helper.make_node("Relu", [first.output], ["also"]))
    assert first.output not in [norm.output for norm in smooth.norms(model)]
    shared = onnx.load(source.path)
    weights = [linear_nodes(shared)[index].input for index in (3, 7)]
    weights[1][1] = weights[0][1]  # fc1 of both blocks
    assert len(smooth.norms(shared)) == 2


# Planted faults: (precision, what is done to the graph, words of the refusal).


def stored(model, name):
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def scale(model, name, factor):
    tensor = stored(model, name)
    tensor.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(tensor) * factor).astype(np.float32), name))


def weight_scale(made):
    name = next(t.name for t in made.model.graph.initializer if t.name.endswith("_scale") and t.dims)
    scale(made.model, name, 2)


def activation_scale(made):
    node = next(n for n in made.model.graph.node if n.op_type == "QuantizeLinear")
    scale(made.model, node.input[1], 2)


def read_with_another_scale(made):
    node = next(n for n in made.model.graph.node if n.op_type == "QuantizeLinear")
    reader = next(n for n in made.model.graph.node if node.output[0] in n.input)
    made.model.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "other"))
    reader.input[1] = "other"


def dropped_bias(made):
    names = {name for node in made.model.graph.node for name in node.input}
    name = next(t.name for t in made.model.graph.initializer if "fc1.bias" in t.name and t.name in names)
    tensor = stored(made.model, name)
    tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(tensor)), name))


def swapped_heads(made):
    tensor = next(t for t in made.model.graph.initializer if len(t.dims) == 2 and 192 in t.dims and min(t.dims) > 8)
    values = numpy_helper.to_array(tensor)
    axis = list(values.shape).index(192)
    halves = np.split(values, [32, 64], axis=axis)
    tensor.CopyFrom(numpy_helper.from_array(np.concatenate([halves[1], halves[0], halves[2]], axis), tensor.name))


def other_activation(made):
    for node in made.model.graph.node:
        if node.op_type == "Gelu":
            node.op_type = "Relu"
            del node.attribute[:]


def wrong_query_scale(made):
    """The query of the first block half as large: its scale is in the weights, so no operator shows it."""
    tensor = next(t for t in made.model.graph.initializer if len(t.dims) == 2 and 192 in t.dims and min(t.dims) > 8)
    values = numpy_helper.to_array(tensor)
    query, *others = np.split(values, 3, axis=list(values.shape).index(192))
    halved = (query / 2).astype(query.dtype)
    tensor.CopyFrom(
        numpy_helper.from_array(np.concatenate([halved, *others], list(values.shape).index(192)), tensor.name)
    )


def zeroed(name):
    def plant(made):
        tensor = stored(made.model, name)
        tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(tensor)), name))

    plant.__name__ = f"zeroed_{name}"
    return plant


def other_softmax(made):
    """Attention normalised over the wrong axis."""
    for node in made.model.graph.node:
        if node.op_type == "Softmax":
            del node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute("axis", 2))


def frozen_batch(made):
    made.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def folded_pair(made):
    """The low-rank pair multiplied back into one weight."""
    graph = made.model.graph
    for down, up in zip(linear_nodes(made.model), linear_nodes(made.model)[1:], strict=False):
        if down.output[0] in up.input or any(
            node.output[0] in up.input and down.output[0] in node.input for node in graph.node
        ):
            first, second = (stored(made.model, node.input[1]) for node in (down, up))
            product = numpy_helper.to_array(first) @ numpy_helper.to_array(second)
            first.CopyFrom(numpy_helper.from_array(product, first.name))
            identity = np.eye(product.shape[1], dtype=product.dtype)
            second.CopyFrom(numpy_helper.from_array(identity[None], second.name))
            return
    raise AssertionError("no pair")


def one_linear_in_fp32(made):
    node = linear_nodes(made.model)[2]
    tensor = stored(made.model, node.input[1])
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))


def forgotten_gamma(made):
    """Weights were scaled up and the normalization before them not down."""
    name = smooth.norms(made.reference)[0].parameters[0]
    for model in (made.reference, made.model):
        scale(model, name, 3)


def doubled_twice(made):
    """A weight twice as large in the file, and in the graph that it is held against."""
    name = next(t.name for t in made.model.graph.initializer if t.name.endswith("_quantized")).removesuffix(
        "_quantized"
    )
    scale(made.model, f"{name}_scale", 2)
    scale(made.reference, name, 2)


FAULTS = [
    *((name, weight_scale, "weights must be the same") for name in INTEGERS),
    *((name, dropped_bias, "weights must be the same") for name in ("fp16", *INTEGERS)),
    *((name, swapped_heads, "weights must be the same") for name in ("fp16", *INTEGERS)),
    *((name, other_activation, r"lost the operators .*Gelu.* gained .*Relu") for name in ("fp16", *INTEGERS)),
    *((name, frozen_batch, r"has the inputs .*\(1, 3, 32, 32\)") for name in ("fp16", *INTEGERS)),
    *((name, wrong_query_scale, "weights must be the same") for name in ("fp16", *INTEGERS)),
    *((name, zeroed("pos_embed"), "a weight of pos_embed") for name in ("fp16", *INTEGERS)),
    *((name, zeroed("cls_token"), "a weight of cls_token") for name in ("fp16", *INTEGERS)),
    *((name, zeroed("norm.bias"), "a weight of norm.bias") for name in ("fp16", *INTEGERS)),
    *((name, other_softmax, r"gained \{'Softmax axis = 2': 2\}") for name in ("fp16", *INTEGERS)),
    ("fp16", folded_pair, "9 linears, the fp32 graph 10"),
    ("fp16", one_linear_in_fp32, r"linears of other types: \{'FLOAT': 1\}"),
    ("int8-qdq", activation_scale, "scales must be the same"),
    ("int8-qdq", read_with_another_scale, "read with another"),
    ("int4", doubled_twice, "fp32 linears to rounded is the first that broke"),
    ("int8-qdq", forgotten_gamma, "to smoothed is the first that broke"),
]


@pytest.mark.parametrize(("name", "plant", "words"), FAULTS, ids=[f"{n}-{p.__name__}" for n, p, _ in FAULTS])
def test_every_planted_fault_is_caught_by_its_rung(convert, graphs, register, monkeypatch, name, plant, words):
    made = copy.deepcopy(graphs(name))
    plant(made)
    register(PRECISIONS, replace(PRECISIONS[name], convert=lambda *_: made))
    monkeypatch.setattr(onnx.checker, "check_model", lambda *_, **__: None)  # some faults are invalid ONNX as well
    with pytest.raises((ParityError, ArtifactError), match=words):
        convert(name)


def test_what_cannot_be_converted_is_refused(convert, source, tmp_path, register):
    with pytest.raises(RecipeError, match="unknown precision 'int3'; did you mean 'int4'"):
        convert("int3")
    with pytest.raises(RecipeError, match="made from the fp32 file"):
        run_stage(
            Convert("fp16", tmp_path / "x.onnx", images(4, 1), images(3, 2), real_images=False),
            convert("fp16").artifact,
        )
    register(PRECISIONS, replace(PRECISIONS["fp16"], product="fixed point"))
    with pytest.raises(TargetUnavailable, match="nothing here runs fp16: no target takes them"):
        convert("fp16")


def test_fp16_does_not_cut_off_what_it_cannot_hold(source, tmp_path):
    model = onnx.load(source.path)
    tensor = stored(model, linear_nodes(model)[0].input[1])
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1e7), tensor.name))
    onnx.save(model, tmp_path / "large.onnx")
    stage = Convert("fp16", tmp_path / "x.onnx", images(4, 1), images(3, 2), real_images=False)
    with pytest.raises(ArtifactError, match="more than fp16 can: 65504; take bf16"):
        run_stage(stage, OnnxFile(tmp_path / "large.onnx"))


def claiming(file, precision):
    """The file, taken for one of a precision that its graph has not."""
    return type("Claiming", (OnnxFile,), {"own_precision": precision})(file.path)


@pytest.mark.parametrize(("name", "product"), [("fp16", "HALF"), ("bf16", "BF16")])
def test_an_engine_multiplies_in_the_type_of_its_file(converted, source, tmp_path, name, product):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'slimvit[trt-rtx]'")
    skip_unless_it_runs(name)
    section = EngineSection(compute_capabilities=("8.9",))
    made = run_stage(BuildEngine(section, "trt-rtx", tmp_path / "engine"), converted(name).artifact).artifact
    assert made.facts["matmul_dtypes"] == {product: made.facts["matmul_layers"]}
    with pytest.raises(ArtifactError, match=f"no {name} engine"):
        run_stage(BuildEngine(section, "trt-rtx", tmp_path / "other"), claiming(source, name))


def test_an_int8_engine_multiplies_int8_in_every_int8_linear(converted, source, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'slimvit[trt-rtx]'")
    section, given = EngineSection(compute_capabilities=("8.9",)), converted("int8-qdq").artifact
    made = run_stage(BuildEngine(section, "trt-rtx", tmp_path / "engine"), given).artifact
    assert made.facts["matmul_dtypes"] == {"FLOAT": made.facts["matmul_layers"] - 9, "INT8": 9}
    assert made.facts["attention_layers"] == 2
    with pytest.raises(ArtifactError, match="no int8-qdq engine"):
        run_stage(BuildEngine(section, "trt-rtx", tmp_path / "other"), claiming(source, "int8-qdq"))


def test_an_int8_engine_with_one_linear_less_is_refused(converted, tmp_path, monkeypatch):
    """The file says nine; the network that was parsed has lost the pair of scales of one."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'slimvit[trt-rtx]'")
    honest = trt_network.with_float_biases

    def faulty(path):
        model = honest(path)
        node = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
        (reader,) = (n for n in model.graph.node if node.output[0] in n.input)
        after = next(n for n in model.graph.node if reader.output[0] in n.input)
        after.input[list(after.input).index(reader.output[0])] = node.input[0]
        model.graph.node.remove(node)
        model.graph.node.remove(reader)
        return model

    monkeypatch.setattr(trt_network, "with_float_biases", faulty)
    section, given = EngineSection(compute_capabilities=("8.9",)), converted("int8-qdq").artifact
    with pytest.raises(ArtifactError, match=r"no int8-qdq engine: its matrix products are .*'INT8': 8"):
        run_stage(BuildEngine(section, "trt-rtx", tmp_path / "engine"), given)


def test_what_tensorrt_gets_of_an_int8_file_is_the_same_model(converted, tmp_path):
    given = converted("int8-qdq").artifact.path
    changed = trt_network.with_float_biases(given)
    onnx.checker.check_model(changed, full_check=True)
    assert not [t for t in changed.graph.initializer if t.data_type == onnx.TensorProto.INT32]
    onnx.save(changed, tmp_path / "changed.onnx")
    feeds = {"image": images(4, 3)}
    with (
        get_target("ort-cpu").open(given, 1) as expected,
        get_target("ort-cpu").open(tmp_path / "changed.onnx", 1) as got,
    ):
        difference = np.abs(got.infer(feeds)["logits"] - expected.infer(feeds)["logits"]).max()
    assert 0 <= difference <= 1e-4, "another kernel, the same numbers"
    assert trt_network.with_float_biases(converted("fp16").artifact.path) is None


def test_openvino_knows_the_output_of_an_fp16_file_by_its_name(converted):
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'slimvit[openvino]'")
    path = converted("fp16").artifact.path
    with get_target("openvino-cpu").open(path, 1) as got, get_target("ort-cpu").open(path, 1) as expected:
        feeds = {"image": images(2, 3)}
        np.testing.assert_allclose(got.infer(feeds)["logits"], expected.infer(feeds)["logits"], rtol=0.1, atol=0.1)


def exported(path, model, **options):
    export_onnx(model, path, **{"input_size": SIZE, "opset": 20, "metadata": {}, "simplify": True, **options})
    return OnnxFile(path)


def small(name="vit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    shape = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
    return randomise(timm.create_model(name, **{**shape, **kwargs}).eval())


KINDS = {
    "average pooling": ({"global_pool": "avg", "class_token": False}, {}),
    "two heads": ({"name": "deit_tiny_distilled_patch16_224"}, {}),
    "not simplified": ({}, {"simplify": False}),
    "opset 18": ({}, {"opset": 18}),
    "q/k norm": ({"qk_norm": True}, {}),
}


@pytest.mark.parametrize("name", ["fp16", "int8-dynamic", "int8-qdq", pytest.param("int4", marks=pytest.mark.slow)])
def test_a_file_that_was_made_for_noise_says_so(convert, name):
    notes = {noise: convert(name, noise=noise).facts.graph.notes for noise in (True, False)}
    assert notes[True] == ((MADE_FOR_NOISE, *notes[False]) if name in ("int8-qdq", "int4") else notes[False])


CONVERSIONS = [*itertools.product(KINDS, ("fp16", "int8-dynamic", "int8-qdq"))]


@pytest.mark.slow
@pytest.mark.parametrize("conversion", swept(CONVERSIONS, CONVERSIONS[::8]), ids="-".join)
def test_every_kind_of_model_can_be_converted(tmp_path, conversion):
    kind, name = conversion
    options, how = KINDS[kind]
    given = exported(tmp_path / "a.onnx", small(**options), **how)
    made = run_stage(Convert(name, tmp_path / "b.onnx", images(32, 1), images(8, 2), real_images=False), given)
    kinds = [linear.kind for linear in each_linear(onnx.load(made.artifact.path))]
    heads = 2 if kind == "two heads" else 1
    assert kinds.count(TensorProto.FLOAT) == (heads if name in INT8 else 0), "what gives the logits stays as it is"


LISTED_ANEW = ("parallel", "attention pool")
"""Structures whose linears ONNX Runtime's converters list in another order: they do not wait for each other."""


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("case", swept(STRUCTURES, LISTED_ANEW[1:]))
def test_every_structure_can_be_converted(tmp_path, case):
    model = variant(case)
    size = model.preprocess.input_size
    given = exported(tmp_path / "a.onnx", model.module, input_size=size)
    for name in ("fp16", *INTEGERS):
        stage = Convert(name, tmp_path / f"{name}.onnx", images(32, 1, size), images(8, 2, size), real_images=False)
        assert {rung.verdict for rung in run_stage(stage, given).rungs} == {"pass"}


@pytest.mark.slow
def test_linears_that_changed_places_are_found_however_nodes_are_listed(tmp_path):
    model = onnx.load(exported(tmp_path / "a.onnx", variant("parallel").module).path)
    half = PRECISIONS["fp16"].convert(model, images(2, 1)).model
    names = [[node.name for node in linear_nodes(each)] for each in (model, half)]
    assert names[0] != names[1], "a converter that keeps the order shows nothing here"
    assert largest_error(each_linear(model), each_linear(half))[0] <= 1
    first, second = (node for node in half.graph.node if node.name in names[0][:3:2])
    first.input[1], second.input[1] = second.input[1], first.input[1]
    assert largest_error(each_linear(model), each_linear(half))[0] > 1e3


def test_fp16_refuses_activations_that_would_overflow(tmp_path):
    model = small()
    with torch.no_grad():
        model.blocks[0].mlp.fc2.bias[:2] = 40000.0
    stage = Convert("fp16", tmp_path / "b.onnx", images(8, 1), images(8, 2), real_images=False)
    with pytest.raises(ArtifactError, match=r"comes to 4e\+04, and fp16 holds 65504: on a GPU the file could overflow"):
        run_stage(stage, exported(tmp_path / "a.onnx", model))
    assert not (tmp_path / "b.onnx").exists()


def test_a_refused_file_does_not_stay(convert, tmp_path, register):
    honest = PRECISIONS["int8-dynamic"]
    strict = replace(honest, tolerance=replace(honest.tolerance, cosine_min=1.0))
    register(PRECISIONS, strict)
    with pytest.raises(ParityError):
        convert("int8-dynamic")
    assert not (tmp_path / "int8-dynamic.onnx").exists()


def interrupted(*_):
    raise KeyboardInterrupt


def overflowing(*_):
    raise ArtifactError("overflow")


@pytest.mark.parametrize("how", ["refused by its bound", "cannot be converted", "interrupted"])
def test_a_file_that_was_there_is_replaced_by_the_model_or_not_at_all(convert, tmp_path, register, how):
    """Kind: work that fails and takes an earlier file of the user with it."""
    path, data = tmp_path / "fp16.onnx", tmp_path / "fp16.onnx.data"
    path.write_bytes(b"an earlier file")
    data.write_bytes(b"its weights")
    honest = PRECISIONS["fp16"]
    faulty = {
        "refused by its bound": replace(honest, tolerance=replace(honest.tolerance, cosine_min=1.0 + 1e-9)),
        "cannot be converted": replace(honest, convert=overflowing),
        "interrupted": replace(honest, convert=interrupted),
    }
    register(PRECISIONS, faulty[how])
    with pytest.raises((ParityError, ArtifactError, KeyboardInterrupt)):
        convert("fp16")
    register(PRECISIONS, honest)
    assert (path.read_bytes(), data.read_bytes()) == (b"an earlier file", b"its weights")
    assert convert("fp16").facts.graph.files == (path,)
    assert [file.name for file in tmp_path.iterdir()] == ["fp16.onnx"], "the weights of the earlier file are no part"


def test_an_engine_of_a_foreign_file_may_have_any_type(convert, tmp_path):
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'slimvit[openvino]'")
    model = onnx.load(convert("fp16").artifact.path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    assert OnnxFile(tmp_path / "foreign.onnx").own_precision == ""
    stage = BuildEngine(EngineSection(), "openvino-cpu", tmp_path / "engine")
    made = run_stage(stage, OnnxFile(tmp_path / "foreign.onnx")).artifact
    assert set(made.facts["matmul_dtypes"]) == {"HALF"}
