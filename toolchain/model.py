"""The forms of a model that flow between the stages, and the record that rebuilds one.

The model types differ on purpose: slicing takes a `MaskedModel` and nothing else, export takes a `DeployModel`, so a
step that is left out or done twice is a type error and not a wrong file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter, ValidationError

from toolchain.errors import ArtifactError
from toolchain.files import read_json
from toolchain.outputs import CLASS_NAMES, Output, label_classes, output_names, output_of
from toolchain.parity import Rung
from toolchain.plan import CompressionPlan, ModelRef
from toolchain.preprocess import ImageForm
from toolchain.records import first_fault

if TYPE_CHECKING:  # a process that only measures reads and writes files, and has no model
    from torch import nn

    from toolchain.families import Family, UnitGroup

IMAGE, BATCH = "image", "batch"
"""Name of the input, and of its open dimension, in every form of a model."""
MODEL_SCHEMA = "slimvit.model/1"
# What lies in a folder that a stage writes, its record first: only such a folder is ever replaced.
MODEL_FILES = ("model.json", "model.safetensors", "plan.json", "allocation.json")
In_contra = TypeVar("In_contra", contravariant=True)
In = TypeVar("In")
Out = TypeVar("Out")
Facts_co = TypeVar("Facts_co", covariant=True)


@dataclass(frozen=True)
class Preprocess(ImageForm):
    """How an image becomes the input tensor; written into every artifact so that none depends on a recipe."""

    def to_dict(self) -> dict[str, object]:
        """As JSON values; pictures that are read as they are stored need no word."""
        return {name: value for name, value in asdict(self).items() if name != "exif_orientation" or value}

    @staticmethod
    def from_dict(raw: Any) -> Preprocess:
        """The inverse of `to_dict` after JSON; raises ArtifactError if `raw` is anything else."""
        try:
            return TypeAdapter(Preprocess).validate_python(raw)
        except ValidationError as error:
            raise ArtifactError(f"the preprocessing is invalid at {first_fault(error, 'top level')}") from None


@dataclass(frozen=True)
class _Model:
    """The attributes of every form of a model.

    Attributes:
        ref: timm name and kwargs.
        module: the model, in eval mode.
        family: what declares its units.
        groups: its units, as declared on the dense model.
        preprocess: what its input is.
        provenance: where the weights come from (digest, source, synthetic or not), as data.
    """

    stage: ClassVar[str]
    ref: ModelRef
    module: nn.Module
    family: Family
    groups: tuple[UnitGroup, ...]
    preprocess: Preprocess
    provenance: Mapping[str, Any]

    @property
    def output(self) -> Output:
        """The kind of its outputs."""
        return output_of(self.ref.output, int(self.module.num_classes))  # type: ignore[arg-type]

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of its outputs."""
        return output_names(self.output, self.ref.layers)

    @property
    def class_names(self) -> tuple[str, ...]:
        """What its outputs stand for, in order, where that is known; else ()."""
        return tuple(map(str, self.provenance.get(CLASS_NAMES, ())))

    @property
    def label_classes(self) -> int | None:
        """How many classes the labels that judge it may have; None if class labels cannot."""
        return label_classes(self.output, int(self.module.num_classes))  # type: ignore[arg-type]


@dataclass(frozen=True)
class TimmModel(_Model):
    """A dense timm model."""

    stage: ClassVar[str] = "dense"


@dataclass(frozen=True)
class _Planned(_Model):
    """A model that a plan was applied to."""

    plan: CompressionPlan


@dataclass(frozen=True)
class MaskedModel(_Planned):
    """A model of dense shapes in which a plan's removed positions are held at zero by parametrizations.

    Linears of the plan's `low_ranks` are `FactorisedLinear`.
    """

    stage: ClassVar[str] = "masked"


@dataclass(frozen=True)
class SlicedModel(_Planned):
    """A model in which the sliceable positions are physically gone."""

    stage: ClassVar[str] = "sliced"


@dataclass(frozen=True)
class DeployModel(_Planned):
    """A sliced model of stock modules only: each factorised linear is two `nn.Linear`, or one where that is cheaper."""

    stage: ClassVar[str] = "deploy"


AnyModel = TimmModel | MaskedModel | SlicedModel | DeployModel


@dataclass(frozen=True)
class Made(Generic[Out, Facts_co]):
    """The result of a stage.

    Attributes:
        artifact: a model, a file, a table: what the next stage takes.
        facts: what the stage found out besides.
        rungs: how the artifact compares with what it was made from; empty where nothing was compared.
    """

    artifact: Out
    facts: Facts_co
    rungs: tuple[Rung, ...] = ()


class Stage(Protocol[In_contra, Out, Facts_co]):
    """One step of the pipeline: a check of its input, the work, and a check of its outcome."""

    def requires(self, given: In_contra, /) -> None:
        """Raises if the step cannot work on `given`."""
        ...

    def __call__(self, given: In_contra, /) -> Made[Out, Facts_co]:
        """The result of the step."""
        ...

    def ensures(self, given: In_contra, made: Out, /) -> None:
        """Raises if `made`, the artifact, is not what the step promises for `given`."""
        ...


def run_stage(stage: Stage[In, Out, Facts_co], given: In) -> Made[Out, Facts_co]:
    """The result of a stage, checked before and after."""
    stage.requires(given)
    made = stage(given)
    stage.ensures(given, made.artifact)
    return made


class ModelRecord(BaseModel):
    """The content of model.json that a model is rebuilt from."""

    model_config = ConfigDict(frozen=True)

    stage: Literal["dense", "masked", "sliced", "deploy"]
    model: ModelRef
    preprocess: Preprocess
    provenance: dict[str, JsonValue]
    weights_sha256: str
    structure: list[dict[str, JsonValue]]
    plan: dict[str, JsonValue] | None

    @staticmethod
    def load(path: Path) -> ModelRecord:
        """The record in a file; raises StorageError if it cannot be read and ArtifactError if it is no such record."""
        raw = read_json(path)
        if not isinstance(raw, dict) or raw.get("schema") != MODEL_SCHEMA:
            raise ArtifactError(f"{path} is not a {MODEL_SCHEMA} record")
        try:
            return ModelRecord.model_validate(raw)
        except ValidationError as error:
            raise ArtifactError(f"{path} is invalid at {first_fault(error, 'top level')}") from None


def describe(model: AnyModel, weights_sha256: str, structure: Sequence[Mapping[str, object]]) -> str:
    """The text of model.json: everything but the weights that rebuilds the model."""
    plan = json.loads(model.plan.to_json()) if isinstance(model, _Planned) else None
    record = {
        "schema": MODEL_SCHEMA,
        "stage": model.stage,
        "model": model.ref.model_dump(mode="json"),
        "input_size": list(model.preprocess.input_size),
        "preprocess": model.preprocess.to_dict(),
        "provenance": dict(model.provenance),
        "weights_sha256": weights_sha256,
        "structure": list(structure),
        "plan": plan,
    }
    return json.dumps(record, indent=2) + "\n"
