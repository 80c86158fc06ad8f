"""recipe.toml ⇄ typed, strict, frozen models.

Method, source and target names are plain strings here; the stage that owns a name resolves it. Everything that can be
judged from the recipe alone (unknown keys, types, ranges) is judged here, before any work.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from toolchain.errors import RecipeError
from toolchain.outputs import KWARGS, Output
from toolchain.places import (
    CLASS_LISTS,
    HUB,
    LOCAL,
    absolute_checkpoint,
    absolute_classes,
    absolute_model,
    absolute_source,
    model_source,
    path_of_source,
)
from toolchain.settings import (
    Counts,
    Fraction,
    Names,
    Numbers,
    Positive,
    Section,
    Share,
    explain,
    parse_latency,
    parse_size,
    read_toml,
    tuple_of,
)
from toolchain.shell import word

RECIPE_FILE = "recipe.toml"
"""Name of the recipe in the folder of a run."""
SYNTHETIC = "none"
"""The data source of seeded noise."""
Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
"""Pillow's filters, by the names that timm has for them; its "random" is none, for it draws one for each image."""
CropMode = Literal["center", "squash", "border"]
"""timm's ways to a picture of the model's size."""
ALIGN = 8
"""Widths are multiples of it where a recipe names no target: of others, a head dim of 35 say, no runtime is fast."""
PRESETS: dict[str, tuple[str, str, str]] = {  # method → attention, neurons, allocation
    "joint": ("joint", "obs", "solver"),
    "hybrid": ("svd", "vtp", "global"),
    "vtp": ("none", "vtp", "global"),
    "none": ("none", "none", "uniform"),
}
LATER = ("interpolation", "crop_mode", "mirror", "image_column", "label_column")
"""Keys of [data] that came later: they count in the digest of a recipe only where it names them."""
OPTIONAL = ("train", "engine", "bench")
"""Sections that do something by being there, even with nothing in them."""


