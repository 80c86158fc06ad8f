"""Core ML: packages for Apple's devices, built on any system by coremltools from the ONNX file. Nothing of it runs here.

A package is compared with its file by an interpreter of its program, which is not the arithmetic of a device; latency is not
measured. A target for iOS 18 and macOS 15, whose programs hold int8 weights with a scale for each output.
"""

from __future__ import annotations

import platform
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.artifacts.onnx_plain import Codes, plain
from toolchain.errors import ArtifactError, RecipeError
from toolchain.foreign import imported
from toolchain.interpreter import GraphModule, graph_of, module_of
from toolchain.interpreter.mil import MilProgram
from toolchain.on_device.runner import Runner
from toolchain.quiet import quiet
from toolchain.targets.base import (
    BuildOptions,
    Computation,
    EngineBuild,
    Interpreted,
    TargetInfo,
    TargetProfile,
)

INSTALL = "pip install 'slimvit[coreml]'"
MINIMUM = "iOS18"
NO_RUN = "needs macOS: Core ML computes on Apple's devices alone; slimvit builds packages and interprets them"
DEBRIS = "executorch_debug_handle_mapping.json"
"""What coremltools writes beside a converted program, and no package needs."""
ARITHMETIC = {"fp32": "FLOAT32", "fp16": "FLOAT16", "int8-dynamic": "FLOAT16"}
"""Precision of an ONNX file → what a package of it computes in, by coremltools' name."""
NAMES = {"fp16": "HALF", "fp32": "FLOAT"}
"""MIL's types by the names that engine.json has for all targets."""


class CoreMl(Interpreted):
    """Target "coreml": packages of a fixed batch; those with fp16 arithmetic are what the Neural Engine takes.

    It has no preferred multiples: which widths are fast on Apple's devices was never measured.
    """

    name = "coreml"
    takes = ("mlpackage",)
    measures = False
    uses_threads = False
    loads = ("FLOAT", "HALF")
    exact_fp32 = True
    builds = ("FLOAT", "HALF", "INT8-DYNAMIC")
    engine_products = MappingProxyType({"INT8-DYNAMIC": "HALF"})
    max_abs = MappingProxyType({"fp16": 1e-3})
    profile = TargetProfile()
    never_run = "no package of it has ever been loaded by Core ML: no Apple device was at hand"
    interpreter = "interpreted in torch (not the Neural Engine's arithmetic)"

    def batches(self, options: BuildOptions) -> tuple[int, ...]:
        """The middle one of the profile: Core ML's programs have one batch."""
        return (options.batch[1],)

    def probe(self) -> TargetInfo:
        """The converter; raises TargetUnavailable if coremltools is missing or cannot read weights."""
        ct = _load()
        details = {"build": "yes", "run": f"no: {NO_RUN}"}
        return TargetInfo(self.name, "coremltools", str(ct.__version__), f"none ({platform.system()})", details)

    def _build(self, onnx: Path, folder: Path, options: BuildOptions) -> EngineBuild:
        """`<stem>.mlpackage` in `folder`: weights and arithmetic of the file's type, inputs and outputs of fp32 under its names.

        Weights that the file holds as int8 stay the same integers; activations, which an int8-dynamic file rounds, are fp16.
        The batch is fixed: the file's own, else the middle one of the profile. The file's metadata becomes the package's.

        Raises:
            ArtifactError: the file cannot be read, is of another precision, or coremltools cannot convert it.
            RecipeError: the file takes something else than floats, or another shape than the one that is asked for.
        """
        source, converter = OnnxFile(onnx), f"coremltools {_load().__version__}"
        inputs = _example(source, options)
        if (arithmetic := ARITHMETIC.get(source.precision.name)) is None:
            raise ArtifactError(f"{onnx} is {source.precision}; packages are built from {', '.join(ARITHMETIC)}")
        content = plain(graph_of(onnx))
        module = module_of(content.model)
        codes = quantised(module, content.codes)
        path = folder / f"{onnx.stem}.mlpackage"
        with quiet("coremltools"):
            try:
                _convert(module, inputs, source.metadata, arithmetic, path)
            except Exception as error:  # torch's and coremltools' own have no common base
                traceback.clear_frames(error.__traceback__)  # which hold temporary folders
                first = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise ArtifactError(f"{converter} cannot convert {onnx}: {first}") from error
        program = MilProgram(path)
        if (program.input_names, program.output_names) != (module.input_names, module.output_names):
            has = ", ".join((*program.input_names, *program.output_names))
            raise ArtifactError(f"{converter} renamed inputs or outputs of {onnx}: the package has {has}")
        require_codes(program, codes)
        products = Counter(NAMES.get(kind, kind) for kind in program.products.elements())
        facts = {
            "minimum_deployment_target": MINIMUM,
            "batches": [next(iter(inputs.values())).shape[0]],
            "weights": dict(sorted(program.weights.items())),
            "matmul_dtypes": dict(products),
            "matmul_layers": products.total(),
            "operators": dict(program.operators.most_common()),
            "loaded": "not_run",
            "loaded_reason": NO_RUN,
        }
        return EngineBuild(path, facts)

    def _interpret(self, path: Path, *, rounded: bool) -> Computation:
        """The program of a package; raises ArtifactError for an operator that is not understood."""
        return MilProgram(path, rounded=rounded)

    def _open(self, path: Path, threads: int) -> Runner:
        raise NotImplementedError(NO_RUN)


