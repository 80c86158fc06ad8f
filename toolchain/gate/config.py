"""gate.toml ⇄ typed, strict, frozen models: which artifacts are judged, where, by which budgets and relations."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from toolchain.devices.targets_toml import BundleSettings, ListedCores, NamedTarget, named_target
from toolchain.errors import RecipeError
from toolchain.export.preparation import Preparation
from toolchain.parity import TOLERANCES, Tolerance
from toolchain.places import HUB_URL, absolute_classes, absolute_path, absolute_source
from toolchain.recipe import CropMode
from toolchain.settings import (
    Counts,
    Fraction,
    Numbers,
    Positive,
    Section,
    explain,
    parse_latency,
    parse_size,
    read_toml,
    tuple_of,
)
from toolchain.shell import word

MEASURED = ("latency", "memory", "cold_start")
"""Keys of a budget or relation that take a device to be judged."""
S = TypeVar("S", bound=Section)


def _named(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty, perhaps because a variable of the job is not set; write a path")
    return value


def _per_cent(value: Any) -> Any:
    """0.02 of "2%"; a number is a share already, and one of 1 or more was meant in per cent."""
    if isinstance(value, str) and (found := re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*%\s*", value)):
        return float(found[1]) / 100
    if isinstance(value, int | float) and not isinstance(value, bool) and 1 < value <= 100:
        raise ValueError(f"{value:g} is no share from 0 to 1; write {value / 100:g} or '{value:g}%' if you mean that")
    if isinstance(value, str):
        raise ValueError(f"{value!r} is no share; write one like 0.02 or '2%'")  # noqa: TRY004 - pydantic's rule
    return value


def _amount(name: str, value: str, parse: Callable[[str], tuple[float, bool]], kind: str, units: str) -> float:
    try:
        amount, is_share = parse(value)
    except ValueError:
        raise ValueError(f"{name} {value!r} is not {kind}, above 0 and in {units}") from None
    if is_share:
        raise ValueError(f"{name} {value!r} is a share; a budget is {kind}, and a share belongs in a relation")
    return amount


def _bytes(value: Any) -> Any:
    """12_000_000 of "12 MB"; a whole number is bytes already."""
    if not isinstance(value, str):
        return value
    units = "B, kB, MB or GB, which are powers of 1000 (1 MiB is 1.048576 MB)"
    return int(_amount("an amount of bytes", value, parse_size, "one like '12 MB'", units))


def _milliseconds(value: Any) -> Any:
    """8.0 of "8 ms"; a bare number has no unit and is refused."""
    if not isinstance(value, str):
        raise ValueError(f"latency {value!r} has no unit; write a time like '8 ms'")  # noqa: TRY004 - pydantic's rule
    return _amount("latency", value, parse_latency, "a time like '8 ms'", "us, ms or s")


Milliseconds = Annotated[
    float,
    Field(gt=0),
    BeforeValidator(_milliseconds),
    PlainSerializer(lambda ms: f"{Decimal(repr(ms)):f} ms", when_used="json"),
]
"""A time that is written with its unit, in gate.toml and in a result."""
Named = Annotated[str, AfterValidator(_named)]
"""A path or a source; one that is empty would be the folder of gate.toml."""
Bytes = Annotated[Positive, BeforeValidator(_bytes)]
"""An amount that may be written with a unit."""
Share = Annotated[float, Field(ge=0.0, lt=1.0), BeforeValidator(_per_cent)]
"""The share by which a count may be worse, or accuracy fall."""
Accuracy = Annotated[Fraction, BeforeValidator(_per_cent)]
Growth = Annotated[float, Field(gt=0.0, lt=1.0), BeforeValidator(_per_cent)]
"""The share by which what is measured may grow; none at all could never be shown."""


def _moved(section: S, key: str, base: Path) -> S:
    """The section, its path made absolute from `base`."""
    return section.model_copy(update={key: absolute_path(getattr(section, key), base)})


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"


class ParityBounds(Section):
    """What the artifact's logits y may differ from the baseline's by; a bound that is absent is not judged.

    `max_abs` is held against the largest difference over max(1, max |y|) of the baseline, `cosine_min` against the worst
    image and against the logits of all images about their means over the classes, `top1_min` against the share of real images for which both name the same class, `spread_max` against what is lost of how
    outputs differ between images: all of it is 1.
    """

    max_abs: Annotated[float, Field(gt=0)] | None = None
    cosine_min: Annotated[float, Field(ge=-1, le=1)] = 0.99
    top1_min: Fraction | None = None
    spread_max: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _asks_for_something(self) -> ParityBounds:
        if self.cosine_min == -1 and self.max_abs is self.top1_min is self.spread_max is None:
            raise ValueError(
                "parity has no bound, as no cosine is below -1: set max_abs, cosine_min, top1_min or spread_max"
            )
        return self

    @property
    def tolerance(self) -> Tolerance:
        """The same for `parity`."""
        return Tolerance(self.max_abs, self.cosine_min, self.top1_min, self.spread_max, centred_min=self.cosine_min)


class FeatureBounds(Section):
    """What the artifact's features may differ from the baseline's by on the images of [data]; at least one bound is given.

    `error` is at most: E‖f_baseline − f‖² / E‖f_baseline − mean‖², which is 1 for features that are the same for every image.
    `cosine` is at least: its mean over images. Both hold at every position of tokens and for every output.
    """

    error: Annotated[float, Field(gt=0, lt=1)] | None = None
    cosine: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _asks_for_something(self) -> FeatureBounds:
        if self.error is None and self.cosine is None:
            raise ValueError("features has no bound: set error, the most, or cosine, the least")
        return self


def _named_tolerance(value: Any) -> Any:
    """The bounds that a name stands for: "fp32"."""
    if not isinstance(value, str):
        return value
    if value not in TOLERANCES:
        raise ValueError(f"unknown parity tolerance {value!r}; known: {', '.join(TOLERANCES)}, or a table of bounds")
    return {name: getattr(TOLERANCES[value], name) for name in ParityBounds.model_fields}


class BudgetSection(Section):
    """[cell.budget]: what holds by itself. All are at most, accuracy is at least."""

    size: Bytes | None = None
    download: Bytes | None = None
    params: Positive | None = None
    nodes: Positive | None = None
    accuracy: Accuracy | None = None
    latency: Milliseconds | None = None
    memory: Bytes | None = None
    cold_start: Milliseconds | None = None


class RelationSection(Section):
    """[cell.relation]: by how much the artifact may be worse than its baseline.

    Size, download, params, nodes, latency, memory and cold start may grow by a share of the baseline's; accuracy may fall by a share of the images.
    Features are those of a model without a classifier.
    """

    size: Share | None = None
    download: Share | None = None
    params: Share | None = None
    nodes: Share | None = None
    accuracy: Share | None = None
    parity: Annotated[ParityBounds, BeforeValidator(_named_tolerance)] | None = None
    features: FeatureBounds | None = None
    latency: Growth | None = None
    memory: Growth | None = None
    cold_start: Growth | None = None


class BaselineSection(Section):
    """[baseline.NAME]: an artifact, and the digest that it must have or that the job itself has `built` it."""

    path: Named
    sha256: str = ""
    built: bool = False

    @property
    def on_hub(self) -> bool:
        """Whether it is a file of a hub, hf://ORG/NAME/FILE, which is fetched when the gate runs."""
        return self.path.startswith(HUB_URL)

    @model_validator(mode="after")
    def _is_a_digest(self) -> BaselineSection:
        if self.built != (not self.sha256):
            raise ValueError(
                f"the baseline at {self.path} needs its sha256, which `slimvit gate digest {word(self.path)}` prints, or built = true "
                "where the job builds it from the base branch; one of the two"
            )
        if self.built and self.on_hub:
            raise ValueError(f"the baseline {self.path} lies on a hub, where a job builds nothing: name its sha256")
        if self.built:
            return self
        object.__setattr__(self, "sha256", self.sha256.lower())
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(
                f"sha256 {self.sha256!r} is no digest of 64 hex digits; `slimvit gate digest {word(self.path)}` prints it"
            )
        return self


