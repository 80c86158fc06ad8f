"""The matrix products of an ONNX file: their shapes, their multiply-accumulates, and files that hold nothing else.

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
from onnx import NodeProto, TensorProto, helper
from onnx.external_data_helper import load_external_data_for_model, load_external_data_for_tensor, uses_external_data

from toolchain.artifacts.onnx_file import OnnxFile
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
"""Operators that hold products, or graphs, in which they are not counted: a sum without them would be too small."""


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
        """How many there are."""
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
    """An ONNX graph of which all shapes are known."""

    path: Path
    model: onnx.ModelProto
    shapes: Mapping[str, tuple[Shape, int]]
    producers: Mapping[str, NodeProto]
    readers: Mapping[str, list[NodeProto]]
    constants: Mapping[str, TensorProto]

    def shape(self, name: str) -> Shape:
        """The shape of a tensor; raises ArtifactError if it could not be inferred."""
        if name in self.constants:
            return tuple(self.constants[name].dims)
        if name not in self.shapes:
            raise ArtifactError(
                f"{self.path}: the shape of {name!r} cannot be inferred, so its product cannot be counted"
            )
        return self.shapes[name][0]

    def dtype(self, name: str) -> int:
        """ONNX's number of a tensor's type; 0 if it is not known."""
        return self.constants[name].data_type if name in self.constants else self.shapes.get(name, ((), 0))[1]


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
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        raise ArtifactError(f"the shapes of {path} contradict each other: {error}") from error
    shapes = {}
    for value in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output):
        tensor = value.type.tensor_type
        dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]
        if tensor.HasField("shape") and None not in dims:
            shapes[value.name] = tuple(dim for dim in dims if dim is not None), tensor.elem_type
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    producers = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return Graph(path, model, shapes, producers, readers, constants)


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
    unknown = Counter(node.op_type for node in graph.model.graph.node if node.op_type in NOT_COUNTED)
    if unknown or graph.model.functions:
        said = ", ".join(f"{op} ×{count}" for op, count in sorted(unknown.items())) or "functions"
        raise RecipeError(
            f"{graph.path} has {said}, whose products are not counted. Export it with attention unfused, "
            "before any optimiser of a runtime."
        )
    kinds: dict[tuple[object, ...], list[NodeProto]] = {}
    for node in graph.model.graph.node:
        if node.op_type in PRODUCTS:
            kinds.setdefault(_kind(graph, node), []).append(node)
    found = []
    for nodes in kinds.values():
        first, names = nodes[0], _operands(nodes[0])
        dtype = TensorProto.DataType.Name(graph.dtype(_stored(graph, names[0]))).lower()
        shapes = tuple(graph.shape(name) for name in names)
        outputs = tuple(node.output[0] for node in nodes)
        found.append(Product(first.op_type, shapes, dtype, _macs(graph, first), outputs))
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
    outputs: list[str] = []
    for index, node in enumerate(n for n in graph.model.graph.node if n.output and n.output[0] in kinds):
        kind = kinds[node.output[0]]
        tree = _tree(graph, node)
        outputs.append(tree[-1].output[0])
        alone = not any(_stored(graph, name) in graph.constants for name in _operands(node))
        own = {name for part in tree for name in part.output}
        for number, part in enumerate(tree):
            copied = NodeProto()
            copied.CopyFrom(part)
            copied.name = f"product{index}.{number}"
            for slot, name in enumerate(part.input):
                if name in graph.constants:
                    weights[name] = _named(graph.constants[name], name)
                elif name and name not in own:
                    copied.input[slot] = f"input{kind}.{number}.{slot}" + (f".{index}" if alone else "")
                    value = helper.make_tensor_value_info(copied.input[slot], graph.dtype(name), graph.shape(name))
                    inputs[copied.input[slot]] = value
            nodes.append(copied)
    results = [helper.make_tensor_value_info(name, graph.dtype(name), graph.shape(name)) for name in outputs]
    made = helper.make_graph(nodes, "products", list(inputs.values()), results, list(weights.values()))
    model = helper.make_model(made, opset_imports=graph.model.opset_import, ir_version=graph.model.ir_version)
    load_external_data_for_model(model, str(graph.path.parent))
    onnx.save_model(model, path, save_as_external_data=is_large(stored_bytes(model)), location=f"{path.name}.data")
    return path


def _operands(node: NodeProto) -> tuple[str, str]:
    """Names of the two tensors that a node multiplies."""
    second = 3 if node.op_type.startswith("QLinear") else 1
    return node.input[0], node.input[second]


def _stored(graph: Graph, name: str) -> str:
    """The tensor itself, or what it was before DequantizeLinear."""
    part = graph.producers.get(name)
    return part.input[0] if part is not None and part.op_type == "DequantizeLinear" else name


def _macs(graph: Graph, node: NodeProto) -> int:
    made = math.prod(graph.shape(node.output[0]))
    left, right = (graph.shape(name) for name in _operands(node))
    if node.op_type in WEIGHT_INPUT:
        return made * math.prod(right[1:])
    turned = node.op_type == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute)
    return made * left[0 if turned else -1]


def _kind(graph: Graph, node: NodeProto) -> tuple[object, ...]:
    """What makes two products the same work: operator, attributes, and of each input shape, type and constancy."""
    tree = _tree(graph, node)
    own = {name for part in tree for name in part.output}
    described = []
    for part in tree:
        attributes = tuple(sorted(attribute.SerializeToString() for attribute in part.attribute))
        operands = tuple(
            (graph.shape(name) if name else None, graph.dtype(name), name in graph.constants, name in own)
            for name in part.input
        )
        described.append((part.op_type, attributes, operands))
    return tuple(described)


def _tree(graph: Graph, node: NodeProto) -> list[NodeProto]:
    """A product with the DequantizeLinear before and the QuantizeLinear after it, if there are any.

    With them a runtime multiplies integers, without them floats.
    """
    before = [graph.producers[name] for name in node.input if name in graph.producers]
    after = graph.readers.get(node.output[0], [])
    quantised = after if len(after) == 1 and after[0].op_type == "QuantizeLinear" else []
    return [*(part for part in before if part.op_type == "DequantizeLinear"), node, *quantised]


def _named(tensor: TensorProto, name: str) -> TensorProto:
    copied = TensorProto()
    copied.CopyFrom(tensor)
    copied.name = name
    return copied
