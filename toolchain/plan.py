"""The compression plan: what is kept of each unit and the rank of each factorised linear, as data.

A plan holds the outcome of compression, not how it was found. Together with the weights it rebuilds the compressed
model on a fresh timm model (`toolchain.surgery.replay`). It carries no timestamp, so equal decisions are equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from toolchain.errors import ArtifactError, PlanError, StorageError, fault_words
from toolchain.outputs import Output
from toolchain.records import Record, first_fault
from toolchain.settings import tuple_of

SCHEMA = "slimvit.plan/1"
BYTES_PER_PARAM = 4
"""Of fp32, the precision in which models are stored."""
# timm.create_model reads these as where weights come from or what is built around the model, not as its shape.
NOT_KWARGS = (
    *("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "cache_dir"),
    *("scriptable", "exportable", "features_only", "feature_cfg", "out_indices"),
    *("device", "dtype", "no_jit", "pruned", "kwargs_filter", "pretrained_model_args"),
)


class ModelRef(Record):
    """The timm model that a plan, or a folder of weights, belongs to.

    Attributes:
        name, kwargs: of `timm.create_model`.
        output: what the model's outputs are, where that was declared.
        layers: the blocks whose tokens are the outputs, where these are "layers"; those after the last are cut off.
    """

    name: str
    kwargs: dict[str, Any] = Field(default_factory=dict)
    output: Output | None = None
    layers: Annotated[tuple[int, ...], BeforeValidator(tuple_of)] = ()

    @model_serializer(mode="wrap")
    def _without_what_is_not_declared(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        record: dict[str, Any] = serialise(self)
        return {key: value for key, value in record.items() if value is not None and (value or key != "layers")}

    @model_validator(mode="after")
    def _kwargs_are_of_the_architecture(self) -> ModelRef:
        if found := [name for name in NOT_KWARGS if name in self.kwargs]:
            raise ValueError(
                f"model.kwargs cannot hold {', '.join(found)}: they describe the architecture alone; "
                "for weights use model.checkpoint or model.pretrained"
            )
        return self


class Keep(Record):
    """The kept positions of one unit of one module.

    `indices[p]` are the kept positions of partition `p`, each in `0..total-1`, strictly increasing. `total` counts one
    partition, so a head-dim unit of 6 heads of 64 has total 64 and six index lists of equal length.
    """

    module: str
    unit: str
    total: Annotated[int, Field(ge=1)]
    indices: Annotated[tuple[Annotated[tuple[int, ...], BeforeValidator(tuple_of)], ...], BeforeValidator(tuple_of)]

    @model_validator(mode="after")
    def _positions_are_sound(self) -> Keep:
        where = f"{self.module}.{self.unit}"
        if not self.indices:
            raise ValueError(f"{where} has no partition; expected at least one list of kept positions")
        for part in self.indices:
            if not part:
                raise ValueError(f"{where} keeps 0 of {self.total}; a unit needs at least 1")
            if any(b <= a for a, b in pairwise(part)):
                raise ValueError(f"{where}: kept positions must be strictly increasing")
            if part[0] < 0 or part[-1] >= self.total:
                raise ValueError(f"{where}: kept positions must lie in 0..{self.total - 1}, got {part[0]}..{part[-1]}")
        return self

    @property
    def kept(self) -> int:
        """Kept positions per partition (the largest, should partitions differ)."""
        return max(len(part) for part in self.indices)

    @property
    def removed(self) -> int:
        """Removed positions, summed over the partitions."""
        return sum(self.total - len(part) for part in self.indices)


class LowRank(Record):
    """A linear of shape [out, in] that is replaced by a product of rank `rank`."""

    module: str
    shape: Annotated[tuple[int, int], BeforeValidator(tuple_of)]
    rank: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _rank_fits(self) -> LowRank:
        if self.rank > min(self.shape):
            raise ValueError(f"{self.module}: rank {self.rank} exceeds min{self.shape} = {min(self.shape)}")
        return self


class CompressionPlan(Record):
    """What compression decided for a whole model.

    Attributes:
        model: the dense timm model.
        keeps: kept positions per (module, unit); a unit that is absent is kept whole.
        low_ranks: factorised linears; one that is absent stays as it is.
        provenance: how the plan was found (method, seed, budget, data, digest of the dense weights). Never a time.
    """

    model: ModelRef
    keeps: Annotated[tuple[Keep, ...], BeforeValidator(tuple_of)] = ()
    low_ranks: Annotated[tuple[LowRank, ...], BeforeValidator(tuple_of)] = ()
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_decision_each(self) -> CompressionPlan:
        for kind, names in (
            ("keep", [f"{k.module}.{k.unit}" for k in self.keeps]),
            ("low rank", [low.module for low in self.low_ranks]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"more than one {kind} decision for {', '.join(twice)}")
        return self

    def keep(self, module: str, unit: str) -> Keep | None:
        """The decision for one unit, or None if the unit is kept whole."""
        return next((k for k in self.keeps if (k.module, k.unit) == (module, unit)), None)

    def to_json(self) -> str:
        """Canonical JSON text, one line per decision so that a change reads well in a diff."""

        def line(value: Any) -> str:
            return json.dumps(value, sort_keys=True, separators=(", ", ": "))

        def rows(items: tuple[Record, ...]) -> str:
            return "[" + ",".join(f"\n    {line(item.model_dump(mode='json'))}" for item in items) + "\n  ]"

        return (
            f'{{\n  "schema": "{SCHEMA}",\n  "model": {line(self.model.model_dump(mode="json"))},\n'
            f'  "provenance": {line(self.provenance)},\n'
            f'  "low_ranks": {rows(self.low_ranks)},\n  "keeps": {rows(self.keeps)}\n}}\n'
        )

    @staticmethod
    def from_json(text: str) -> CompressionPlan:
        """The plan written by `to_json`.

        Raises:
            PlanError: the text is not a plan of this schema, or a decision contradicts itself.
        """
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"the plan is not JSON: {error}") from None
        return CompressionPlan.from_dict(raw)

    @staticmethod
    def from_dict(raw: Any) -> CompressionPlan:
        """The plan from parsed JSON; raises PlanError as `from_json` does."""
        found = raw.get("schema") if isinstance(raw, dict) else None
        if found != SCHEMA:
            raise PlanError(f"the plan has schema {found!r}; this version reads {SCHEMA!r}")
        try:
            return CompressionPlan.model_validate({k: v for k, v in raw.items() if k != "schema"})
        except ValidationError as error:
            raise PlanError(f"the plan is invalid at {first_fault(error, 'top level')}") from None

    @staticmethod
    def load(path: Path) -> CompressionPlan:
        """The plan in a file; raises StorageError if it cannot be read and PlanError if it is no plan."""
        try:
            return CompressionPlan.from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise StorageError(f"cannot read the plan {path}: {fault_words(error)}") from error
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{path} is not a text file: {error.reason}") from error

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def _repr_markdown_(self) -> str:
        """What a notebook shows: one row for each decision."""
        rows = [f"| {keep.module} | {keep.unit} | {keep.total} | {keep.kept} |" for keep in self.keeps]
        rows += [f"| {low.module} | rank | {min(low.shape)} | {low.rank} |" for low in self.low_ranks]
        header = ["| module | unit | dense | left |", "|---|---|---|---|"]
        return "\n".join([f"**{self.model.name}**, compressed", "", *header, *rows])

    def summary(self) -> str:
        """One line for a person: how many decisions there are and what they remove."""
        ranks = ", ".join(f"{low.module} r{low.rank}" for low in self.low_ranks[:3])
        more = "" if len(self.low_ranks) <= 3 else f" … {len(self.low_ranks)} in all"
        units = sorted({k.unit for k in self.keeps})
        removed = ", ".join(
            f"{u} −{sum(k.removed for k in self.keeps if k.unit == u)}"
            f"/{sum(k.total * len(k.indices) for k in self.keeps if k.unit == u)}"
            for u in units
        )
        return f"{self.model.name}: low rank [{ranks}{more}]; removed [{removed}]"