def _example(source: OnnxFile, options: BuildOptions) -> dict[str, torch.Tensor]:
    """Input name → zeros in the shape that a package of the file takes."""
    fixed = next((port.shape[0] for port in source.inputs if port.shape and isinstance(port.shape[0], int)), None)
    signature = source.signature(fixed or COREML.batches(options)[0], options.input_shape)
    for name, spec in zip(signature.names, signature.inputs, strict=True):
        if spec.dtype != "float32":
            raise RecipeError(
                f"input {name!r} of {source.path} is {spec.dtype}; Core ML takes float32: export without pixels"
            )
    return {name: torch.zeros(spec.shape) for name, spec in zip(signature.names, signature.inputs, strict=True)}


class Dequantised(nn.Module):
    """Codes [out, in] → the weight that they stand for, by the operator that coremltools keeps as int8."""

    scale: Tensor
    zero: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        from torch.ao.quantization.fx import _decomposed  # noqa: F401 - registers the operator

        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros(len(scale), dtype=torch.int8))

    def forward(self, codes: Tensor) -> Tensor:
        weight: Tensor = torch.ops.quantized_decomposed.dequantize_per_channel(
            codes, self.scale, self.zero, 0, -128, 127, torch.int8
        )
        return weight


def quantised(module: GraphModule, codes: Mapping[str, Codes]) -> list[Codes]:
    """The int8 weights of a module in its order; they are codes and scales there afterwards, where they were products.

    Args:
        module: of the plain graph.
        codes: its matrices that the file stores as int8.
    """
    stored = {attribute: codes[name] for attribute, name in module.stored.items() if name in codes}
    for attribute, each in stored.items():
        delattr(module, attribute)
        turned = torch.from_numpy(np.array(each.codes.T, order="C"))
        module.register_parameter(attribute, nn.Parameter(turned, requires_grad=False))
        scales = torch.from_numpy(np.array(each.scales))
        parametrize.register_parametrization(module, attribute, Dequantised(scales), unsafe=True)
    return [*stored.values()]


def require_codes(program: MilProgram, expected: Sequence[Codes]) -> None:
    """Nothing, if the int8 weights of a package are these: integer for integer, and the scales as fp16 rounds them.

    Raises:
        ArtifactError: names the first that is not.
    """
    got = program.codes
    if len(got) != len(expected):
        raise ArtifactError(f"{program.path} has {len(got)} int8 weights, and its file {len(expected)}")
    for (name, (codes, scale)), wanted in zip(got.items(), expected, strict=True):
        if not np.array_equal(codes, wanted.codes.T):
            raise ArtifactError(
                f"{program.path}: the int8 weight of {name!r} is not that of the file it was built from"
            )
        used = wanted.codes.any(axis=0)
        small = ~np.isclose(np.ravel(scale).astype(np.float32), wanted.scales, rtol=2**-10, atol=0)
        if (small & used).any() or not np.array_equal(np.ravel(scale), wanted.scales.astype(np.float16)):
            raise ArtifactError(f"{program.path}: the scales of {name!r} are not those of the file it was built from")


def _convert(
    module: GraphModule, inputs: Mapping[str, torch.Tensor], metadata: Mapping[str, str], arithmetic: str, path: Path
) -> None:
    """Writes the package of a module, with the names of its file and what that says about itself."""
    ct = _load()
    program = torch.export.export(module, tuple(inputs.values())).run_decompositions(
        {torch.ops.aten.reciprocal.default: _quotient}
    )
    converted = ct.convert(
        program,
        minimum_deployment_target=ct.target[MINIMUM],
        compute_precision=ct.precision[arithmetic],
        outputs=[ct.TensorType(name=name, dtype=np.float32) for name in module.output_names],
        skip_model_load=True,
    )
    spec = converted.get_spec()
    for given, name in zip([each.name for each in spec.description.input], module.input_names, strict=True):
        ct.utils.rename_feature(spec, given, name)
    spec.description.metadata.userDefined.update(metadata)
    ct.models.MLModel(spec, weights_dir=converted.weights_dir, skip_model_load=True).save(str(path))
    (path / DEBRIS).unlink(missing_ok=True)


def _quotient(x: Tensor) -> Tensor:
    """1 / x as a division: the operator that coremltools makes of a reciprocal adds 1e-4 to x."""
    return torch.full((1,), 1.0) / x


def _load() -> ModuleType:
    """The Python module; raises TargetUnavailable if it is missing, broken, or without the part that reads weights."""
    with quiet("coremltools"):
        imported("coremltools.libmilstoragepython", "coreml", INSTALL)
        return imported("coremltools", "coreml", INSTALL)


COREML = CoreMl()
