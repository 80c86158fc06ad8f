"""ExecuTorch with XNNPACK on the CPU: .pte files in fp32, or with int8 linears whose activations are rounded in each call."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from toolchain.errors import TargetUnavailable
from toolchain.files import atomic_path
from toolchain.on_device.runner import ExecuTorchRunner, Runner, cpu_model, executorch_runtime
from toolchain.quiet import quiet
from toolchain.targets.base import BuildOptions, EngineBuild, Target, TargetInfo, TargetProfile
from toolchain.targets.checked import Checked

NAME = "executorch-xnnpack"
INSTALL = "pip install 'slimvit[executorch]'"
MODULES = ("executorch.runtime", "executorch.exir")
WEIGHTS = {"FLOAT": "float32", "INT8-DYNAMIC": "int8"}
"""Type of a product → the type of its stored weight."""


class ExecuTorchXnnpack(Target):
    """Target "executorch-xnnpack". Multiples of 8 fill a 256-bit vector of fp32, and a group of XNNPACK's int8 kernels.

    Files are run by the runtime for Python, which needs torch wherever it runs.
    """

    name = NAME
    profile = TargetProfile(dict.fromkeys(("mlp_hidden", "head_dim", "rank"), 8))
    takes = ("pte",)
    measures = True
    exact_fp32 = True
    loads = builds = ("FLOAT", "INT8-DYNAMIC")

    def batches(self, options: BuildOptions) -> tuple[int, ...]:
        """Exactly the batches of the options."""
        return tuple(sorted(set(options.batch)))

    def probe(self) -> TargetInfo:
        """The runtime and the CPU; raises TargetUnavailable if executorch is missing, or has no XNNPACK."""
        for module in MODULES:
            if not _is_there(module):
                raise TargetUnavailable(NAME, f"the Python module {module} is not installed", INSTALL)
        try:
            _, runtime = executorch_runtime()
        except (ImportError, OSError) as error:
            raise TargetUnavailable(NAME, f"executorch cannot be loaded ({error})", INSTALL) from error
        if not runtime.get().backend_registry.is_available("XnnpackBackend"):
            raise TargetUnavailable(NAME, "this build of executorch has no XNNPACK", INSTALL)
        version = importlib.metadata.version("executorch")
        return TargetInfo(
            NAME,
            "executorch",
            version,
            cpu_model(),
            {"delegate": "XNNPACK"},
        )

    def _build(self, onnx: Path, folder: Path, options: BuildOptions) -> EngineBuild:
        """`<stem>.pte` in `folder`, with a method for each batch of the options.

        Raises:
            StorageError, ArtifactError: a file cannot be read, written or lowered, or a linear is left outside of XNNPACK.
            RecipeError: the file has another precision or shape than can be built.
        """
        from toolchain.targets.executorch.program import program_of  # not in a process that only runs files

        with quiet("torch.utils._pytree"):
            program = program_of(onnx, options.batch, options.input_shape)
        path = folder / f"{onnx.stem}.pte"
        with atomic_path(path) as temporary:
            temporary.write_bytes(program.content)
        facts = {
            "batches": [*program.methods],
            "methods": {
                each.name: {"batch": batch, "delegates": each.delegates, "outside": each.outside}
                for batch, each in program.methods.items()
            },
            "weights": {WEIGHTS[kind]: count for kind, count in program.products.items()},
            "matmul_dtypes": program.products,
            "matmul_layers": sum(program.products.values()),
        }
        return EngineBuild(path, facts)

    def _open(self, path: Path, threads: int) -> Runner:
        """A runner of a .pte file; raises ArtifactError on entry if it cannot be loaded."""
        runtime = f"ExecuTorch {importlib.metadata.version('executorch')}"
        return Checked(ExecuTorchRunner(str(path), threads), path, NAME, runtime)


def _is_there(module: str) -> bool:
    """Whether a module is installed; its package is imported, and it is not: ExecuTorch's compiler takes seconds."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


EXECUTORCH_XNNPACK = ExecuTorchXnnpack()