class DataSection(Section):
    """[data]: the images for accuracy, features and parity; with "none", parity is judged on seeded noise.

    `mean`, `std`, `crop_pct`, `interpolation`, `crop_mode` and `exif_orientation` say how images are prepared for files that do not,
    and replace what others say.
    `classes` maps class folders to the model's outputs, and `image_column` and `label_column` name columns, as in a recipe.
    """

    source: Named = "none"
    split: str = "test"
    classes: str = ""
    mean: Numbers | None = None
    std: Numbers | None = None
    crop_pct: Fraction | None = None
    interpolation: str | None = None
    crop_mode: CropMode | None = None
    exif_orientation: bool | None = None
    image_column: str | None = None
    label_column: str | None = None

    @property
    def preparation(self) -> Preparation:
        """The same for `export.preparation`."""
        return Preparation(**{each.name: getattr(self, each.name) for each in fields(Preparation)})


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _cell_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w .,:+/()×-]*", name):
        raise ValueError(
            f"{name!r} is no name of a cell; begin with a letter, a digit or _, and use letters, digits, spaces and . , : + / ( ) × - _ alone"
        )
    return name


class Cell(Section):
    """[[cell]]: an artifact, a target, a workload, and what must hold there.

    Threads and cores that are not given are those that targets.toml names for the target; without it one thread, and all
    cores that are allowed. Where the target is not there, latency is skipped, or fails if the cell is `required`.
    """

    name: Annotated[str, AfterValidator(_cell_name)]
    artifact: Named
    baseline: str = ""
    target: str = "ort-cpu"
    batch: Positive = 1
    threads: Positive | None = None
    affinity: ListedCores | None = None
    input_shape: Counts | None = None
    required: bool = False
    budget: BudgetSection = BudgetSection()
    relation: RelationSection = RelationSection()

    @property
    def checks(self) -> tuple[str, ...]:
        """The names of what is asked: "budget.size", "relation.latency"."""
        sections: tuple[tuple[str, Section], ...] = (("budget", self.budget), ("relation", self.relation))
        return tuple(
            f"{kind}.{name}"
            for kind, section in sections
            for name in type(section).model_fields
            if getattr(section, name) is not None
        )

    @model_validator(mode="after")
    def _asks_for_something(self) -> Cell:
        if not self.checks:
            raise ValueError(f"cell {self.name!r} has no budget and no relation: it checks nothing")
        if not self.baseline and (related := [name for name in self.checks if name.startswith("relation.")]):
            raise ValueError(f"cell {self.name!r} asks for {', '.join(related)} but names no baseline")
        return self


