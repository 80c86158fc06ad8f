"""The exact size of an artifact: all files that have to be shipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from toolchain.errors import ArtifactError, StorageError
from toolchain.export.onnx_graph import read_onnx


def artifact_files(path: Path) -> list[Path]:
    """Every file of an artifact, sorted: a folder's files, an ONNX file with its external data, or the file itself.

    Raises:
        StorageError: the artifact does not exist or cannot be read.
        ArtifactError: an ONNX file is damaged, or names external data that is missing or lies outside its folder.
    """
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if not path.is_file():
        raise StorageError(f"there is no file {path}")
    if path.suffix != ".onnx":
        return [path]
    model = read_onnx(path)
    tensors = (*_tensors(model.graph), *(t for f in model.functions for node in f.node for t in _node_tensors(node)))
    locations = {ExternalDataInfo(tensor).location for tensor in tensors if uses_external_data(tensor)}
    files = [path]
    for location in sorted(locations):
        file = path.parent / location
        if not file.resolve().is_relative_to(path.parent.resolve()) or not file.is_file():
            raise ArtifactError(f"{path} needs its external data {location!r}, which is not in {path.parent}")
        files.append(file)
    return sorted(files)


def artifact_size_bytes(path: Path) -> int:
    """The sum of the sizes of an artifact's files in bytes; raises as `artifact_files` does."""
    return sum(file.stat().st_size for file in artifact_files(path))


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        yield from (attribute.t, *attribute.tensors)
        for graph in (attribute.g, *attribute.graphs):
            yield from _tensors(graph)
