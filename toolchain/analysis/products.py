"""The matrix products of an ONNX file: their shapes and MACs, and how to write files that contain only them.

Linears, convolutions and the two products of attention are what a transformer's arithmetic consists of. A file of
products holds every one of a kind with its own weights, so that a runtime does in it the work that it does in the model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import NodeProto, TensorProto, helper
from onnx.external_data_helper import load_external_data_for_model, load_external_data_for_tensor, uses_external_data

from toolchain.artifacts.onnx_bare import bare
from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.artifacts.onnx_walk import linked, only_reader, stored, unscaled
from toolchain.errors import ArtifactError, RecipeError
from toolchain.export.large import is_large, stored_bytes

Shape = tuple[int, ...]
WEIGHT_INPUT: Mapping[str, int] = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3}
"""Position of a convolution's weight [out, in / groups, kernel]."""
PRODUCTS = frozenset({"MatMul", "MatMulInteger", "QLinearMatMul", "Gemm", *WEIGHT_INPUT})
NOT_COUNTED = frozenset(
    {"Attention", "MultiHeadAttention", "FusedMatMul", "FusedGemm", "FusedConv", "MatMulNBits", "QAttention", "QGemm"}
    | {"Einsum", "ConvTranspose", "LSTM", "GRU", "RNN", "If", "Loop", "Scan", "DynamicQuantizeMatMul"}
    | {"MatMulIntegerToFloat"}
)
"""Operators whose products are not counted here. A graph with one of them is refused, since the sum would be too small."""


@dataclass(frozen=True)
class Product:
    """Products of one shape.

    Attributes:
        op: the operator.
        inputs: shapes of what is multiplied.
        dtype: of the first of them.
        macs: multiply-accumulates of one product.
        nodes: names of all outputs of such products in the graph, in its order.
    """

    op: str
    inputs: tuple[Shape, ...]
    dtype: str
    macs: int
    nodes: tuple[str, ...]

    @property
    def count(self) -> int:
        """The number of such products in the graph."""
        return len(self.nodes)

    @property
    def total_macs(self) -> int:
        """Multiply-accumulates of all of them."""
        return self.macs * self.count

    def __str__(self) -> str:
        shapes = " · ".join("×".join(map(str, shape)) for shape in self.inputs)
        return f"{self.op} {shapes}"


@dataclass(frozen=True)
class Graph:
    """An ONNX graph in which every shape is known."""

    path: Path
    file: onnx.ModelProto
    model: ir.Model

    def shape(self, value: ir.Value | None) -> Shape:
        """The shape of a value, () of an input that was left out; raises ArtifactError if it could not be inferred."""
        if value is None:
            return ()
        shape = (stored(value) or value).shape
        sizes = tuple(size for size in shape or () if isinstance(size, int))
        if shape is None or len(sizes) < len(shape):
            raise ArtifactError(
                f"{self.path}: the shape of {value.name!r} cannot be inferred, so its product cannot be counted"
            )
        return sizes


def read_graph(path: Path, batch: int, input_shape: Shape | None = None) -> Graph:
    """The graph of an ONNX file with all shapes, for one batch.

    Args:
        path: the file; weights in other files are not read.
        batch: first dimension of the inputs.
        input_shape: shape of one sample; only needed where the file leaves it open.

    Raises:
        StorageError: the file cannot be read.
        ArtifactError: it is damaged.
        RecipeError: it fixes another batch, or leaves a shape open that was not given.
    """
    file = OnnxFile(path)
    signature, model = file.signature(batch, input_shape), file.model
    _load_shapes(model, path.parent)
    given = {name: spec.shape for name, spec in zip(signature.names, signature.inputs, strict=True)}
    for value in model.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, given.get(value.name, ()), strict=False):
            dim.dim_value = size
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")  # says a batch that is no longer open
    del model.graph.value_info[:]
    try:
        inferred = onnx.shape_inference.infer_shapes(bare(model), data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        raise ArtifactError(f"the shapes of {path} contradict each other: {error}") from error
    return Graph(path, model, linked(inferred))


def _load_shapes(model: onnx.ModelProto, folder: Path) -> None:
    """Reads the few integers that say how to reshape, where they lie in another file; shapes follow from them."""
    for tensor in model.graph.initializer:
        if uses_external_data(tensor) and tensor.data_type == TensorProto.INT64 and math.prod(tensor.dims) <= 1024:
            try:
                load_external_data_for_tensor(tensor, str(folder))
            except (OSError, ValueError, onnx.checker.ValidationError) as error:
                raise ArtifactError(f"{folder} lacks what an ONNX file there needs: {error}") from error
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]


