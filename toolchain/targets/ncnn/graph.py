"""Rewrites an ONNX graph for pnnx: batch 1, fp32, and no pattern that pnnx misreads.

Each rewrite is exact but for the order of sums, and none changes the file that it is made from. What pnnx misreads nevertheless
is caught behind it, by its log, by the shapes of the outputs and by parity.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass, RemoveUnusedNodesPass

from toolchain.artifacts.onnx_plain import plain
from toolchain.errors import ArtifactError
from toolchain.interpreter import graph_of
from toolchain.targets.ncnn.ranks import add_without_batch, split_attention, take_by_slice, turn_in_steps
from toolchain.targets.ncnn.sums import add_stacked, length_as_product, mean_as_product, norm_of_two, rotate_by_product


def for_pnnx(path: Path) -> onnx.ModelProto:
    """The graph of an ONNX file, with its weights, rewritten; numbers of fp16 are in fp32, and pnnx rounds them back without a loss.

    Raises:
        StorageError: the file cannot be read.
        ArtifactError: it is damaged.
    """
    model = plain(graph_of(path)).model
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_value = 1
    try:
        linked = ir.from_proto(onnx.shape_inference.infer_shapes(model, data_prop=True))
    except (onnx.shape_inference.InferenceError, ir.serde.SerdeError, ValueError) as error:
        raise ArtifactError(f"{path}: its shapes at batch 1 cannot be inferred: {error}") from error
    graph = linked.graph
    _drop_casts(graph)
    mean_as_product(graph)
    length_as_product(graph)
    split_attention(graph)
    rotate_by_product(graph)
    add_stacked(graph)
    turn_in_steps(graph)
    take_by_slice(graph)
    add_without_batch(graph)
    norm_of_two(graph)
    RemoveUnusedNodesPass()(linked)
    return ir.to_proto(linked)


def _drop_casts(graph: ir.Graph) -> None:
    """Casts from fp32 to fp32 go."""
    for node in graph:
        if node.op_type != "Cast":
            continue
        source, target = node.inputs[0], node.outputs[0]
        if source is not None and source.dtype == target.dtype == ir.DataType.FLOAT:
            node.op_type = "Identity"
            node.attributes.clear()
    IdentityEliminationPass()(ir.Model(graph, ir_version=10))
