"""What another package would hold: a format, here the ONNX file packed by gzip, and a target that builds and opens it."""

from __future__ import annotations

import gzip
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from toolchain.artifacts import Artifact
from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.targets import BuildOptions, EngineBuild, Target, TargetInfo, TargetProfile, get_target


@dataclass(frozen=True)
class ToyFormat(Artifact):
    name = "toy"
    word = "toy file"
    patterns = ("*.toy",)

    @cached_property
    def inputs(self):
        with tempfile.TemporaryDirectory() as folder:
            return OnnxFile(unpacked(self.path, Path(folder))).inputs


def unpacked(path: Path, folder: Path) -> Path:
    file = folder / "unpacked.onnx"
    file.write_bytes(gzip.decompress(path.read_bytes()))
    return file


class ToyRunner:
    def __init__(self, path, threads):
        self.path, self.threads, self._stack = path, threads, ExitStack()

    def __enter__(self):
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        file = unpacked(self.path, Path(folder))
        self._runner = self._stack.enter_context(get_target("ort-cpu").open(file, self.threads))
        return self

    def __exit__(self, *error):
        self._stack.close()

    def infer(self, feeds):
        return self._runner.infer(feeds)

    def time_ns(self, feeds, samples):
        return self._runner.time_ns(feeds, samples)


class Toy(Target):
    name = "toy"
    profile = TargetProfile({"rank": 4})
    takes = ("toy",)
    measures = True
    builds = ("FLOAT",)

    def probe(self):
        return TargetInfo(self.name, "gzip", "1", "any")

    def _build(self, onnx: Path, folder: Path, options: BuildOptions) -> EngineBuild:
        path = folder / f"{onnx.stem}.toy"
        path.write_bytes(gzip.compress(onnx.read_bytes(), mtime=0))
        return EngineBuild(path, {"matmul_dtypes": {"FLOAT": 1}})

    def _open(self, path: Path, threads: int) -> ToyRunner:
        return ToyRunner(path, threads)


TOY = Toy()
