"""An fp32 ONNX graph → weights of four bits that become int8 when the file is opened: half the bytes, the same kernels.

`Cast` of a stored int4 matrix is a constant, which a runtime works out once and multiplies by as it does in a file with
int8 weights. Codes are rounded by GPTQ with the second moments of what each linear reads, and the bias takes up what the
rounding does on average. Linears that read what attention gives keep eight bits: they have the fewest weights of a block, and lose
as much as the others. All other tensors are stored in fp16 and cast to fp32 alike.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, version_converter

from toolchain.artifacts.half import in_fp16
from toolchain.artifacts.onnx_plain import Codes, copied
from toolchain.artifacts.onnx_walk import linked
from toolchain.errors import ArtifactError
from toolchain.export.conversion import Conversion
from toolchain.export.gptq import gptq
from toolchain.export.observe import session, steps
from toolchain.export.onnx_graph import last_linears, linear_nodes
from toolchain.export.quantise import dynamic
from toolchain.export.weights import bias_of

Array = NDArray[Any]
OPSET = 21
"""The first opset whose Cast knows int4."""
WORTH_HALVING = 64
"""Least count of numbers from which a tensor is stored in fp16: its Cast node takes bytes too."""
LOST = 1e-6
"""Relative rounding error of moments summed in fp32: the covariance of a constant input consists only of this error."""
SHAPES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather")
"""What a linear is looked through for to find what it reads."""
NORMS = ("LayerNormalization", "RMSNormalization")
"""What may stand between attention and the linear that reads it."""
CODES, SCALE = "_quantized", "_scale"
"""How ONNX Runtime's quantiser ends the names of an int8 weight and of its scales."""


def int4(model: onnx.ModelProto, images: Array, eights: frozenset[str] | None = None) -> Conversion:
    """The graph of `dynamic` with weights of four bits.

    Args:
        model: fp32.
        images: calibration images [N, C, H, W], preprocessed.
        eights: the linears that keep eight bits, by the names of their nodes; those that read attention if None.

    Raises:
        ArtifactError: the graph cannot be brought to opset 21, or ONNX Runtime cannot run or quantise it.
    """
    model = _in_opset(model)
    eights = attended(model) if eights is None else eights
    linears = _linears(model, eights)
    moments = second_moments(model, sorted({each.read for each in linears}), images)
    reference, rounded = _rounded(model, linears, moments)
    made = dynamic(reference)
    casts = [*_fours(made, rounded), *_halves(made)]
    nodes = [*made.graph.node]
    del made.graph.node[:]
    made.graph.node.extend([*casts, *nodes])
    return Conversion(made, reference, moments={each.name: moments[each.read] for each in linears}, left=eights)


def attended(model: onnx.ModelProto) -> frozenset[str]:
    """The linears that read what attention gives, by the names of their nodes; of one that is split, both of its halves."""
    linears = {node.name for node in linear_nodes(model)}
    return frozenset(
        node.name for node in linked(model).graph if node.name in linears and _reads_attention(node, linears)
    )


def _reads_attention(linear: ir.Node, linears: Collection[str]) -> bool:
    node = _producer(linear)
    if node is not None and node.name in linears:  # the first half of one that is split
        node = _producer(node)
    if node is not None and node.op_type in NORMS:
        node = _producer(node)
    return node is not None and (node.op_type == "Attention" or (node.op_type == "MatMul" and node.name not in linears))


def _producer(node: ir.Node | None) -> ir.Node | None:
    """What gives the first input of a node, seen through changes of its shape."""
    while node is not None and node.inputs and node.inputs[0] is not None:
        node = node.inputs[0].producer()
        if node is None or node.op_type not in SHAPES:
            return node
    return None


@dataclass(frozen=True)
class _Linear:
    """A linear that is rounded.

    Attributes:
        name: of its node.
        read: what it multiplies.
        weight: its initializer.
        turned: whether that is [q, p].
        bias: an initializer that nobody else reads; "" where there is none.
    """

    name: str
    read: str
    weight: str
    turned: bool
    bias: str


def _linears(model: onnx.ModelProto, eights: Collection[str]) -> list[_Linear]:
    """All but those that give the logits, or keep eight bits, in the order of the graph."""
    last, nodes = last_linears(model), {node.name: node for node in linked(model).graph}
    uses = Counter(name for node in model.graph.node for name in node.input)
    linears = []
    for proto in linear_nodes(model):
        node = nodes[proto.name]
        if proto.name in last or proto.name in eights:
            continue
        turned = bool(node.attributes.get_int("transB", 0))
        sizes = node.inputs[1].shape.numpy()  # type: ignore[union-attr]
        value = bias_of(node, int(sizes[0 if turned else 1]))
        bias = str(value.name) if value is not None and value.is_initializer() and uses[value.name] == 1 else ""
        if uses[proto.input[1]] > 1:
            raise ArtifactError(f"several linears share {proto.input[1]}; int4 rounds each weight for what reads it")
        linears.append(_Linear(proto.name, proto.input[0], proto.input[1], turned, bias))
    return linears


