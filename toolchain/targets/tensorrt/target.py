"""TensorRT and TensorRT for RTX: one code path, parameterised by the Python module, strongly typed networks only.

Precision lives in the ONNX graph; the builder is never asked for one. TensorRT for RTX builds ahead of time, without any
GPU; one engine file holds every compute capability that was asked for. TensorRT proper builds on the GPU it is for.
Running an engine needs a GPU in both, and is never replaced by a number from elsewhere.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from toolchain.errors import ArtifactError, RecipeError, TargetUnavailable
from toolchain.files import atomic_path, read_json, sha256
from toolchain.foreign import imported
from toolchain.on_device.runner import Runner
from toolchain.targets.base import (
    BuildOptions,
    EngineBuild,
    Refittable,
    TargetInfo,
    TargetProfile,
)
from toolchain.targets.engine_cache import cached_engine
from toolchain.targets.gpu import local_capability, local_gpu, no_gpu
from toolchain.targets.mode import EVERY_MODE, Mode
from toolchain.targets.tensorrt.network import census, inspected, is_strongly_typed, parse
from toolchain.targets.tensorrt.options import (
    CHOSEN,
    BuiltEngine,
    opened_runtime,
    refitted,
    require_options,
    require_products,
    set_options,
    timing_cache,
)
from toolchain.targets.tensorrt.runner import OnnxTrtRunner, TrtRunner, forwarding_logger

log = logging.getLogger(__name__)
HALF = "HALF"


class TensorRT(Refittable):
    """A target on one of NVIDIA's two runtimes; engines were built with it, and none was ever run here for want of a GPU.

    `open` runs an engine, or an ONNX file: of that, an engine for this GPU and exactly the batch of the feeds is built
    and kept in the user's cache, so that a baseline and its control, and all sessions, time one and the same engine.

    Attributes:
        name: of the target.
        module: Python module with the TensorRT API.
        minimum: the oldest (major, minor) that is strongly typed all the way.
        install: the line that brings the module.
        ahead_of_time: whether engines are built without a GPU, for named compute capabilities.
        mode: how calls are timed.
    """

    profile = TargetProfile({"mlp_hidden": 8, "head_dim": 8, "rank": 8})  # fp16 tensor cores
    takes = ("onnx", "tensorrt-engine")
    measures = True
    uses_threads = False
    modes = EVERY_MODE
    never_run = "no engine of it has ever been run: no GPU that it is for was at hand"
    loads = builds = ("FLOAT", "HALF", "BF16", "INT8")

    def __init__(
        self,
        name: str,
        module: str,
        *,
        minimum: tuple[int, int],
        install: str,
        ahead_of_time: bool,
        mode: Mode = Mode(),  # noqa: B008 - frozen
    ) -> None:
        self.name, self.module, self.minimum = name, module, minimum
        self.install, self.ahead_of_time, self.mode = install, ahead_of_time, mode

    def in_mode(self, mode: Mode) -> TensorRT:
        """The same runtime, timed in another mode, which its name tells."""
        return TensorRT(
            self.name + mode.suffix,
            self.module,
            minimum=self.minimum,
            install=self.install,
            ahead_of_time=self.ahead_of_time,
            mode=mode,
        )

    def probe(self) -> TargetInfo:
        """The module, the GPU if there is one, and in `details` what can be done with them: "build" and "run".

        Raises:
            TargetUnavailable: engines can neither be built nor run here.
        """
        trt = self._load()
        missing, no_device = self._cannot_run(trt), no_gpu()
        if missing is not None and not self.ahead_of_time:
            raise TargetUnavailable(self.name, missing)
        return TargetInfo(
            target=self.name,
            runtime=self.module,
            version=str(trt.__version__),
            device="none" if no_device else local_gpu(),
            details={
                "build": "yes (ahead of time)" if self.ahead_of_time else "yes (for this GPU)",
                "run": f"no: {missing}" if missing else "yes",
            },
        )

    def require(self, options: BuildOptions, precisions: Mapping[str, str]) -> None:
        """Nothing, if engines of these precisions, whose matrix products have these types, can be built with these options.

        Raises:
            TargetUnavailable: the module is missing, or stripped engines need a driver.
            RecipeError: there are no such engines.
        """
        if self.ahead_of_time:
            capabilities = tuple(self._capabilities(self._load(), options.compute_capabilities))
            require_options(self.name, replace(options, compute_capabilities=capabilities))
            others = ", ".join(name for name, product in precisions.items() if product != HALF)
            require_products(self.name, capabilities, others and f"engines in {others} are asked for")

    def _build(self, onnx: Path, folder: Path, options: BuildOptions) -> EngineBuild:
        """The engine `<stem>.<smXX-smYY>.engine` in `folder`, with the facts of its build.

        Where engines are built ahead of time it holds all of `options.compute_capabilities`, else this GPU's only.

        Raises:
            TargetUnavailable: stripped engines need a driver.
            RecipeError: the module cannot build for a capability, or not in the file's types, or none was named and there is
                no GPU.
            ArtifactError: TensorRT refuses the ONNX file, or does not load its own engine.
            StorageError: a file cannot be read or written.
        """
        trt, logger = self._load(), forwarding_logger(self.module)
        logger.errors.clear()

        builder = trt.Builder(logger)
        network, parser = parse(trt, builder, logger, onnx)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # costs no byte; the inspector needs it
        shapes = self._profile_shapes(network, onnx, options.batch, options.input_shape)
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in shapes.items():
            profile.set_shape(name, smallest, usual, largest)
        if shapes and config.add_optimization_profile(profile) < 0:
            raise ArtifactError(f"{self.module} refuses the optimization profile {shapes} for {onnx}")
        products = census(trt, network)
        if self.ahead_of_time:
            known = self._capabilities(trt, options.compute_capabilities)
            capabilities = tuple(known)
            others = ", ".join(sorted(set(products.matmul_dtypes) - {HALF}))
            require_products(self.name, capabilities, others and f"{onnx.name} has products in {others}")
            config.num_compute_capabilities = len(known)
            for index, value in enumerate(known.values()):
                config.set_compute_capability(value, index)
        else:
            capabilities = (local_capability(),)
            if options.compute_capabilities:
                log.info("%s builds for this machine's GPU alone (%s)", self.name, *capabilities)
        set_options(trt, config, options)
        with timing_cache(trt, config, None if self.ahead_of_time else local_capability()):
            serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            raise ArtifactError(f"{self.module} {trt.__version__} cannot build {onnx}: {logger.last_error()}")
        del parser
        engine = bytes(serialized)
        loaded = self._inspect(trt, engine, capabilities, options)
        suffix = "-".join(f"sm{capability.replace('.', '')}" for capability in capabilities)
        path = folder / f"{onnx.stem}.{suffix}.engine"
        with atomic_path(path) as temporary:
            temporary.write_bytes(engine)
        facts = {
            "compute_capabilities": list(capabilities),
            "profile": {
                name: dict(zip(("min", "opt", "max"), map(list, each), strict=True)) for name, each in shapes.items()
            },
            "options": {name: getattr(options, name) for name in CHOSEN},
            "strongly_typed": is_strongly_typed(trt, network),
            "tf32": bool(config.get_flag(trt.BuilderFlag.TF32)),
            **asdict(products),
            **loaded,
        }
        return EngineBuild(path, facts)

    def _open(self, path: Path, threads: int) -> Runner:  # noqa: ARG002
        """A runner of an engine or an ONNX file; `threads` is a matter of CPUs and has no meaning here."""
        trt = self._load()

        def opened(engine: Path) -> TrtRunner:
            return TrtRunner(trt, forwarding_logger(self.module), engine, self.mode)

        if path.suffix != ".onnx":
            return opened(path)

        def built(batch: int, sample: tuple[int, ...] | None) -> Path:
            return cached_engine(self, path, batch, local_capability(), local_gpu(), sample)

        return OnnxTrtRunner(built, opened)

    def _refit(self, stripped: Path, onnx: Path, folder: Path) -> EngineBuild:
        """A stripped engine with the weights of the ONNX file that it was built from, which engine.json beside it names.

        Raises:
            StorageError, ArtifactError: the engine cannot be read or loaded, or was built from another file.
        """
        trt = self._load()
        record, facts = BuiltEngine.beside(stripped), read_json(stripped.with_name("engine.json"))
        engine = refitted(trt, forwarding_logger(self.module), stripped, onnx, record)
        path, options = folder / stripped.name, replace(record.options, strip=False)
        with atomic_path(path) as temporary:
            temporary.write_bytes(engine)
        digests = {"engine": path.name, "engine_sha256": sha256(path), "size_bytes": len(engine)}
        loaded = self._inspect(trt, engine, record.compute_capabilities, options)
        return EngineBuild(
            path, {**facts, "options": {name: getattr(options, name) for name in CHOSEN}, **digests, **loaded}
        )

    @property
    def runtime(self) -> tuple[str, str]:
        """The Python module and its version; raises TargetUnavailable if it cannot be loaded."""
        return self.module, str(self._load().__version__)

    def _load(self) -> ModuleType:
        """The Python module; raises TargetUnavailable if it is missing, broken, or too old."""
        trt = imported(self.module, self.name, self.install)
        version = tuple(int(part) for part in str(trt.__version__).split(".")[:2])
        if version < self.minimum:
            wanted = ".".join(map(str, self.minimum))
            reason = f"{self.module} {trt.__version__} is too old, {wanted} or newer is needed"
            raise TargetUnavailable(self.name, reason, self.install)
        return trt

    def _cannot_run(self, trt: ModuleType) -> str | None:
        """Why no engine runs here, or None if some do."""
        if (missing := no_gpu()) is not None or not self.ahead_of_time or local_capability() in self._known(trt):
            return missing
        return f"{self.module} {trt.__version__} has no kernels for compute capability {local_capability()}"

    def _known(self, trt: ModuleType) -> dict[str, object]:
        """Each compute capability that engines can be built for ahead of time, as in `_capabilities`."""
        return {f"{n[2:-1]}.{n[-1]}": value for n, value in trt.ComputeCapability.__members__.items() if n[:2] == "SM"}

    def _profile_shapes(
        self, network: Any, onnx: Path, batch: tuple[int, int, int], input_shape: tuple[int, ...] | None
    ) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Input name → its (min, opt, max) shapes, for inputs that leave some dimension open."""
        shapes = {}
        for tensor in (network.get_input(index) for index in range(network.num_inputs)):
            shape = tuple(tensor.shape)
            where = f"{onnx}: input {tensor.name!r} has shape {shape}"
            if input_shape is None and -1 in shape[1:]:
                raise RecipeError(
                    f"{where}; only the batch may stay open: name the rest with --input-shape, e.g. 3,224,224"
                )
            sample = input_shape or shape[1:]
            if len(sample) != len(shape) - 1 or any(n not in (-1, m) for n, m in zip(shape[1:], sample, strict=True)):
                raise RecipeError(
                    f"{where}, and --input-shape asks for {sample} per sample; what is fixed stays as it is"
                )
            if shape[0] not in (-1, *batch) or (shape[0] != -1 and len(set(batch)) > 1):
                raise RecipeError(
                    f"{onnx}: input {tensor.name!r} has a fixed batch of {shape[0]}, the profile asks for {list(batch)}. "
                    f"Export it with a dynamic batch, or ask for its own: --batch {' '.join([str(shape[0])] * 3)} "
                    f"(engine.batch = {[shape[0]] * 3})."
                )
            if -1 in shape:
                shapes[tensor.name] = tuple((size, *sample) for size in batch)
        return shapes

    def _capabilities(self, trt: ModuleType, asked: Sequence[str]) -> dict[str, object]:
        """Each compute capability that an engine ahead of time will hold, "8.9" for SM89 → the module's name of it.

        Raises:
            RecipeError: the module cannot build for one, or none is asked for and there is no GPU.
        """
        if not asked and no_gpu() is None:
            asked = (local_capability(),)
        known = self._known(trt)
        unknown = [capability for capability in dict.fromkeys(asked) if capability not in known]
        if unknown or not asked:
            raise RecipeError(
                f"{self.module} {trt.__version__} cannot build for compute capability {', '.join(unknown) or '(none)'}; "
                f"set engine.compute_capabilities to some of {', '.join(sorted(known, key=float))}"
            )
        return {capability: known[capability] for capability in asked}

    def _inspect(
        self, trt: ModuleType, serialized: bytes, capabilities: Sequence[str], options: BuildOptions
    ) -> dict[str, object]:
        """Whether the engine loads, and what the engine inspector says of it; "not_run" where there is no fitting GPU."""
        missing = no_gpu()
        if missing is None and local_capability() not in capabilities:
            missing = (
                f"this GPU has compute capability {local_capability()}, the engine is for {', '.join(capabilities)}"
            )
        if missing is None and options.strip:
            missing = "it is stripped of its weights; `slimvit refit` gives it those of the ONNX file"
        if missing is not None:
            return {"loaded": "not_run", "loaded_reason": missing, "inspector": None}
        logger = forwarding_logger(self.module)
        runtime = opened_runtime(trt, logger, options)
        engine = runtime.deserialize_cuda_engine(serialized)
        if engine is None:
            raise ArtifactError(f"{self.module} {trt.__version__} does not load its own engine: {logger.last_error()}")
        inspector = engine.create_engine_inspector()
        information = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
        return {"loaded": "pass", "loaded_reason": "", "inspector": information, **inspected(information)}


TRT = TensorRT("trt", "tensorrt", minimum=(10, 12), install="pip install 'slimvit[trt]'", ahead_of_time=False)
TRT_RTX = TensorRT(
    "trt-rtx", "tensorrt_rtx", minimum=(1, 1), install="pip install 'slimvit[trt-rtx]'", ahead_of_time=True
)
