"""Options of a TensorRT build, its timing cache, and the weights of an engine that was built without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from toolchain.errors import ArtifactError, RecipeError, StorageError, TargetUnavailable, fault_words
from toolchain.files import atomic_path, exclusive, read_json, user_cache
from toolchain.records import first_fault
from toolchain.targets.base import BuildOptions
from toolchain.targets.engine_facts import source_digests
from toolchain.targets.gpu import no_gpu
from toolchain.targets.tensorrt.network import bytes_of, with_float_biases

TURING = "7.5"


CHOSEN = ("strip", "version_compatible", "hardware_compatible")
"""Of the options of a build, those that its engine.json says."""


class Shapes(BaseModel):
    """The smallest, the usual and the largest shape of an input; the first number is the batch."""

    min: Annotated[tuple[int, ...], Field(min_length=1)]
    opt: Annotated[tuple[int, ...], Field(min_length=1)]
    max: Annotated[tuple[int, ...], Field(min_length=1)]


class BuiltEngine(BaseModel):
    """What is read of an engine.json to open an engine or to give it its weights; a foreign engine has none."""

    engine: str = ""
    options: BuildOptions = BuildOptions()
    compute_capabilities: tuple[str, ...] = ()
    onnx_sha256: str | None = None
    onnx_data_sha256: dict[str, str] | None = None
    profile: dict[str, Shapes] = {}

    @classmethod
    def beside(cls, file: Path) -> BuiltEngine:
        """What the engine.json beside an engine says, nothing if it is of another; raises StorageError, ArtifactError if it is damaged."""
        path = file.with_name("engine.json")
        try:
            record = cls.model_validate(read_json(path))
        except ValidationError as error:
            raise ArtifactError(
                f"{path} is damaged: {first_fault(error, 'all of it')}; build the engine again"
            ) from None
        return record if record.engine in ("", file.name) else cls()


def require_options(target: str, options: BuildOptions) -> None:
    """Nothing, if TensorRT for RTX can build what is asked for.

    Raises:
        RecipeError: it has no such engines.
        TargetUnavailable: it has, where there is a driver.
    """
    if options.hardware_compatible != "none":
        raise RecipeError(
            f"engines of {target} name their GPUs: set engine.compute_capabilities; engine.hardware_compatible is for trt"
        )
    if options.version_compatible:
        raise RecipeError(
            f"engines of {target} are for the version that built them; engine.version_compatible is for trt"
        )
    if options.strip and len(options.compute_capabilities) != 1:
        raise RecipeError(
            f"{target} builds an engine without weights for one compute capability, and "
            f"{len(options.compute_capabilities)} are asked for; set engine.compute_capabilities to one, or engine.strip to false"
        )
    if options.strip and (missing := no_gpu()) is not None:
        raise TargetUnavailable(target, f"{missing}; engines without weights are compiled by the driver")


def require_products(target: str, capabilities: Sequence[str], others: str) -> None:
    """Nothing, if TensorRT for RTX multiplies matrices on these GPUs in other types than fp16, or need not.

    Args:
        target: its name.
        capabilities: of the GPUs.
        others: a clause on what multiplies in other types, such as "engines in fp32 are asked for"; "" if nothing does.

    Raises:
        RecipeError: it would end in the middle of a build for a Turing GPU.
    """
    if TURING in capabilities and others:
        raise RecipeError(
            f"{target} multiplies matrices in fp16 alone on compute capability {TURING}, and {others}: take {TURING} out of "
            "engine.compute_capabilities, or export fp16 alone"
        )


def set_options(trt: ModuleType, config: Any, options: BuildOptions) -> None:
    """Sets the options on a builder's config."""
    flags = trt.BuilderFlag
    if options.strip:
        config.set_flag(flags.STRIP_PLAN)
        config.set_flag(flags.REFIT_IDENTICAL)  # the weights that it was built with: nothing is given up for others
    if options.version_compatible:
        config.set_flag(flags.VERSION_COMPATIBLE)
    if options.hardware_compatible != "none":
        level = getattr(trt.HardwareCompatibilityLevel, options.hardware_compatible.upper())
        config.hardware_compatibility_level = level


@contextmanager
def timing_cache(trt: ModuleType, config: Any, capability: str | None) -> Iterator[None]:
    """Lets a build in the block use and extend the timings of earlier builds, kept in the user's cache.

    Args:
        trt: the module.
        config: of the builder.
        capability: of the GPU that tactics are timed on; None where none are timed, as in TensorRT for RTX.
    """
    if capability is None:
        yield
        return
    path = user_cache() / "timing" / f"{trt.__name__}-{trt.__version__}-sm{capability.replace('.', '')}.cache"
    with exclusive(path):
        kept = path.read_bytes() if path.is_file() else b""
        cache = config.create_timing_cache(kept)
        if cache is None or not config.set_timing_cache(cache, False):  # damaged, of another driver or GPU: begun anew
            config.set_timing_cache(config.create_timing_cache(b""), False)
        yield
        with atomic_path(path) as temporary:
            temporary.write_bytes(bytes(config.get_timing_cache().serialize()))


def opened_runtime(trt: ModuleType, logger: Any, options: BuildOptions) -> Any:
    """A runtime for an engine that was built with some options.

    One that later versions load brings code of its own, which is carried out when it is loaded: a runtime allows that for
    no other engine.
    """
    runtime = trt.Runtime(logger)
    if options.version_compatible:
        runtime.engine_host_code_allowed = True
    return runtime


def refitted(trt: ModuleType, logger: Any, stripped: Path, onnx: Path, record: BuiltEngine) -> bytes:
    """A stripped engine with the weights of the ONNX file that it was built from.

    Args:
        trt: the module.
        logger: its logger.
        stripped: the engine.
        onnx: the file.
        record: the engine's engine.json.

    Raises:
        StorageError: the engine cannot be read.
        ArtifactError: it cannot be loaded, or was built from another file.
    """
    try:
        serialized = stripped.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read the engine {stripped}: {fault_words(error)}") from error
    # Weights of the same shapes would be taken from any file, and tactics were chosen for those it was built with.
    source = BuiltEngine.model_validate(source_digests(onnx))
    if (record.onnx_sha256, record.onnx_data_sha256) != (source.onnx_sha256, source.onnx_data_sha256):
        raise ArtifactError(f"{stripped} was not built from {onnx}: engine.json beside it names another digest")
    runtime = opened_runtime(trt, logger, record.options)
    loaded = runtime.deserialize_cuda_engine(serialized)
    if loaded is None:
        raise ArtifactError(f"{trt.__name__} {trt.__version__} cannot load {stripped}: {logger.last_error()}")
    refitter = trt.Refitter(loaded, logger)
    reader = trt.OnnxParserRefitter(refitter, logger)
    changed = with_float_biases(onnx)
    taken = reader.refit_from_file(str(onnx)) if changed is None else reader.refit_from_bytes(bytes_of(changed, onnx))
    if not taken or not refitter.refit_cuda_engine():
        raise ArtifactError(f"{stripped} does not take the weights of {onnx}: {logger.last_error()}")
    form = loaded.create_serialization_config()
    form.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    return bytes(loaded.serialize_with_config(form))
