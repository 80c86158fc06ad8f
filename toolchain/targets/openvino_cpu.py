"""OpenVINO on the CPU, in fp32 and, where the CPU has it, bf16: it reads the ONNX file, which is the engine."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from toolchain.errors import ArtifactError, RecipeError, StorageError, TargetUnavailable, WorkloadRefused
from toolchain.foreign import imported, reason
from toolchain.on_device.runner import Runner, cpu_model, time_calls_ns
from toolchain.targets.base import (
    Array,
    Arrays,
    BuildOptions,
    EngineBuild,
    Feeds,
    NodeTime,
    Profiled,
    TargetInfo,
    TargetProfile,
)

if TYPE_CHECKING:
    import openvino

INSTALL = "pip install 'slimvit[openvino]'"
DEVICE = "CPU"
NAMES = {"f32": "FLOAT", "f16": "HALF", "bf16": "BF16"}
"""OpenVINO's types by the names that engine.json has for all targets."""
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class OpenVinoRunner:
    """An ONNX file in OpenVINO, one stream of `threads` threads, compiled for the shapes of the feeds.

    A dynamic batch is fixed before compiling: OpenVINO chooses other, slower kernels for shapes that it does not know.
    Pinning is off, so that the process's affinity decides where threads run, as it does in the other runtimes.
    """

    def __init__(self, path: Path, threads: int, precision: str, *, target: str, profiled: bool = False) -> None:
        self.path, self.threads, self.precision = path, threads, precision
        self._target, self._profiled = target, profiled
        self._core: Any = None
        self._model: Any = None
        self._requests: dict[Shapes, openvino.InferRequest] = {}

    def __enter__(self) -> Self:
        ov = _load(self._target)
        self._core = ov.Core()
        try:
            self._model = self._core.read_model(str(self.path))
        except RuntimeError as error:
            raise ArtifactError(f"OpenVINO {ov.__version__} cannot load {self.path}: {reason(error)}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._requests, self._model, self._core = {}, None, None

    def infer(self, feeds: Feeds) -> Arrays:
        """Output name → array for one call.

        Raises:
            RecipeError: the file has another fixed shape than the feeds.
            ArtifactError: OpenVINO cannot compile the file for their shapes.
            TargetUnavailable: it compiles it, but not with the precision, threads and streams that were asked for.
        """
        request = self.request(feeds)
        results = request.infer(self._fed(feeds), share_inputs=True)
        # A compiled port may have the name of a cast that was dropped as well: the model's own name is the right one.
        return {_called(port): _floats(port, results[index]) for index, port in enumerate(self._model.outputs)}

    def time_ns(self, feeds: Sequence[Feeds], samples: int) -> list[int]:
        """Wall time of each of `samples` synchronous calls in nanoseconds; arrays enter and leave without a copy.

        Raises:
            RecipeError: the feeds differ in their shapes, or as in `infer`.
        """
        if len({_shapes(feed) for feed in feeds}) > 1:
            raise RecipeError(f"{self.path}: one timing needs feeds of one shape, got {[_shapes(f) for f in feeds]}")
        call = functools.partial(self.request(feeds[0]).infer, share_inputs=True, share_outputs=True)
        return time_calls_ns(call, [self._fed(feed) for feed in feeds], samples)

    def node_times(self, feeds: Sequence[Feeds], calls: int) -> list[NodeTime]:
        """The time of every node that was executed in one of `calls` calls; the runner must be opened as profiled."""
        request = self.request(feeds[0])
        fed = [self._fed(feed) for feed in feeds]
        kinds: dict[str, str] = {}
        spent: defaultdict[str, list[float]] = defaultdict(list)
        for index in range(calls):
            request.infer(fed[index % len(fed)], share_inputs=True, share_outputs=True)
            for node in request.get_profiling_info():
                if node.status == node.Status.EXECUTED:
                    kinds[node.node_name] = node.node_type
                    spent[node.node_name].append(node.real_time.total_seconds() * 1e9)
        return [NodeTime.of_calls(name, kinds[name], took) for name, took in spent.items()]

    def request(self, feeds: Feeds) -> Any:
        """OpenVINO's own infer request, compiled for feeds of these shapes; raises as `infer` does."""
        if self._model is None:
            raise RuntimeError("OpenVinoRunner is used outside its `with` block")
        shapes = _shapes(feeds)
        if shapes not in self._requests:
            self._requests[shapes] = self._compile(shapes).create_infer_request()
        return self._requests[shapes]

    def _fed(self, feeds: Feeds) -> Any:
        """Position of each input → what it is fed: OpenVINO knows no input by the name of its node."""
        return {index: feeds[_called(port)] for index, port in enumerate(self._model.inputs)}

    def _compile(self, shapes: Shapes) -> Any:
        ov, given, model = _load(self._target), dict(shapes), self._model.clone()
        for port in model.inputs:
            name, declared = _called(port), port.partial_shape
            if name not in given or not declared.compatible(ov.PartialShape(list(given[name]))):
                got = list(given[name]) if name in given else "nothing"
                raise RecipeError(f"{self.path}: input {name!r} takes shape {declared}, got {got}")
        settings: dict[str, str | int | bool] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": self.precision,
            "ENABLE_CPU_PINNING": False,
        }
        try:
            model.reshape({index: list(given[_called(port)]) for index, port in enumerate(model.inputs)})
            compiled = self._core.compile_model(model, DEVICE, {**settings, "PERF_COUNT": self._profiled})
        except RuntimeError as error:
            raise ArtifactError(f"OpenVINO {ov.__version__} cannot compile {self.path}: {reason(error)}") from error
        self._require(compiled, settings)
        return compiled

    def _require(self, compiled: Any, settings: Mapping[str, str | int | bool]) -> None:
        """Raises TargetUnavailable if a setting reads back as another: the f16 hint, for one, quietly becomes bf16.

        That a setting reads back as itself proves less. On a CPU with AVX-512 and no bf16 the hint bf16 does, and is computed
        with instructions for fp32; the probe refuses that.
        """
        for name, setting in settings.items():
            taken = compiled.get_property(name)
            if name == "INFERENCE_PRECISION_HINT":
                taken = taken.to_string()
            if taken != setting:
                raise WorkloadRefused(
                    self._target, f"OpenVINO was asked for {name} = {setting!r} and runs with {taken!r}"
                )


