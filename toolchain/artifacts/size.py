"""What an artifact consists of: the files that have to be shipped, their bytes and digest, the tensors in them."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from toolchain.artifacts.onnx_file import read_onnx
from toolchain.errors import ArtifactError, RecipeError, StorageError
from toolchain.files import sha256

GZIP = 31
"""zlib's name for a gzip stream of the largest window."""
# Shapes, axes and indices are stored like weights and are none.
NOT_WEIGHTS = frozenset(
    {onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.BOOL, onnx.TensorProto.STRING}
)


def artifact_files(path: Path) -> list[Path]:
    """Every file of an artifact, sorted: a folder's files, an ONNX file with its external data, or the file itself.

    Raises:
        StorageError: the artifact does not exist or cannot be read.
        ArtifactError: an ONNX file is damaged, or names external data that is missing, too short or outside its folder.
    """
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if not path.is_file():
        raise StorageError(f"there is no file {path}")
    if path.suffix != ".onnx":
        return [path]
    ends: dict[str, int] = {}
    for tensor in stored_tensors(read_onnx(path)):
        if uses_external_data(tensor):
            stored = ExternalDataInfo(tensor)
            ends[stored.location] = max(ends.get(stored.location, 0), (stored.offset or 0) + (stored.length or 0))
    files = {path}
    for location, end in sorted(ends.items()):
        file = path.parent / location
        if not file.resolve().is_relative_to(path.parent.resolve()) or not file.is_file():
            raise ArtifactError(f"{path} needs its external data {location!r}, which is not in {path.parent}")
        if (there := file.stat().st_size) < end:
            raise ArtifactError(f"{file} has {there:,} bytes, and {path.name} reads {end:,} of it: it is truncated")
        files.add(file)
    return sorted(files)


def artifact_size_bytes(path: Path) -> int:
    """The sum of the sizes of an artifact's files in bytes; raises as `artifact_files` does."""
    return sum(file.stat().st_size for file in artifact_files(path))


def download_bytes(path: Path) -> int:
    """The bytes of an artifact as gzip sends them (its default level); raises as `artifact_files` does."""
    total = 0
    for file in artifact_files(path):
        packer = zlib.compressobj(wbits=GZIP)
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                total += len(packer.compress(chunk))
        total += len(packer.flush())
    return total


def artifact_sha256(path: Path) -> str:
    r"""What an artifact is known by: the sha256 of its file, or of the listing "digest  name" of its files.

    The listing is that of `sha256sum` in the artifact's folder, sorted by name, so that no tool of ours is needed:
    `sha256sum FILE`, or in a folder `find . -type f -printf "%P\n" | LC_ALL=C sort | xargs sha256sum | sha256sum`.
    Raises as `artifact_files`.
    """
    return sha256_of_files(path, file_sha256s(path))


def file_sha256s(path: Path) -> dict[str, str]:
    """File → its sha256, for every file of an artifact, named from its folder; raises as `artifact_files`."""
    root = path if path.is_dir() else path.parent
    return {file.relative_to(root).as_posix(): sha256(file) for file in artifact_files(path)}


def sha256_of_files(path: Path, digests: Mapping[str, str]) -> str:
    """`artifact_sha256` of an artifact whose files were read already, by `file_sha256s`."""
    if not path.is_dir() and len(digests) == 1:
        return next(iter(digests.values()))
    listing = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return hashlib.sha256(listing.encode()).hexdigest()


def stored_params(path: Path) -> int:
    """The numbers stored in an artifact's tensors, without scalars and, of an ONNX file, indices.

    Raises:
        RecipeError: the artifact is neither an ONNX file nor a folder with safetensors.
    """
    if path.suffix == ".onnx" and path.is_file():
        tensors = stored_tensors(read_onnx(path))
        return sum(math.prod(t.dims) for t in tensors if t.dims and t.data_type not in NOT_WEIGHTS)
    files = [file for file in artifact_files(path) if file.suffix == ".safetensors"]
    if not files:
        raise RecipeError(f"parameters cannot be read from {path}; judge an ONNX file or a model folder by params")
    return sum(math.prod(shape) for file in files for shape, _ in safetensors_shapes(file).values())


def safetensors_shapes(path: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Tensor → (shape, bytes) from a safetensors file's header; raises ArtifactError if it has none."""
    try:
        with path.open("rb") as file:
            length = min(int.from_bytes(file.read(8), "little"), path.stat().st_size)  # of another file it is anything
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {
            name: (tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in header.items()
        }
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ArtifactError(f"{path} is not a safetensors file, or is truncated: {error}") from None


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
