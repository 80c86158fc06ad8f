"""LiteRT on the CPU: .tflite files in fp32, with fp16 weights, or with int8 linears, computed by XNNPACK."""

from __future__ import annotations

import importlib
import logging
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from toolchain.errors import ArtifactError, TargetUnavailable
from toolchain.foreign import imported
from toolchain.on_device.runner import LiteRtRunner, Runner, cpu_model
from toolchain.quiet import quiet_unless_failed
from toolchain.targets.base import (
    BuildOptions,
    EngineBuild,
    Target,
    TargetInfo,
    TargetProfile,
)
from toolchain.targets.checked import Checked
from toolchain.targets.litert.converter import Converter

log = logging.getLogger(__name__)
NAME = "litert-cpu"
WEIGHTS = {"FLOAT": "float32", "HALF": "float16", "INT8-DYNAMIC": "int8"}
"""Type of a product → LiteRT's name of its weight's."""
INSTALL = "pip install 'slimvit[litert]'"
RUNTIME = "ai_edge_litert.interpreter"


class LiteRtCpu(Target):
    """Target "litert-cpu". Multiples of 8 fill a 256-bit vector of fp32; int8 kernels of x86 and Arm take groups of 4 and 8.

    Files are built where an interpreter for that is named, and run wherever ai-edge-litert is.
    """

    name = NAME
    profile = TargetProfile(dict.fromkeys(("mlp_hidden", "head_dim", "rank"), 8))
    takes = ("tflite",)
    measures = True
    exact_fp32 = True
    loads = builds = ("FLOAT", "HALF", "INT8-DYNAMIC")

    def batches(self, options: BuildOptions) -> tuple[int, ...]:
        """Exactly the batches of the options."""
        return tuple(sorted(set(options.batch)))

    def probe(self) -> TargetInfo:
        """The runtime and the CPU, and whether files can be built here; raises TargetUnavailable if ai-edge-litert is missing."""
        imported(RUNTIME, NAME, INSTALL)
        details, missing = {"delegate": "XNNPACK"}, ""
        try:
            details["convert"] = ", ".join(f"{name} {each}" for name, each in Converter.found(NAME).versions.items())
        except TargetUnavailable as error:
            details["convert"], missing = f"no: {error.reason}", error.install
        return TargetInfo(NAME, "ai-edge-litert", version("ai-edge-litert"), cpu_model(), details, missing)

    def require(self, options: BuildOptions, precisions: Mapping[str, str]) -> None:  # noqa: ARG002 - as for every target
        """Raises TargetUnavailable where nothing is there to convert with, with the lines that bring it."""
        imported(RUNTIME, NAME, INSTALL)
        Converter.found(NAME)

    def _build(self, onnx: Path, folder: Path, options: BuildOptions) -> EngineBuild:
        """`<stem>.tflite`, with a signature for each batch of the options; its weights have the precision of the ONNX file.

        Raises:
            TargetUnavailable: there is no interpreter to convert with.
            ArtifactError: the file cannot be read or converted, or the weights of what came out are others.
            RecipeError: the file takes another shape than the one that is asked for, or leaves it open.
        """
        from toolchain.targets.litert.program import Source  # not in a process that only runs files
        from toolchain.targets.litert.weights import require_weights

        converter = Converter.found(NAME)
        source, batches = Source.of(onnx), self.batches(options)
        path = folder / f"{onnx.stem}.tflite"
        with tempfile.TemporaryDirectory(prefix="slimvit-litert-") as work:
            source.save(Path(work), batches, options.input_shape)
            converter.convert(Path(work), onnx)
            shutil.copyfile(Path(work, "model.tflite"), path)
        products = require_weights(source, path)
        delegated = fully_delegated(path)
        if not delegated:
            log.warning("%s: XNNPACK does not take all operators; the others run on LiteRT's own kernels", path.name)
        facts = {
            "converted_by": dict(converter.versions),
            "batches": list(batches),
            "constant_linears": source.constant_linears,
            "weights": {WEIGHTS.get(kind, kind): count for kind, count in products.items()},
            "matmul_dtypes": products,
            "matmul_layers": sum(products.values()),
            "fully_delegated": delegated,
        }
        return EngineBuild(path, facts)

    def _open(self, path: Path, threads: int) -> Runner:
        """A runner of a .tflite file; raises ArtifactError on entry if it cannot be loaded."""
        return Checked(LiteRtRunner(str(path), threads), path, NAME, f"LiteRT {version('ai-edge-litert')}")


def fully_delegated(path: Path) -> bool:
    """Whether XNNPACK takes every operator of every signature of a file; raises ArtifactError if LiteRT cannot load it."""
    imported(RUNTIME, NAME, INSTALL)
    try:
        with quiet_unless_failed():
            return _accelerated(path)
    except (ValueError, RuntimeError) as error:
        raise ArtifactError(f"LiteRT {version('ai-edge-litert')} cannot load {path}: {error}") from error


def _accelerated(path: Path) -> bool:
    """A function of its own: what it opens ends with it, and says so."""
    compiled = importlib.import_module("ai_edge_litert.compiled_model")
    with compiled.CompiledModel.from_file(str(path)) as model:
        return bool(model.is_fully_accelerated())


LITERT_CPU = LiteRtCpu()