def second_moments(model: onnx.ModelProto, names: Sequence[str], images: Array) -> dict[str, Array]:
    """Value → E[x̂x̂ᵀ] of its rows with a 1 at their end, x̂ = [x, 1], float64 [p + 1, p + 1], over images.

    Taken inside the graph, so that no activation leaves it.

    Raises:
        ArtifactError: ONNX Runtime cannot load the graph, or the moments are not finite.
    """

    def watch(model: onnx.ModelProto) -> None:
        del model.graph.output[:]
        for name in names:
            model.graph.node.extend(
                [
                    helper.make_node("Flatten", [name], [f"{name}.rows"], axis=-1),
                    helper.make_node("Pad", [f"{name}.rows", "moments.pads", "moments.one"], [f"{name}.ended"]),
                    helper.make_node("Gemm", [f"{name}.ended"] * 2, [f"{name}.moments"], transA=1),
                ]
            )
            model.graph.output.append(onnx.ValueInfoProto(name=f"{name}.moments"))
        pads, one = np.array([0, 0, 0, 1], np.int64), np.float32(1)
        for values, name in ((pads, "moments.pads"), (one, "moments.one")):
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))

    sums: defaultdict[str, Any] = defaultdict(float)
    with session(model, watch) as run:
        for feeds in steps(images):
            for name, values in run([f"{name}.moments" for name in names], feeds).items():
                sums[name.removesuffix(".moments")] += values.astype(np.float64)
    for name, total in sums.items():
        if not np.isfinite(total).all():
            raise ArtifactError(
                f"sums of squares of {name} over the calibration images are not finite in fp32, so int4 cannot round for them; "
                "look for infinities and NaN in the weights and in the images, or take another precision"
            )
    return {name: total / total[-1, -1] for name, total in sums.items()}


def _rounded(
    model: onnx.ModelProto, linears: Sequence[_Linear], moments: Mapping[str, Array]
) -> tuple[onnx.ModelProto, dict[str, Codes]]:
    """(a copy of a graph whose linears are rounded, in fp32; weight → its codes)."""
    reference = copied(model)
    stored = {tensor.name: tensor for tensor in reference.graph.initializer}
    codes = {}
    for linear in linears:
        weight = numpy_helper.to_array(stored[linear.weight])
        weight = weight.T if linear.turned else weight
        square, mean = moments[linear.read][:-1, :-1], moments[linear.read][-1, :-1]
        covariance = square - np.outer(mean, mean) if linear.bias else square
        codes[linear.weight] = gptq(weight, covariance + LOST * np.trace(square) * np.eye(len(square)))
        now = codes[linear.weight].weight
        _put(stored[linear.weight], now.T if linear.turned else now)
        if linear.bias:
            bias = stored[linear.bias]
            _put(bias, numpy_helper.to_array(bias) + mean @ (weight.astype(np.float64) - now))
    return reference, codes


def _fours(model: onnx.ModelProto, codes: Mapping[str, Codes]) -> Iterator[onnx.NodeProto]:
    """Puts codes and scales in place of those that the quantiser wrote; gives the casts from int4 to int8."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = {node.input[1]: node for node in model.graph.node if node.op_type == "MatMulInteger"}
    for weight, rounded in codes.items():
        name = f"{weight}{CODES}"
        if name not in readers or tuple(stored[name].dims) != rounded.codes.shape:
            raise ArtifactError(f"ONNX Runtime's quantiser left no MatMulInteger by {name} {[*rounded.codes.shape]}")
        fours = helper.make_tensor(name, TensorProto.INT4, rounded.codes.shape, _packed(rounded.codes), raw=True)
        stored[name].CopyFrom(fours)
        _put(stored[f"{weight}{SCALE}"], rounded.scales)
        readers[name].input[1] = f"{name}.int8"
        yield helper.make_node("Cast", [name], [f"{name}.int8"], name=f"{name}.cast", to=TensorProto.INT8)


def _packed(codes: Array) -> bytes:
    """Two codes a byte, the first in the lower half; a last one alone."""
    low, high = np.resize(codes.ravel(), codes.size + codes.size % 2).astype(np.uint8).reshape(-1, 2).T & 15
    return bytes(low | high << 4)


def _halves(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Stores the fp32 tensors of a graph in fp16, but for scales, small ones and those that it has no digits for; gives the casts."""
    cast: dict[str, str] = {}
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or tensor.name.endswith(SCALE):
            continue
        values = numpy_helper.to_array(tensor)
        if values.size >= WORTH_HALVING and (half := in_fp16(values)) is not None:
            cast[tensor.name] = f"{tensor.name}.fp32"
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
            yield helper.make_node(
                "Cast", [tensor.name], [cast[tensor.name]], name=f"{tensor.name}.cast", to=TensorProto.FLOAT
            )
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = cast.get(name, name)


def _put(tensor: onnx.TensorProto, values: Array) -> None:
    """Replaces the numbers of an fp32 tensor."""
    flat = np.ascontiguousarray(values, np.float32).reshape([*tensor.dims])
    tensor.CopyFrom(numpy_helper.from_array(flat, tensor.name))


def _in_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in an opset that casts int4."""
    now = next(entry.version for entry in model.opset_import if entry.domain == "")
    if now >= OPSET:
        return model
    try:
        converted: onnx.ModelProto = version_converter.convert_version(model, OPSET)
    except Exception as error:  # its own errors share no base
        raise ArtifactError(
            f"onnx cannot bring the graph from opset {now} to {OPSET}, which int4 needs: {error}; set export.opset = {OPSET}"
        ) from error
    return converted
