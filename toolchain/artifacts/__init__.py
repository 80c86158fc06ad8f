"""What ships: one file for each kind of artifact; a new kind is one subclass of `Artifact` and one entry of `ARTIFACTS`."""

from __future__ import annotations

from pathlib import Path

from toolchain.artifacts.base import Artifact, PlainFile, Reading
from toolchain.artifacts.inputs import ImageInput, InputSpec, Port, Signature
from toolchain.errors import StorageError
from toolchain.registry import Registry

ARTIFACTS: Registry[type[Artifact]] = Registry(
    "kind of artifact",
    "slimvit.artifacts",
    {
        "model-folder": "toolchain.artifacts.model_folder:ModelFolder",
        "onnx": "toolchain.artifacts.onnx_file:OnnxFile",
        "tensorrt-engine": "toolchain.artifacts.tensorrt_engine:TensorrtEngine",
        "mlpackage": "toolchain.artifacts.mlpackage:MlPackage",
        "openvino-ir": "toolchain.artifacts.openvino_ir:OpenVinoIr",
        "pte": "toolchain.artifacts.pte:Pte",
        "ncnn": "toolchain.artifacts.ncnn_model:NcnnModel",
        "tflite": "toolchain.artifacts.tflite:Tflite",
    },
)


def open_artifact(path: Path) -> Artifact:
    """What lies at a path, as its kind, those of other packages first; any other file or folder has a size and a digest.

    Raises:
        StorageError: there is nothing.
    """
    if not path.exists():
        raise StorageError(f"there is no file or folder {path}")
    return next((kind(path) for kind in reversed([*ARTIFACTS.values()]) if kind.recognises(path)), PlainFile(path))


__all__ = [
    "ARTIFACTS",
    "Artifact",
    "ImageInput",
    "InputSpec",
    "PlainFile",
    "Port",
    "Reading",
    "Signature",
    "open_artifact",
]