class GateConfig(Section):
    """A whole gate.toml."""

    data: DataSection = DataSection()
    baseline: dict[str, BaselineSection] = Field(default_factory=dict)
    cell: Annotated[tuple[Cell, ...], BeforeValidator(tuple_of)] = ()
    _settings: dict[str, NamedTarget] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> GateConfig:
        if not self.cell:
            raise ValueError("there is no [[cell]]; a gate that checks nothing would always be green")
        names = [cell.name for cell in self.cell]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two cells have the name {twice[0]!r}")
        for cell in self.cell:
            if cell.baseline and cell.baseline not in self.baseline:
                hint = _hint(cell.baseline, self.baseline)
                raise ValueError(f"cell {cell.name!r} names the unknown baseline {cell.baseline!r}; {hint}")
            if any(name.endswith(".accuracy") for name in cell.checks) and self.data.source == "none":
                raise ValueError(f"cell {cell.name!r} asks for accuracy; set data.source to images with labels")
            if cell.relation.features is not None and self.data.source == "none":
                raise ValueError(f"cell {cell.name!r} asks for features; set data.source to images, labelled or not")
            bounds = cell.relation.parity
            if bounds is not None and bounds.top1_min is not None and self.data.source == "none":
                raise ValueError(f"cell {cell.name!r} asks for top1_min, and noise has no classes; set data.source")
        return self

    @staticmethod
    def load(path: Path, targets: Path | None = None) -> GateConfig:
        """The gate in a TOML file; relative paths are relative to it.

        Args:
            path: the file.
            targets: read in place of the targets.toml beside it and the user's.

        Raises:
            StorageError: the file cannot be read.
            RecipeError: it is not TOML, lists no cell, has an unknown key or target, a wrong type or value.
        """
        raw = read_toml(path, "gate")
        if "model" in raw:
            raise RecipeError(f"{path} is a recipe and not a gate; carry it out with `slimvit run {word(path)}`")
        return GateConfig.from_dict(raw, path.parent, targets)

    @staticmethod
    def from_dict(raw: Mapping[str, object], base: Path, targets: Path | None = None) -> GateConfig:
        """The gate from nested mappings, its paths made absolute from `base`, the folder of targets.toml; raises as `load` does."""
        try:
            config = GateConfig.model_validate(dict(raw))
        except ValidationError as error:
            raise RecipeError(explain(error, GateConfig, "gate")) from None
        named = {cell.target: named_target(cell.target, targets, base) for cell in config.cell}
        for cell in config.cell:
            settings = named[cell.target]
            threads, cores = cell.threads or settings.threads, cell.affinity or settings.affinity
            if cores is not None and threads > len(cores):
                raise RecipeError(
                    f"cell {cell.name!r} has {_count(threads, 'thread')}, but affinity allows {_count(len(cores), 'core')} "
                    f"({list(cores)}): name fewer threads or more cores"
                )
            if isinstance(settings, BundleSettings) and (
                timed := [name for name in cell.checks if name.partition(".")[2] in MEASURED]
            ):
                raise RecipeError(
                    f"cell {cell.name!r} asks for {', '.join(timed)} on {cell.target!r}, which is reached by bundles alone; a gate "
                    "measures while it runs. `slimvit bench pack` and `unpack` compare there."
                )
        data, source = config.data, absolute_source(config.data.source, base)
        update = {
            "data": data.model_copy(update={"source": source, "classes": absolute_classes(data.classes, base)}),
            "baseline": {
                name: each if each.on_hub else _moved(each, "path", base) for name, each in config.baseline.items()
            },
            "cell": tuple(_moved(cell, "artifact", base) for cell in config.cell),
        }
        moved = config.model_copy(update=update)
        moved._settings = named  # noqa: SLF001 - of its own class
        return moved

    def settings(self, cell: Cell) -> NamedTarget:
        """What targets.toml, or a built-in target, says of the target of a cell."""
        return self._settings[cell.target]

    def paths(self, cell: Cell) -> tuple[Path, Path | None]:
        """Where the artifact of a cell is, and its baseline, if it names one."""
        return Path(cell.artifact), Path(self.baseline[cell.baseline].path) if cell.baseline else None

    def only(self, name: str, check: str = "") -> GateConfig:
        """The same gate with one of its cells, and if a check is named with that one alone.

        Raises:
            RecipeError: there is no such cell or check.
        """
        cell = next((cell for cell in self.cell if cell.name == name), None)
        if cell is None:
            raise RecipeError(f"the gate has no cell {name!r}; {_hint(name, [cell.name for cell in self.cell])}")
        if check:
            if check not in cell.checks:
                raise RecipeError(f"cell {name!r} has no check {check!r}; it has {', '.join(cell.checks)}")
            kind, _, metric = check.partition(".")
            kept = {"budget": BudgetSection(), "relation": RelationSection()}
            kept[kind] = kept[kind].model_copy(update={metric: getattr(getattr(cell, kind), metric)})
            cell = cell.model_copy(update=kept)
        return self.model_copy(update={"cell": (cell,)})
