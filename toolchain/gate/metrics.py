"""What a gate counts in an artifact without a clock: one entry, and a key of gate.toml, is one more check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from toolchain.artifacts.onnx_file import read_onnx
from toolchain.artifacts.size import artifact_size_bytes, stored_params
from toolchain.errors import RecipeError


@dataclass(frozen=True)
class Metric:
    """A whole number that is better lower.

    Attributes:
        unit: what is counted, in words.
        count: the number of an artifact; None if it takes images.
        advice: what to do first where it is too large.
    """

    unit: str
    count: Callable[[Path], int] | None
    advice: str


def node_count(path: Path) -> int:
    """The nodes of an ONNX file, those in subgraphs and functions included; raises RecipeError for another artifact."""
    if path.suffix != ".onnx" or not path.is_file():
        raise RecipeError(f"{path} has no ONNX nodes; judge an ONNX file by nodes")
    model = read_onnx(path)
    return _nodes(model.graph.node) + sum(_nodes(function.node) for function in model.functions)


def _nodes(nodes: Iterable[onnx.NodeProto]) -> int:
    count = 0
    for node in nodes:
        graphs = [graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs)]
        count += 1 + sum(_nodes(graph.node) for graph in graphs)
    return count


METRICS: Mapping[str, Metric] = {
    "size": Metric("bytes", artifact_size_bytes, "See with --why which layer they are in and make it smaller"),
    "params": Metric("parameters", stored_params, "Compress further"),
    "nodes": Metric("nodes", node_count, "Simplify the graph"),
    "accuracy": Metric("wrong images", None, "Compress less or train longer"),
}
