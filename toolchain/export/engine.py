"""BuildEngine: an ONNX file → one engine per target, with what is known of it beside it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from onnx import TensorProto

from toolchain.artifacts import ARTIFACTS, open_artifact
from toolchain.artifacts.engine import OUTPUT, PREPROCESS, RECORD
from toolchain.artifacts.model_folder import ModelFolder
from toolchain.artifacts.onnx_file import FP32, OnnxFile
from toolchain.errors import ArtifactError, RecipeError, StorageError
from toolchain.export.precision import PRECISIONS, int8_kinds, product_of
from toolchain.export.scratch import standing_for
from toolchain.export.weights import each_linear
from toolchain.files import atomic_folder, check_replaceable, write_json
from toolchain.model import Made
from toolchain.parity import Rung, require
from toolchain.recipe import EngineSection
from toolchain.targets import BuildOptions, EngineBuild, Refittable, Selective, get_target, named

log = logging.getLogger(__name__)
INTEGERS = ("INT8", "INT8-DYNAMIC")
"""Product types that only linears can have: attention and the last linear stay in floating point."""


def builds(target: str, precision: str) -> bool:
    """Whether files of a precision become engines of a target."""
    return product_of(precision) in get_target(target).builds


def engine_files() -> tuple[str, ...]:
    """What may lie in a folder that `BuildEngine` wrote, its record first."""
    kinds = [kind for kind in ARTIFACTS.values() if kind not in (OnnxFile, ModelFolder)]
    return (RECORD, *(pattern for kind in kinds for pattern in kind.patterns))


def _said(source: OnnxFile) -> dict[str, object]:
    """A file's preprocessing and kind of output, which most engine formats cannot store."""
    how = source.preprocess
    return {PREPROCESS: None if how is None else json.loads(json.dumps(how.to_dict())), OUTPUT: source.output}


def options_of(section: EngineSection) -> BuildOptions:
    """The build options of a section."""
    return BuildOptions(
        section.batch,
        section.compute_capabilities,
        strip=section.strip,
        version_compatible=section.version_compatible,
        hardware_compatible=section.hardware_compatible,
    )


def require_engines(section: EngineSection, precisions: Sequence[str]) -> None:
    """Requires that all engines of a section can be built here; called before any work.

    Raises:
        RecipeError: a target has no engines, or none with these options, of files in these precisions.
        TargetUnavailable: a target is not installed, or lacks hardware.
    """
    for name in section.targets:
        target = get_target(name)
        if not target.builds:
            raise RecipeError(f"{name} runs files as they are and has no engines; remove it from engine.targets")
        if precisions and not any(builds(name, each) for each in precisions):
            able = [each for each in (FP32, *PRECISIONS) if builds(name, each)]
            raise RecipeError(
                f"{name} builds no engine of export.precisions = {list(precisions)}; add {' or '.join(able)}, or remove it from "
                "engine.targets"
            )
        if isinstance(target, Selective):
            target.require(options_of(section), {each: product_of(each) for each in precisions if builds(name, each)})


@dataclass(frozen=True)
class BuildEngine:
    """ONNX file → engine in a folder of its own, replaced whole.

    Attributes:
        section: [engine].
        target: name of the target.
        folder: where the engine and engine.json go.
        compare: gives the rung of an engine against its file; one that fails replaces nothing. None compares nothing.
        stripped: an engine that was built without the file's weights, which are put into it; None builds one.
        input_shape: shape of one sample, for a file that leaves it open.
    """

    section: EngineSection
    target: str
    folder: Path
    compare: Callable[[EngineBuild], Rung] | None = None
    stripped: Path | None = None
    input_shape: tuple[int, ...] | None = None

    def requires(self, given: OnnxFile) -> None:
        """Raises StorageError for a missing file or a folder that is no engine's, RecipeError for a precision, TargetUnavailable."""
        if not given.path.is_file():
            raise StorageError(f"there is no ONNX file {given.path}")
        require_engines(self.section.model_copy(update={"targets": (self.target,)}), ())
        if given.own_precision and not builds(self.target, given.own_precision):
            known = ", ".join(each for each in (FP32, *PRECISIONS) if builds(self.target, each))
            raise RecipeError(f"{given.path} is {given.own_precision}; engines of {self.target} are built from {known}")
        check_replaceable(self.folder, engine_files())
        get_target(self.target).probe()

    def __call__(self, given: OnnxFile) -> Made[EngineBuild, None]:
        """The engine and its facts."""
        with atomic_folder(self.folder, engine_files()) as partial, standing_for(self.folder, partial):
            # what is refused in the block replaces nothing
            built = self._built(given.path, partial)
            self._require_precision(given, built)
            rung = self.compare and self.compare(built)
            if rung and rung.verdict != "not_run":
                require([rung], f"Choose another target than {self.target}, or another precision of the file")
            facts = {**built.facts, **_said(given), "parity": rung.to_dict() if rung else None}
            write_json(partial / RECORD, facts)
        return Made(EngineBuild(self.folder / built.path.name, facts), None, (rung,) if rung else ())

    def _built(self, onnx_file: Path, folder: Path) -> EngineBuild:
        target = get_target(self.target)
        if self.stripped is None:
            options = replace(options_of(self.section), input_shape=self.input_shape)
            return target.build(onnx_file, folder, options)
        if not isinstance(target, Refittable):
            stripped = named(lambda each: isinstance(each, Refittable))
            raise RecipeError(f"engines of {self.target} have their weights; only those of {stripped} are stripped")
        return target.refit(self.stripped, onnx_file, folder)

    def _require_precision(self, given: OnnxFile, built: EngineBuild) -> None:
        """Raises ArtifactError if the engine multiplies in another type than the file says it has."""
        if not given.own_precision:
            return
        product, target = product_of(given.own_precision), get_target(self.target)
        wanted = target.engine_products.get(product, product)
        products = built.record.matmul_dtypes or {}
        right, expected = set(products) == {wanted}, 1
        if wanted in INTEGERS:
            stored = sum(each.kind == TensorProto.INT8 for each in each_linear(onnx.load(given.path)))
            expected = stored - built.record.constant_linears
            right = products.get(wanted, 0) == expected > 0 and set(products) <= {wanted, "FLOAT"}
        if not right:
            raise ArtifactError(
                f"{built.path.name} is no {given.own_precision} engine: its matrix products are {products}, expected {wanted}"
            )
        if wanted != product and given.own_precision in int8_kinds():  # of integers, the weights alone
            expected = sum(each.kind == TensorProto.INT8 for each in each_linear(onnx.load(given.path)))
            if (stored := built.record.weights.get("i8", 0)) != expected:
                raise ArtifactError(
                    f"{built.path.name} is no {given.own_precision} engine: {stored} of its weights are int8, expected {expected}"
                )
            expected = 1
        chosen = built.record.inspected_products
        if built.record.inspector is not None and not chosen:
            log.warning("%s: slimvit recognises no matrix product in what the engine inspector says", built.path.name)
        fewer = chosen.get(wanted, 0) < expected
        if chosen and given.own_precision != FP32 and (fewer or (wanted not in INTEGERS and "FLOAT" in chosen)):
            raise ArtifactError(
                f"{built.path.name} is no {given.own_precision} engine: by the engine inspector its matrix products read {chosen}"
            )

    def ensures(self, given: OnnxFile, made: EngineBuild) -> None:  # noqa: ARG002
        """Raises ArtifactError if no engine was written."""
        if not made.path.exists() or open_artifact(made.path).size_bytes == 0:
            raise ArtifactError(f"target {self.target} wrote no engine")
