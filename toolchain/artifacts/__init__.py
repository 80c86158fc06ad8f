"""Artifacts, one module for each kind; a new kind is one subclass of `Artifact` and one entry of `ARTIFACTS`."""

from __future__ import annotations

from pathlib import Path

from toolchain.artifacts.base import Artifact, PlainFile, Reading
from toolchain.artifacts.inputs import ImageInput, InputSpec, Port, Signature
from toolchain.errors import RecipeError, StorageError
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
    """The artifact at a path. Kinds that other packages registered are tried first; an unknown file is a `PlainFile`.

    Raises:
        StorageError: there is nothing.
        RecipeError: the file is another one of an artifact that a file beside it names, such as an ncnn model's .bin.
    """
    if not path.exists():
        raise StorageError(f"there is no file or folder {path}, seen from {Path.cwd()}; name one that is there")
    kinds = [*reversed([*ARTIFACTS.values()])]
    for kind in kinds:
        if kind.recognises(path):
            return kind(path)
    for kind in kinds:
        if (named := kind.named_beside(path)) is not None:
            raise RecipeError(f"{path} is a part of the {kind.word} {named}: name that file instead")
    return PlainFile(path)


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
