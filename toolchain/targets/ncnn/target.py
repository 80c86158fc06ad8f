"""Target "ncnn": .param and .bin built from an ONNX file, and run on the CPU at batch 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from toolchain.artifacts import open_artifact
from toolchain.artifacts.inputs import Signature
from toolchain.artifacts.ncnn_format import LARGEST_RANK, files_of, read_layers, read_numbers
from toolchain.errors import ArtifactError, RecipeError, TargetUnavailable
from toolchain.on_device.runner import Runner, cpu_model
from toolchain.targets.base import BuildOptions, EngineBuild, Target, TargetInfo, TargetProfile
from toolchain.targets.ncnn.convert import ELSEWHERE, Names, convert, converter
from toolchain.targets.ncnn.runner import NAME, OPTIONS, NcnnRunner

INSTALL = "pip install 'slimvit[ncnn]'"
TYPES = {"f32": "FLOAT", "f16": "HALF", "i8": "INT8"}
"""ncnn's types by the names that engine.json has for all targets."""
PRODUCTS = ("InnerProduct", "Gemm")
"""Its layers that are linears."""


class Ncnn(Target):
    """Target "ncnn".

    An fp32 file becomes an ncnn model that stores fp32, an fp16 file one that stores fp16; both are run in fp32, with every
    option off by which ncnn would compute in less on one processor and not on another. Multiples of 4 fill a 128-bit vector of
    fp32, the narrowest that its kernels use.
    """

    name = NAME
    profile = TargetProfile({"mlp_hidden": 4, "head_dim": 4, "rank": 4})
    takes = ("ncnn",)
    measures = True
    exact_fp32 = True
    loads = ("FLOAT", "HALF")
    builds = ("FLOAT", "HALF")

    def batches(self, options: BuildOptions) -> tuple[int, ...]:  # noqa: ARG002
        """One sample a call."""
        return (1,)

    def probe(self) -> TargetInfo:
        """The runtime and the CPU; raises TargetUnavailable if ncnn is missing. It is not imported: that is for its own process."""
        try:
            found = version("ncnn") if find_spec("ncnn") is not None else ""
        except PackageNotFoundError:
            found = ""
        if not found:
            raise TargetUnavailable(self.name, "the Python module ncnn is not installed", INSTALL)
        pnnx = converter()
        return TargetInfo(self.name, "ncnn", found, cpu_model(), {"pnnx": pnnx[1] if pnnx else "not installed"})

    def require(self, options: BuildOptions, precisions: Mapping[str, str]) -> None:  # noqa: ARG002  (the protocol's)
        """Nothing, if engines can be built with these options; see `Selective`.

        Raises:
            TargetUnavailable: pnnx is missing.
            RecipeError: batch 1 is not asked for.
        """
        if converter() is None:
            raise TargetUnavailable(self.name, "the package pnnx, which converts to ncnn, is not installed", INSTALL)
        if options.batch[0] != 1:
            raise RecipeError(
                f"ncnn runs one sample a call, and batches from {options.batch[0]} on are asked for; let engine.batch begin with 1, "
                "or take ncnn out of engine.targets"
            )

    def _build(self, onnx: Path, folder: Path, options: BuildOptions) -> EngineBuild:
        """`<stem>.param` and `<stem>.bin` in `folder`, run once as proof.

        Raises:
            ArtifactError: ncnn or pnnx has not all operators of the file, or ncnn crashes on what became of it.
            RecipeError: batch 1 is not asked for, or the file takes other inputs than ncnn does.
            TargetUnavailable: pnnx is missing.
            StorageError: a file cannot be read or written.
        """
        pnnx = converter()
        assert pnnx is not None
        source = open_artifact(onnx)
        signature = source.signature(1, options.input_shape)
        samples = {name: spec.shape[1:] for name, spec in zip(signature.names, signature.inputs, strict=True)}
        _require_inputs(onnx, signature)
        path = folder / f"{onnx.stem}.param"
        names = Names(samples, [port.name for port in source.outputs])
        half = source.precision.name == "fp16"
        renamed = convert(pnnx[0], onnx, path, names, fp16=half)
        try:
            shapes = _proof(path, samples)
            for port in source.outputs:
                _require_shape(port.name, shapes, port.shape)
        except ArtifactError as error:
            for file in (path, path.with_suffix(".bin")):
                file.unlink()
            raise ArtifactError(f"pnnx made no ncnn model of {onnx}: {error} {ELSEWHERE}") from error
        layers = read_layers(path)
        weights, _ = read_numbers(layers, files_of(path)[0])
        products = {layer.name for layer in layers if layer.kind in PRODUCTS}
        matrices = [each for each in weights if each.is_matrix and each.layer in products]
        facts = {
            "converter": f"pnnx {pnnx[1]}",
            "weights": dict(sorted(Counter(each.type for each in weights).items())),
            "matmul_dtypes": dict(Counter(TYPES[each.type] for each in matrices)),
            "matmul_layers": len(matrices),
            "batches": [1],
            "options": dict(OPTIONS),
            "renamed": renamed,
            "inputs": {name: [1, *sample] for name, sample in samples.items()},
            "outputs": shapes,
        }
        return EngineBuild(path, facts)

    def _open(self, path: Path, threads: int) -> Runner:
        """A runner of a .param; raises StorageError or ArtifactError on entry if it cannot be read."""
        return NcnnRunner(path, threads)


def _require_inputs(onnx: Path, signature: Signature) -> None:
    for name, spec in zip(signature.names, signature.inputs, strict=True):
        if spec.dtype not in ("float32", "float16"):
            hint = "; export it without export.preprocess" if spec.dtype == "uint8" else ""
            raise RecipeError(f"input {name!r} of {onnx} is {spec.dtype}, and ncnn takes float32 alone{hint}")
        if not 1 <= len(spec.shape) - 1 <= LARGEST_RANK:
            raise RecipeError(
                f"input {name!r} of {onnx} is {list(spec.shape)}; ncnn takes up to four sizes beside the batch"
            )


def _proof(path: Path, samples: Mapping[str, tuple[int, ...]]) -> dict[str, list[int]]:
    """Output → its shape, of one call on zeros; raises ArtifactError where ncnn cannot load it, or crashes."""
    zeros = {name: np.zeros((1, *sample), np.float32) for name, sample in samples.items()}
    with NcnnRunner(path, threads=1) as runner:
        return {name: list(array.shape) for name, array in runner.infer(zeros).items()}


def _require_shape(name: str, shapes: Mapping[str, list[int]], declared: tuple[int | str | None, ...] | None) -> None:
    """Raises ArtifactError where an output has another shape than the ONNX file says: pnnx misread a dimension."""
    got = shapes[name]
    wanted = [1, *(declared or got)[1:]]
    if len(got) != len(wanted) or any(
        isinstance(size, int) and size != own for size, own in zip(wanted, got, strict=True)
    ):
        raise ArtifactError(f"output {name!r} is {got}, expected {wanted}.")


NCNN = Ncnn()
