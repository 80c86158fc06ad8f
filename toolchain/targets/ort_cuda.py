"""ONNX Runtime on an NVIDIA GPU: its CUDA provider or nothing; what quietly runs on the CPU instead is refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library loads
import onnx as onnxlib
import onnxruntime as ort
import torch
from onnx_ir import DataType
from onnx_ir.tensor_adapters import from_torch_dtype, to_torch_dtype

from toolchain.errors import ArtifactError, TargetUnavailable
from toolchain.on_device.runner import Runner, ort_options
from toolchain.targets.base import Feeds, Target, TargetInfo, TargetProfile
from toolchain.targets.gpu import GpuRunner, local_gpu, no_gpu, to_host
from toolchain.targets.mode import EVERY_MODE, Mode

NAME = "ort-cuda"
INSTALL = "pip uninstall --yes onnxruntime && pip install 'onnxruntime-gpu>=1.24'"
"""The two wheels are one Python module: with both installed, the one that came last is there."""
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
NO_GRAPH = -1
"""The graph id of a run that is neither captured nor replayed."""
RUNS_UNTIL_CAPTURED = 4
"""Two ordinary runs, the one that captures, and one to spare."""
SHAPE_OPS = frozenset(
    {"Shape", "Size", "Gather", "Concat", "Squeeze", "Unsqueeze", "Slice", "Cast", "Range", "Constant"}
    | {"ConstantOfShape", "Equal", "Where", "Identity"}
)
"""What computes shapes. ONNX Runtime keeps it on the CPU on purpose: those values are read by the host."""
SHAPE_TYPES = (onnxlib.TensorProto.INT32, onnxlib.TensorProto.INT64, onnxlib.TensorProto.BOOL)
"""The types of shapes, and of what is computed of them."""


class OrtCudaRunner(GpuRunner):
    """An ONNX file on the CUDA provider, on a stream of torch's, without the provider's own synchronisation."""

    def __init__(self, path: Path, mode: Mode, *, target: str) -> None:
        super().__init__(mode)
        self.path, self._target = path, target
        self._session: Any = None
        self._graphs = 0

    def __enter__(self) -> Self:
        super().__enter__()
        options = ort_options(ort, threads=1)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        # TF32 off: a file in fp32 is timed in fp32, as on the other targets.
        settings = {
            "user_compute_stream": str(self._stream.cuda_stream),
            "use_tf32": "0",
            "enable_cuda_graph": str(int(self.mode.graph)),
        }
        try:
            self._session = ort.InferenceSession(str(self.path), options, providers=[(CUDA, settings)])
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            raise ArtifactError(f"ONNX Runtime {ort.__version__} cannot load {self.path}: {error}") from error
        require_cuda(self._target, self.path, self._session.get_providers(), placed(self._session))
        return self

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        self._session = None

    def launch(self, feeds: Feeds) -> _OrtLaunch:
        """A call on these inputs; the outputs' shapes are learned by running it once."""
        if self._session is None:
            raise RuntimeError("OrtCudaRunner is used outside its `with` block")
        inputs = {i.name: to_host(feeds[i.name], torch_dtype(i.type)).to("cuda") for i in self._session.get_inputs()}
        first = self._session.io_binding()
        for name, tensor in inputs.items():
            _bind(first.bind_input, name, tensor)
        kinds = {output.name: torch_dtype(output.type) for output in self._session.get_outputs()}
        for name in kinds:
            first.bind_output(name, "cuda")
        self._stream.synchronize()
        self._session.run_with_iobinding(first, _run_options(NO_GRAPH, synchronise=True))
        shapes = [value.shape() for value in first.get_outputs()]
        outputs = {
            name: torch.empty(tuple(shape), dtype=dtype, device="cuda")
            for (name, dtype), shape in zip(kinds.items(), shapes, strict=True)
        }
        self._graphs += 1
        return _OrtLaunch(self._session, inputs, outputs, graph=self._graphs if self.mode.graph else NO_GRAPH)


class _OrtLaunch:
    """One call with everything bound to fixed addresses."""

    def __init__(
        self, session: Any, inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], *, graph: int
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._session, self._binding = session, session.io_binding()
        for name, tensor in inputs.items():
            _bind(self._binding.bind_input, name, tensor)
        for name, tensor in outputs.items():
            _bind(self._binding.bind_output, name, tensor)
        self._options = _run_options(graph, synchronise=False)

    def enqueue(self) -> None:
        self._session.run_with_iobinding(self._binding, self._options)

    def captured(self) -> Callable[[], object]:
        """The same call: the provider captures by itself, after some runs of one graph id, and replays from then on."""
        for _ in range(RUNS_UNTIL_CAPTURED):
            self.enqueue()
        return self.enqueue