class OpenVinoCpu(Profiled):
    """Target "openvino-cpu", or with another name the same in another precision.

    Preferred multiples fill a 256-bit vector, the narrowest that its x86 kernels use.

    Attributes:
        name: of the target.
        precision: of the arithmetic, as OpenVINO spells it: "f32" or "bf16".
    """

    takes = ("onnx", "openvino-ir")
    measures = True
    builds = ("FLOAT", "HALF", "BF16")

    def __init__(self, name: str, precision: str, lanes: int) -> None:
        self.name, self.precision = name, precision
        self.exact_fp32 = precision == "f32"
        self.loads = (*self.builds, *(() if precision == "bf16" else ("INT8", "INT8-DYNAMIC", "INT4-DYNAMIC")))
        self.profile = TargetProfile(dict.fromkeys(("mlp_hidden", "head_dim", "rank"), lanes))

    def probe(self) -> TargetInfo:
        """The runtime and the CPU; raises TargetUnavailable if openvino is missing or the CPU lacks the precision."""
        ov = _load(self.name)
        try:
            able = ov.Core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
        except RuntimeError as error:
            raise TargetUnavailable(self.name, f"OpenVINO has no CPU plugin here: {reason(error)}", INSTALL) from error
        if self.precision == "bf16" and "BF16" not in able:
            raise TargetUnavailable(
                self.name, f"{cpu_model()} has no bf16 instructions that OpenVINO uses (it has {', '.join(able)})"
            )
        version = str(ov.__version__).partition("-")[0]  # after it come the build and the branch
        return TargetInfo(self.name, "openvino", version, cpu_model(), {"precision": self.precision})

    def _build(self, onnx: Path, folder: Path, options: BuildOptions) -> EngineBuild:
        """OpenVINO's own format in `folder`, `<stem>.xml` and `<stem>.bin`: half the bytes, weights of fp32 rounded to fp16.

        Rounded or not, OpenVINO multiplies in the precision of the target: fp16 is how weights are stored.

        Raises:
            ArtifactError: OpenVINO cannot read the file, or a weight is beyond what fp16 holds.
            RecipeError: the file takes another shape than the one that is asked for.
            StorageError: the files cannot be written.
        """
        ov = _load(self.name)
        path = folder / f"{onnx.stem}.xml"
        try:
            model = ov.Core().read_model(str(onnx))
            if options.input_shape is not None:
                _fix_shape(ov, model, onnx, options.input_shape)
            largest = max((float(np.abs(op.data).max()) for op in _weights(model)), default=0.0)
            if largest > np.finfo(np.float16).max:
                raise ArtifactError(f"{onnx} holds a weight of {largest:.3g}, more than fp16 can")
        except RuntimeError as error:
            raise ArtifactError(f"OpenVINO {ov.__version__} cannot convert {onnx}: {reason(error)}") from error
        try:
            ov.save_model(model, str(path), compress_to_fp16=True)
            stored = ov.Core().read_model(str(path))
        except RuntimeError as error:
            raise StorageError(
                f"cannot write {path}: OpenVINO says {reason(error)!r}; see whether the disk has room, and may be written to"
            ) from error
        kinds: Counter[str] = Counter()
        for op in _weights(stored):
            kinds[op.get_element_type().get_type_name()] += 1
        products = [
            op.output(0).get_element_type().get_type_name() for op in stored.get_ops() if op.get_type_name() == "MatMul"
        ]
        facts = {
            "weights": dict(sorted(kinds.items())),
            "matmul_dtypes": dict(Counter(NAMES.get(kind, kind) for kind in products)),
            "matmul_layers": len(products),
        }
        return EngineBuild(path, facts)

    def _open(self, path: Path, threads: int) -> Runner:
        """A runner of an ONNX file or of OpenVINO's own .xml; raises ArtifactError on entry if it cannot be read."""
        return OpenVinoRunner(path, threads, self.precision, target=self.name)

    def _node_times(self, path: Path, threads: int, feeds: Sequence[Feeds], warm_up: int, calls: int) -> list[NodeTime]:
        """The mean time of every node over `calls` calls, after `warm_up` others."""
        with OpenVinoRunner(path, threads, self.precision, target=self.name, profiled=True) as runner:
            runner.time_ns(feeds, warm_up)
            return runner.node_times(feeds, calls)


