"""Engines built for this machine only, once for each file, batch and GPU, and kept in the user's cache."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from toolchain.artifacts import open_artifact
from toolchain.files import digest_of, exclusive, user_cache
from toolchain.targets.base import BuildOptions, EngineBuild
from toolchain.version import tool


class Builder(Protocol):
    """What builds engines: `targets.trt.TensorRT`."""

    ahead_of_time: bool

    @property
    def runtime(self) -> tuple[str, str]:
        """The Python module and its version; an engine is for exactly one."""
        ...

    def build(self, onnx: Path, folder: Path, options: BuildOptions) -> EngineBuild:
        """The engine, written into `folder`."""
        ...


def cached_engine(
    builder: Builder, onnx: Path, batch: int, capability: str, gpu: str, sample: tuple[int, ...] | None = None
) -> Path:
    """The engine of an ONNX file for one batch and one GPU; what was built before is taken again.

    Args:
        builder: what builds it.
        onnx: the file.
        batch: the only one that it takes.
        capability: compute capability of the GPU.
        gpu: its name: the kernels of an engine are chosen on one model, and are others on another of the same capability.
        sample: shape of one sample, which the file may leave open; None for a file of several inputs.

    Raises:
        StorageError: the file cannot be read, or the cache not written.
        ArtifactError: the file is damaged, or the runtime refuses it.
    """
    source = open_artifact(onnx).sha256
    folder = user_cache() / "engines" / digest_of(tool(), builder.runtime, capability, gpu, batch, sample, source)
    with exclusive(folder):
        kept = sorted(folder.glob("*.engine"))  # written whole or not at all
        if kept:
            return kept[0]
        folder.mkdir(exist_ok=True)
        capabilities = (capability,) if builder.ahead_of_time else ()
        return builder.build(onnx, folder, BuildOptions((batch, batch, batch), capabilities, input_shape=sample)).path