def products(graph: Graph) -> tuple[Product, ...]:
    """The products of a graph, those of one shape together, the costliest first.

    Raises:
        ArtifactError: a shape is not known.
        RecipeError: the graph has operators that are not counted.
    """
    unknown = Counter(node.op_type for node in graph.model.graph if node.op_type in NOT_COUNTED)
    if unknown or graph.model.functions:
        said = ", ".join(f"{op} ×{count}" for op, count in sorted(unknown.items())) or "functions"
        raise RecipeError(
            f"{graph.path} has {said}, whose products are not counted. Export it with attention unfused, "
            "before any optimiser of a runtime."
        )
    kinds: dict[tuple[object, ...], list[ir.Node]] = {}
    for node in graph.model.graph:
        if node.op_type in PRODUCTS:
            kinds.setdefault(_kind(graph, node), []).append(node)
    found = []
    for nodes in kinds.values():
        first, operands = nodes[0], _operands(nodes[0])
        dtype = _dtype(unscaled(operands[0])).name.lower()
        outputs = tuple(str(node.outputs[0].name) for node in nodes)
        found.append(Product(first.op_type, tuple(map(graph.shape, operands)), dtype, _macs(graph, first), outputs))
    return tuple(sorted(found, key=lambda product: -product.total_macs))


def write_products(graph: Graph, wanted: Sequence[Product], path: Path) -> Path:
    """The file written: all products of these kinds and nothing else, each with its own weights.

    What is not constant becomes an input: one for all products of a kind, unless they have no weights that tell them
    apart; those get inputs of their own, or a runtime would see that it need compute only one of them.
    """
    kinds = {name: kind for kind, product in enumerate(wanted) for name in product.nodes}
    nodes: list[NodeProto] = []
    weights: dict[str, TensorProto] = {}
    inputs: dict[str, onnx.ValueInfoProto] = {}
    outputs: list[ir.Value] = []
    tensors = {tensor.name: tensor for tensor in graph.file.graph.initializer}
    for index, node in enumerate(n for n in graph.model.graph if n.outputs[0].name in kinds):
        kind = kinds[str(node.outputs[0].name)]
        tree = _tree(node)
        outputs.append(tree[-1].outputs[0])
        alone = all(stored(unscaled(value)) is None for value in _operands(node))
        own = {value for part in tree for value in part.outputs}
        for number, part in enumerate(tree):
            copied = ir.to_proto(part)
            copied.name = f"product{index}.{number}"
            for slot, value in enumerate(part.inputs):
                if (tensor := stored(value)) is not None:
                    name = copied.input[slot]
                    weights[name] = tensors.get(name) or ir.to_proto(tensor)
                    weights[name].name = name
                elif value is not None and value not in own:
                    name = copied.input[slot] = f"input{kind}.{number}.{slot}" + (f".{index}" if alone else "")
                    inputs[name] = _info(graph, value, name)
            nodes.append(copied)
    results = [_info(graph, value, str(value.name)) for value in outputs]
    made = helper.make_graph(nodes, "products", list(inputs.values()), results, list(weights.values()))
    opsets = [helper.make_opsetid(*each) for each in graph.model.opset_imports.items()]
    model = helper.make_model(made, opset_imports=opsets, ir_version=graph.model.ir_version)
    load_external_data_for_model(model, str(graph.path.parent))
    onnx.save_model(model, path, save_as_external_data=is_large(stored_bytes(model)), location=f"{path.name}.data")
    return path


def _info(graph: Graph, value: ir.Value, name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _dtype(value), graph.shape(value))


def _dtype(value: ir.Value | None) -> ir.DataType:
    """The type of a value, UNDEFINED if it is not known."""
    known = stored(value) or value
    return (known and known.dtype) or ir.DataType.UNDEFINED


def _operands(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """The two values that a node multiplies."""
    return node.inputs[0], node.inputs[3 if node.op_type.startswith("QLinear") else 1]


def _macs(graph: Graph, node: ir.Node) -> int:
    made = math.prod(graph.shape(node.outputs[0]))
    left, right = map(graph.shape, _operands(node))
    if node.op_type in WEIGHT_INPUT:
        return made * math.prod(right[1:])
    turned = node.op_type == "Gemm" and bool(node.attributes.get_int("transA", 0))
    return made * left[0 if turned else -1]


def _kind(graph: Graph, node: ir.Node) -> tuple[object, ...]:
    """Key by which products are grouped: operator, attributes, and for each input its shape, type and whether it is constant."""
    tree = _tree(node)
    own = {value for part in tree for value in part.outputs}
    return tuple(
        (
            part.op_type,
            tuple(sorted(ir.to_proto(attribute).SerializeToString() for attribute in part.attributes.values())),
            tuple((graph.shape(x), _dtype(x), stored(x) is not None, x in own) for x in part.inputs),
        )
        for part in tree
    )


def _tree(node: ir.Node) -> list[ir.Node]:
    """The nodes of a product: the DequantizeLinears or Casts before it, the product, and a QuantizeLinear after it.

    With them a runtime multiplies integers, without them floats.
    """
    before = [part for value in node.inputs if value and unscaled(value) is not value and (part := value.producer())]
    after = only_reader(node.outputs[0])
    return [*before, node, *([after] if after is not None and after.op_type == "QuantizeLinear" else [])]