class ModelSection(Section):
    """[model]: which timm model, with which weights, and what of it is the output.

    Without `output` it is what the model gives: logits, or where it has no classifier features. `layers` are the blocks
    whose tokens are the outputs, counted from 0.
    """

    name: str = ""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    checkpoint: str = ""
    pretrained: bool = True
    resample_patches: bool = False
    output: Output | None = None
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(tuple_of)] = ()

    @model_validator(mode="after")
    def _one_output(self) -> ModelSection:
        if self.layers and self.output is None:
            object.__setattr__(self, "output", "layers")
        if bool(self.layers) != (self.output == "layers"):
            raise ValueError(
                f"output = {self.output!r} goes with no layers: remove one of the two"
                if self.layers
                else "output = 'layers' needs layers, the blocks whose tokens are the outputs, such as [2, 5, 8, 11]"
            )
        if any(b <= a for a, b in pairwise(self.layers)):
            raise ValueError(f"layers are blocks in rising order, got {list(self.layers)}")
        if self.output in KWARGS and self.kwargs.get("num_classes"):
            raise ValueError(
                f"output = {self.output!r} is that of a model without a classifier: take num_classes out of kwargs"
            )
        if self.output in ("tokens", "layers") and self.kwargs.get("global_pool"):
            raise ValueError(
                f"output = {self.output!r} is read before pooling: take global_pool = {self.kwargs['global_pool']!r} out of kwargs"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_absent_layers(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        record: dict[str, Any] = serialise(self)
        return {key: value for key, value in record.items() if key != "layers" or value}

    @model_validator(mode="after")
    def _named(self) -> ModelSection:
        if not self.name and not self.checkpoint:
            raise ValueError("set name to that of a timm model, or checkpoint to a Hugging Face folder, which says it")
        return self


class DataSection(Section):
    """[data]: where images come from.

    `interpolation` and `crop_mode` are timm's: how a picture is resized, and what becomes of one that has another shape than the
    input. `classes` maps class folders to the model's outputs. Without `exif_orientation`, pictures are turned or not as the
    kind of source has it. `workers` is the number of threads that decode, and changes no outcome. Without `mirror`, training mirrors
    images where the source allows it. `image_column` and `label_column` say which columns of a table are read where several
    could be; a label column "" is none.
    """

    source: str = ""
    calibration_images: Positive = 512
    mean: Numbers | None = None
    std: Numbers | None = None
    crop_pct: Fraction | None = None
    interpolation: Interpolation | None = None
    crop_mode: CropMode | None = None
    classes: str = ""
    exif_orientation: bool | None = None
    workers: Annotated[int, Field(ge=0, le=256)] | None = None
    mirror: bool | None = None
    image_column: str | None = None
    label_column: str | None = None

    @model_serializer(mode="wrap")
    def _without_what_the_source_says(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        record: dict[str, Any] = serialise(self)
        return {key: value for key, value in record.items() if key not in LATER or value is not None}


class TrainSection(Section):
    """[train]: how a baseline is trained when there is no checkpoint."""

    epochs: Positive = 20
    lr: Annotated[float, Field(gt=0)] = 1e-3
    batch_size: Positive = 128


class VtpSection(Section):
    """[compress.vtp]: how VTP's gates are learned."""

    epochs: Positive = 10
    lr: Annotated[float, Field(gt=0)] = 1e-4
    gate_lr: Annotated[float, Field(gt=0)] = 1e-2
    l1: Annotated[float, Field(ge=0)] = 1e-4
    max_prune_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.9
    batch_size: Positive = 128


class CompressSection(Section):
    """[compress]: `method` is a preset of attention, neurons and allocation; each can be picked alone.

    Kept counts are multiples of `align`; without it, of what the recipe's targets prefer, or of `ALIGN` if it names none.
    """

    method: Literal["joint", "hybrid", "vtp", "none"] = "joint"
    attention: str = ""
    neurons: str = ""
    allocation: str = ""
    attention_share: Fraction | None = None
    align: Positive | None = None
    refit: bool = True
    sequential: bool = True
    sensitivity: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # training mixes it with epochs into 64 bits
    vtp: VtpSection = VtpSection()

    @model_validator(mode="after")
    def _preset(self) -> CompressSection:
        for name, preset in zip(("attention", "neurons", "allocation"), PRESETS[self.method], strict=True):
            if not getattr(self, name):
                object.__setattr__(self, name, preset)
        turned_off = self.attention == "none" and PRESETS[self.method][0] != "none"
        if turned_off and self.attention_share is not None:
            raise ValueError(
                f"attention_share = {self.attention_share} is what is left of attention, and attention = 'none' leaves all of it: "
                "remove one of the two"
            )
        return self

    def said(self, requested: str) -> dict[str, Any]:
        """What is neither at its default nor implied by the method that was requested, as TOML nests it."""
        keys = self.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
        parts = dict(zip(("attention", "neurons", "allocation"), PRESETS.get(requested, ()), strict=False))
        return {
            "method": requested,
            **{key: value for key, value in keys.items() if key != "method" and parts.get(key) != value},
        }

    @model_serializer(mode="wrap")
    def _without_what_the_targets_say(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        record: dict[str, Any] = serialise(self)
        return {key: value for key, value in record.items() if key != "align" or value is not None}


ANY = "any"
"""In `budget.size`: the file of whichever precision of the recipe does the least damage."""


def _size(value: Any) -> Any:
    """The value of `budget.size` where it is of a right type; raises ValueError."""
    texts = value.values() if isinstance(value, dict) else [value]
    if value is not None and not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"expects '45%' or '12 MB', or a table of such by precision, as in {{ int4 = '3 MB' }}; got {value!r}"
        )
    return value


def _latency(value: Any) -> Any:
    """The value of `budget.latency` where it is of a right type; raises ValueError."""
    if not (isinstance(value, dict) and all(isinstance(text, str) for text in value.values())):
        raise ValueError(f"expects a table of '45%' or '8 ms' by target, as in {{ ort-cpu = '8 ms' }}; got {value!r}")
    return value


class BudgetSection(Section):
    """[budget]: shares LEFT (≤ 1) or absolute limits; several hold together.

    `size` is of the weights in fp32, or a table: precision → size of the whole file of that precision, shares of the dense weights
    in fp32.
    """

    params: Share | None = None
    macs: Share | None = None
    size: Annotated[str | dict[str, str] | None, BeforeValidator(_size)] = None
    latency: Annotated[dict[str, str], BeforeValidator(_latency)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _readable(self) -> BudgetSection:
        for text in (self.size,) if isinstance(self.size, str) else self.files.values():
            parse_size(text)
        if ANY in self.files and len(self.files) > 1:
            names = ", ".join(self.files)
            raise ValueError(
                f"size speaks of the files {names}: keep {ANY!r} alone, or only the precisions that you mean"
            )
        for text in self.latency.values():
            parse_latency(text)
        return self

    @property
    def is_empty(self) -> bool:
        """Whether nothing is limited."""
        return self.params is None and self.macs is None and not self.size and not self.latency

    @property
    def files(self) -> dict[str, str]:
        """Precision, or `ANY` → the size of its file, where `size` says that."""
        return self.size if isinstance(self.size, dict) else {}

    @property
    def shown(self) -> str:
        """What is limited, in one line; "" for nothing."""
        whole = self.size if isinstance(self.size, str) else None
        files = {f"size.{name}": text for name, text in self.files.items()}
        latency = {f"latency.{name}": text for name, text in self.latency.items()}
        limits = {"params": self.params, "macs": self.macs, "size": whole, **files, **latency}
        return ", ".join(f"{name} {value}" for name, value in limits.items() if value)


class FinetuneSection(Section):
    """[finetune]: training after compression; 0 epochs is none.

    `labels` says whether labels may be read where the source has any; without them the dense model is the only teacher.
    """

    epochs: Annotated[int, Field(ge=0)] = 0
    lr: Annotated[float, Field(gt=0)] = 1e-4
    batch_size: Positive = 128
    distill: bool = True
    labels: bool = True

    @model_validator(mode="after")
    def _something_to_learn_from(self) -> FinetuneSection:
        if not self.labels and not self.distill:
            raise ValueError("labels = false leaves only the dense model to learn from: set distill = true")
        return self

    @model_validator(mode="after")
    def _some_epochs(self) -> FinetuneSection:
        other = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        if other and "epochs" not in self.model_fields_set:
            raise ValueError(
                f"{other[0]} says how epochs are trained, and there are none: set epochs, where 0 is none, or remove {other[0]}"
            )
        return self


class ExportSection(Section):
    """[export]: the ONNX files; within `accuracy_loss`, a share of the images, the report suggests one of them."""

    opset: Annotated[int, Field(ge=18, le=23)] = 20
    precisions: Names = ("fp32",)
    simplify: bool = True
    preprocess: bool = False
    softmax: bool = False
    accuracy_loss: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.005


Targets = Annotated[tuple[str, ...], BeforeValidator(tuple_of)]
"""Names of targets; none of them means that nothing is built or measured."""


class EngineSection(Section):
    """[engine]: which engines to build from them."""

    targets: Targets = ("trt-rtx",)
    compute_capabilities: Names = ("8.6", "8.9", "12.0")
    batch: Annotated[tuple[Positive, Positive, Positive], BeforeValidator(tuple_of)] = (1, 1, 8)
    strip: bool = False
    version_compatible: bool = False
    hardware_compatible: Literal["none", "ampere_plus", "same_compute_capability"] = "none"

    @model_validator(mode="after")
    def _ordered(self) -> EngineSection:
        if not self.batch[0] <= self.batch[1] <= self.batch[2]:
            raise ValueError(f"batch is [min, opt, max] and must not decrease, got {list(self.batch)}")
        for capability in self.compute_capabilities:
            if not re.fullmatch(r"\d+\.\d", capability):
                raise ValueError(f'compute capability {capability!r} is not of the form "8.9"')
        return self


class BenchSection(Section):
    """[bench]: where latency is compared."""

    targets: Targets = ("ort-cpu",)
    batch: Counts = (1,)
    threads: Counts = (1,)


class Recipe(Section):
    """A whole recipe. Sections that are absent and optional are None."""

    model: ModelSection
    data: DataSection = DataSection()
    train: TrainSection | None = None
    compress: CompressSection = CompressSection()
    budget: BudgetSection = BudgetSection()
    finetune: FinetuneSection = FinetuneSection()
    export: ExportSection = ExportSection()
    engine: EngineSection | None = None
    bench: BenchSection | None = None

    def require_budget(self) -> None:
        """Raises RecipeError if something is to be compressed and nothing says how far."""
        if self.compress.method != "none" and self.budget.is_empty:
            raise RecipeError(
                "recipe file: [budget] is empty: set at least one of params, macs, size, latency (or method = 'none')"
            )

    @property
    def digest(self) -> str:
        """sha256 of the effective recipe, defaults filled in, wherever it lies.

        Of a path only that there is one counts: what it holds has a digest of its own, beside this one in every report.
        Nor do the threads that decode count.
        """
        source_path, classes = path_of_source(self.data.source), self.data.classes
        source, place = model_source(self.model.name)
        name = {LOCAL: LOCAL, HUB: f"{HUB}:{place}"}.get(source, self.model.name)
        model = {"name": name, "checkpoint": "file" if self.model.checkpoint else ""}
        data = {
            "source": self.data.source.removesuffix(f":{source_path}") if source_path else self.data.source,
            "classes": "file" if classes and classes not in CLASS_LISTS else classes,
            "workers": None,
        }
        placeless = self.model_copy(
            update={
                "model": self.model.model_copy(update=model),
                "data": self.data.model_copy(update=data),
            }
        )
        return hashlib.sha256(placeless.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The effective recipe as canonical JSON."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def tables(self) -> dict[str, Any]:
        """Its sections as TOML nests them, without what is at its default; read back they are this recipe."""
        raw = self.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
        raw["compress"] = self.compress.said(self.compress.method)
        if tuning := raw.get("finetune"):
            raw["finetune"] = {"epochs": self.finetune.epochs, **tuning}
        return {name: raw[name] for name in Recipe.model_fields if raw.get(name) or (name in OPTIONAL and name in raw)}

    @staticmethod
    def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe in a TOML file, with `a.b=VALUE` overrides.

        Relative paths are relative to the file, and those of overrides to the working directory, as in any command.

        Raises:
            StorageError: the file cannot be read.
            RecipeError: it is not TOML, has an unknown key, a wrong type or a value out of range.
        """
        raw = read_toml(path, "recipe")
        if "cell" in raw:
            raise RecipeError(f"{path} is a gate and not a recipe; judge it with `slimvit gate --config {word(path)}`")
        for each in overrides:
            override(raw, each)
        return Recipe.from_dict(raw, base=path.parent)

    @staticmethod
    def from_dict(raw: Mapping[str, object], base: Path = Path()) -> Recipe:
        """The recipe from nested mappings; raises RecipeError as `load` does."""
        try:
            recipe = Recipe.model_validate(dict(raw))
        except ValidationError as error:
            raise RecipeError(explain(error, Recipe, "recipe")) from None
        return with_paths_from(recipe, base)


def with_paths_from(recipe: Recipe, base: Path) -> Recipe:
    """The same recipe with its relative paths made absolute, from `base`."""
    changed: dict[str, dict[str, str]] = {"model": {}, "data": {}}
    for (section, key), absolute in PLACES.items():
        changed[section][key] = absolute(getattr(getattr(recipe, section), key), base)
    return recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=places) for name, places in changed.items()}
    )


def with_own_map(tables: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe's tables with a class map that lies in the recipe's own folder named from there, so that both move together."""
    data = dict(tables.get("data", {}))
    classes, root = Path(data.get("classes", "")), folder.resolve()
    if classes.is_absolute() and classes.is_relative_to(root):
        data["classes"] = f"./{classes.relative_to(root).as_posix()}"
    return {name: data if name == "data" else keys for name, keys in tables.items()}


PLACES: dict[tuple[str, str], Callable[[str, Path], str]] = {
    ("model", "name"): absolute_model,
    ("model", "checkpoint"): absolute_checkpoint,
    ("data", "source"): absolute_source,
    ("data", "classes"): absolute_classes,
}
"""Keys whose value may name a place → what makes it absolute from a folder."""


def override(raw: dict[str, object], text: str) -> None:
    """Sets one key of nested tables in place, as `--set a.b=VALUE` does; raises RecipeError."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {text!r} is not of the form a.b=VALUE")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    *parents, last = key.strip().split(".")
    if isinstance(parsed, str) and (absolute := PLACES.get((".".join(parents), last))):
        parsed = absolute(parsed, Path.cwd())
    if parents[:2] == ["budget", "latency"]:  # target names hold no dots
        parents, last = parents[:2], ".".join([*parents[2:], last])
    node = raw
    for parent in parents:
        inner = node.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {text!r}: {parent} is not a table")
        node = inner
    node[last] = parsed
