"""An ONNX file: its graph, read without the weights that lie in other files."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from toolchain.errors import ArtifactError, StorageError


def read_onnx(path: Path) -> onnx.ModelProto:
    """The model of an ONNX file; weights that lie in other files are not read.

    Raises:
        StorageError: the file cannot be read.
        ArtifactError: it is no ONNX file, or truncated.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    except DecodeError as error:
        raise ArtifactError(f"{path} is not an ONNX file, or is truncated: {error}") from error
    if not model.graph.output:
        raise ArtifactError(f"{path} is not an ONNX file: its graph has no output")
    return model
