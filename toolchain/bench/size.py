"""The exact size of an artifact: all files that have to be shipped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from toolchain.artifact import sha256
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
    tensors = stored_tensors(read_onnx(path))
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


def artifact_sha256(path: Path) -> str:
    r"""What an artifact is known by: the sha256 of its file, or of the listing "digest  name" of its files.

    The listing is that of `sha256sum` in the artifact's folder, sorted by name, so that no tool of ours is needed:
    `sha256sum FILE`, or in a folder `find . -type f -printf "%P\n" | LC_ALL=C sort | xargs sha256sum | sha256sum`.
    Raises as `artifact_files`.
    """
    files = artifact_files(path)
    if files == [path]:
        return sha256(path)
    root = path if path.is_dir() else path.parent
    names = {file.relative_to(root).as_posix(): file for file in files}
    listing = "".join(f"{sha256(names[name])}  {name}\n" for name in sorted(names))
    return hashlib.sha256(listing.encode()).hexdigest()


def stored_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor in an ONNX file: initializers, and constants in nodes, subgraphs and functions."""
    yield from _tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


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