def _fix_shape(ov: ModuleType, model: Any, onnx: Path, sample: tuple[int, ...]) -> None:
    """Fixes the shape of one sample of a model's one input; raises RecipeError if it takes another."""
    for port in model.inputs:
        declared = port.partial_shape
        dims = [str(dim) for dim in declared][1:] if declared.rank.is_static else []
        wanted = [declared[0], *sample] if dims else []
        if len(model.inputs) > 1 or not declared.compatible(ov.PartialShape(wanted)):
            raise RecipeError(
                f"{onnx}: input {_called(port)!r} takes {declared}, and --input-shape asks for {list(sample)} per "
                "sample; what is fixed stays as it is"
            )
        model.reshape({port: ov.PartialShape(wanted)})


def _weights(model: Any) -> list[Any]:
    """The constants of a model that hold floats, scalars apart."""
    floats = ("f32", "f16", "bf16")
    constants = [op for op in model.get_ops() if op.get_type_name() == "Constant" and len(op.get_output_shape(0))]
    return [op for op in constants if op.get_element_type().get_type_name() in floats]


def _load(target: str) -> ModuleType:
    return imported("openvino", target, INSTALL)


def _called(port: Any) -> str:
    """What an input or output is called: the first of its names, of which a converter may write many or none, else that of its node."""
    name: str = min(port.get_names(), default=port.get_node().get_friendly_name())
    return name


def _floats(port: Any, values: Array) -> Array:
    """The values of an output. numpy has no bf16, and OpenVINO gives the bits of its numbers as if they were of fp16."""
    if port.get_element_type().get_type_name() != "bf16" or values.dtype != np.float16:
        return values
    widened: Array = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return widened


def _shapes(feeds: Feeds) -> Shapes:
    return tuple((name, np.shape(array)) for name, array in sorted(feeds.items()))


OPENVINO_CPU = OpenVinoCpu("openvino-cpu", "f32", lanes=8)
OPENVINO_CPU_BF16 = OpenVinoCpu("openvino-cpu-bf16", "bf16", lanes=16)