def _run_options(graph: int, *, synchronise: bool) -> Any:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    options.add_run_config_entry("disable_synchronize_execution_providers", "0" if synchronise else "1")
    return options


def _bind(bind: Any, name: str, tensor: torch.Tensor) -> None:
    element = int(from_torch_dtype(tensor.dtype))
    bind(name, "cuda", tensor.device.index or 0, element, tuple(tensor.shape), tensor.data_ptr())


def torch_dtype(text: str) -> torch.dtype:
    """ONNX Runtime's "tensor(float16)" as torch's type."""
    return to_torch_dtype(DataType[text.removeprefix("tensor(").removesuffix(")").upper()])


def placed(session: Any) -> dict[str, list[tuple[str, str]]]:
    """Provider → (name, operator) of each node that it was given."""
    found: dict[str, list[tuple[str, str]]] = {}
    for part in session.get_provider_graph_assignment_info():
        found.setdefault(part.ep_name, []).extend((node.name, node.op_type) for node in part.get_nodes())
    return found


def require_cuda(
    target: str, path: Path, providers: Sequence[str], nodes: Mapping[str, Sequence[tuple[str, str]]]
) -> None:
    """Nothing, if a session does its work on the GPU.

    Args:
        target: name of the target, for the message.
        path: the ONNX file.
        providers: those that the session ended up with.
        nodes: provider → (name, operator), as `placed` gives it.

    Raises:
        TargetUnavailable: the CUDA provider could not be loaded and the CPU took its place.
        ArtifactError: nodes other than those that compute shapes were left to the CPU.
    """
    if CUDA not in providers:
        raise TargetUnavailable(
            target, f"ONNX Runtime could not load its CUDA provider and fell back to {', '.join(providers)}", INSTALL
        )
    integers = _integer_nodes(path)
    left = [(n, op) for n, op in nodes.get(CPU, ()) if op not in SHAPE_OPS and (n, op) not in integers]
    if left:
        few = ", ".join(f"{op} {name}" for name, op in left[:5])
        raise ArtifactError(
            f"{path}: {len(left)} nodes run on the CPU under {target}: {few}. Its time would be that of the CPU and of "
            "copies; time it on ort-cpu, or export it with operators that the CUDA provider has."
        )
    if not nodes.get(CUDA):
        raise ArtifactError(f"{path}: no node runs on the GPU under {target}")


def _integer_nodes(path: Path) -> set[tuple[str, str]]:
    """(name, operator) of the nodes that compute shapes: of all that are called so every output is such a number.

    As far as shape inference tells. Nodes need not have names, and those without one are called alike.
    """
    try:
        model = onnxlib.shape_inference.infer_shapes(onnxlib.load(path, load_external_data=False))
    except Exception:  # noqa: BLE001 - what cannot be told is not excused
        return set()
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    nodes = [(node, (node.name, node.op_type)) for node in model.graph.node]
    others = {called for node, called in nodes if any(kinds.get(name, 0) not in SHAPE_TYPES for name in node.output)}
    return {called for _, called in nodes} - others


class OrtCuda(Target):
    """Target "ort-cuda", in one of the modes of `gpu`; multiples of 8 are what fp16 tensor cores take.

    It was run on an H100 once, in modes that there were then; docs/targets.md says what was seen.
    """

    profile = TargetProfile({"mlp_hidden": 8, "head_dim": 8, "rank": 8})
    takes = ("onnx",)
    measures = True
    uses_threads = False
    modes = EVERY_MODE
    exact_fp32 = True  # the session switches TF32 off
    loads = ("FLOAT", "HALF")

    def __init__(self, mode: Mode = Mode()) -> None:  # noqa: B008 - frozen
        self.mode, self.name = mode, NAME + mode.suffix

    def in_mode(self, mode: Mode) -> OrtCuda:
        """The same runtime, timed in another mode, which its name tells."""
        return OrtCuda(mode)

    def probe(self) -> TargetInfo:
        """The runtime and the GPU.

        Raises:
            TargetUnavailable: this onnxruntime has no CUDA provider or is too old to tell where nodes run, or there is
                no GPU.
        """
        if CUDA not in ort.get_available_providers():
            raise TargetUnavailable(self.name, f"onnxruntime {ort.__version__} is built without CUDA", INSTALL)
        if not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
            reason = f"onnxruntime {ort.__version__} cannot tell on which device a node runs"
            raise TargetUnavailable(self.name, reason, INSTALL)
        if (missing := no_gpu()) is not None:
            raise TargetUnavailable(self.name, missing)
        return TargetInfo(self.name, "onnxruntime", ort.__version__, local_gpu())

    def _open(self, path: Path, threads: int) -> Runner:  # noqa: ARG002
        """A runner of the ONNX file; `threads` is a matter of CPUs and has no meaning here."""
        return OrtCudaRunner(path, self.mode, target=self.name)


ORT_CUDA = OrtCuda()
