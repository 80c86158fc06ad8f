"""What a user names on a command line, as far as it can be refused before anything large is imported."""

from __future__ import annotations

from pathlib import Path

from toolchain.errors import DataError, StorageError
from toolchain.files import expanded

WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".toml", ".onnx")
"""Endings that no name of a model has."""


def require_model(model: str) -> None:
    """Raises StorageError where a model is a path, and nothing lies there."""
    path = expanded(model)
    if path.exists() or model.lower().startswith("hf://"):
        return
    if model.startswith((".", "~", "/")) or path.suffix in WEIGHTS or (model.count("/") > 1 and ":" not in model):
        raise StorageError(
            f"there is no file or folder {model}, seen from {Path.cwd()}; give a checkpoint, a folder, or the name of a model"
        )
    if "/" in model and ":" not in model and path.parent.is_dir():
        raise StorageError(
            f"there is no file or folder {model}, seen from {Path.cwd()}; for the repository of the hub write hf://{model}"
        )


def require_pictures(data: str) -> None:
    """Raises DataError where the images are a path, and no folder lies there."""
    path = expanded(data)
    if path.is_dir() or ":" in data:
        return
    if path.is_file():
        raise DataError(f"{data} is a file; give a folder of pictures, or a source such as digits or hf:NAME")
    if "/" in data or data.startswith((".", "~")):
        raise DataError(f"there is no folder {data}; give a folder of pictures, or a source such as digits or hf:NAME")


def require_run_folder(out: Path) -> None:
    """Raises StorageError where a run cannot write its files into a folder, or make it."""
    place = out
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise StorageError(f"{place} is a file, so {out} cannot be the folder of a run; choose another --out")
