"""Drafts a recipe for a model and images, for `slimvit init` and `slimvit shrink`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomlkit
from timm.utils.misc import natural_key

from toolchain.artifacts.onnx_file import FP32
from toolchain.data import SOURCES
from toolchain.data.folders import folders_in, layout_of
from toolchain.defaults import PARAMS
from toolchain.errors import DataError, ModelError
from toolchain.files import expanded
from toolchain.model import ModelRecord
from toolchain.outputs import FEATURES, output_of
from toolchain.pipeline.named import require_model, require_pictures
from toolchain.places import HUB, LOCAL
from toolchain.recipe import ANY, Recipe, override, with_own_map
from toolchain.surgery.anatomy import by
from toolchain.surgery.candidates import architecture_of
from toolchain.surgery.checkpoint import read_checkpoint
from toolchain.surgery.hub import CONFIG, read_config
from toolchain.surgery.huggingface.folder import Folder
from toolchain.surgery.load import load_dense
from toolchain.surgery.reading import CHECKPOINTS

log = logging.getLogger(__name__)
CLASSES_FILE, SCHEMA_FILE = "classes.json", "recipe.schema.json"
"""Beside a recipe: its class map, and the JSON schema that editors complete and check it by."""
OFFERED = ("fp16", "int8-dynamic", "int4")
"""The precisions that a file may have whose precision the user leaves open."""
HEAD = "docs/recipe.md says what every key means."


@dataclass(frozen=True)
class Draft:
    """A recipe before it is written.

    Attributes:
        tables: its sections, as TOML nests them.
        remarks: "section.key" → what stands behind a key as a comment.
        classes: class folder → number of the model's output, for a file beside the recipe; {} where none is needed.
    """

    tables: Mapping[str, Any]
    remarks: Mapping[str, str]
    classes: Mapping[str, int]

    @staticmethod
    def of(
        model: str,
        data: str,
        budget: Mapping[str, object],
        *,
        name: str = "",
        overrides: Sequence[str] = (),
        beside: Path = Path(),
    ) -> Draft:
        """A draft that fits a model and images.

        Args:
            model: a timm or hub name, a checkpoint, or a folder of transformers, of timm, or of a run.
            data: a folder of pictures, or a source as in a recipe.
            budget: the keys of [budget]; without any, and without overrides of it, half of the parameters are left.
            name: timm's name of the model, where `model` is a checkpoint that does not tell.
            overrides: keys of the recipe, as `--set` takes them.
            beside: the folder that the recipe will lie in.

        Raises:
            SlimvitError: one of them is not there, or is not supported.
        """
        tables = {**tables_of(model, name), "budget": dict(budget)}
        tables |= {"export": {}, "bench": {"targets": ["ort-cpu"]}}
        for each in overrides:
            override(tables, each)
        tables["export"] = {"precisions": _precisions(tables["budget"].get("size")), **tables["export"]}
        if not tables["budget"]:
            tables["budget"] = {"params": PARAMS}
        section = Recipe.from_dict({"model": tables["model"]}).model
        loaded = load_dense(section, weights=False, fetch=False, may_be_untrained=True)
        module, size = loaded.module, by(loaded.family.input_size(loaded.module))
        classes = 0 if loaded.ref.output in FEATURES else int(module.num_classes)  # type: ignore[arg-type]
        path = expanded(model)
        natural = path.is_file() and read_checkpoint(path).trained.in_natural_order
        pictures = pictures_of(data, classes, loaded.class_names, in_natural_order=natural)
        numbers = {} if "classes" in tables["data"] else pictures.numbers
        where = {"classes": str(beside / CLASSES_FILE)} if numbers else {}
        tables["data"] = {"source": pictures.source, **where, **tables["data"]}
        million = sum(parameter.numel() for parameter in module.parameters()) / 1e6
        summary = f"{million:.1f} M parameters, images of {size}, {output_of(loaded.ref.output, classes)}"
        remarks = {f"model.{next(iter(tables['model']))}": summary, "data.source": pictures.remark, **REMARKS}
        return Draft(_absolute(tables), remarks, numbers)

    @property
    def recipe(self) -> Recipe:
        """The recipe itself."""
        return Recipe.from_dict(self.tables)

    def text(self, folder: Path) -> str:
        """The recipe as TOML, with comments, for a file in a folder."""
        document = tomlkit.document()
        for name, keys in with_own_map(self.tables, folder).items():
            table = tomlkit.table()
            for key, value in keys.items():
                table.add(key, value)
                if (remark := self.remarks.get(f"{name}.{key}", "")) and not isinstance(value, dict):
                    table[key].comment(remark)
            document.add(tomlkit.nl())
            document.add(name, table)
        return f"#:schema ./{SCHEMA_FILE}\n# {HEAD}\n{tomlkit.dumps(document)}"


REMARKS = {
    "budget.params": "the share of the parameters that is left",
    "budget.macs": "the share of the multiply-accumulates that is left",
    "budget.size": "of the weights in fp32: a share of the dense ones, or in MB; { int8 = … } is of the int8 file",
    "export.precisions": "also fp16, bf16, int8",
    "bench.targets": "where dense and compressed are timed; [] is nowhere",
}


def _precisions(size: object) -> list[str]:
    """The precisions of the files that `budget.size` speaks of, fp32 first."""
    named = list(size) if isinstance(size, dict) else []
    return list(dict.fromkeys([FP32, *(OFFERED if ANY in named else named)]))


def _absolute(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The tables with paths that do not depend on where the recipe lies."""
    recipe = Recipe.from_dict(tables)
    places = {
        "model": {"name": recipe.model.name, "checkpoint": recipe.model.checkpoint},
        "data": {"source": recipe.data.source, "classes": recipe.data.classes},
    }
    return {
        name: {key: places.get(name, {}).get(key, value) for key, value in keys.items()}
        for name, keys in tables.items()
    }


def tables_of(model: str, name: str = "") -> dict[str, Any]:
    """[model] and [data], as far as they follow from what a user calls a model, as in `Draft.of`."""
    path = expanded(model)
    if path.is_file():
        architecture, arguments = architecture_of(path, name)
        kwargs = {"kwargs": arguments} if arguments else {}
        data = dict(read_checkpoint(path).trained.data)
        return {"model": {"name": architecture, "checkpoint": str(path), **kwargs}, "data": data}
    if name:
        raise ModelError(f"--model goes with a checkpoint, and {model} is none; remove it")
    if path.is_dir():
        return _folder_tables(path)
    require_model(model)
    is_name = ":" in model or "/" not in model
    return {"model": {"name": model if is_name else f"{HUB}:{model}"}, "data": {}}


def _folder_tables(folder: Path) -> dict[str, Any]:
    if (folder / "model.json").is_file():
        return _run_tables(folder, ModelRecord.load(folder / "model.json"))
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{folder} holds no model: there is neither a {CONFIG} nor a model.json in it{_instead(folder)}"
        )
    if "architecture" in read_config(folder / CONFIG, str(folder)):
        return {"model": {"name": f"{LOCAL}:{folder}"}, "data": {}}
    size = Folder.open(folder).suggested_size
    kwargs = {} if size is None else {"kwargs": {"img_size": list(size)}}
    return {"model": {"checkpoint": str(folder), **kwargs}, "data": {}}


def _instead(folder: Path) -> str:
    """A clause on what to do with a folder that holds no model."""
    if (folder / "adapter_config.json").is_file():
        return (
            "; it is an adapter of peft: merge it into its model (merge_and_unload), and save that with save_pretrained"
        )
    if (folder / "dense" / "model.json").is_file():
        return f"; it is that of a run, whose dense model is {folder / 'dense'}"
    files = sorted(file.name for file in folder.iterdir() if file.name.endswith(CHECKPOINTS))
    return f"; name a file in it: {', '.join(files[:3])}" if files else ""


def _run_tables(folder: Path, record: ModelRecord) -> dict[str, Any]:
    """Of the dense model that a run left: with its outputs and preprocessing, which its name does not tell."""
    if record.stage != "dense":
        raise ModelError(f"{folder} holds a model that was compressed already; name the dense one")
    ref, how = record.model, record.preprocess
    model: dict[str, object] = {"name": ref.name, "kwargs": ref.kwargs, "checkpoint": str(folder / "model.safetensors")}
    model |= {"output": ref.output or "", "layers": list(ref.layers)}
    data: dict[str, object] = {"mean": list(how.mean), "std": list(how.std), "crop_pct": how.crop_pct or 0}
    if how.crop_pct:  # of pictures, which a source without any resizes in its own way
        data |= {"interpolation": how.interpolation, "crop_mode": how.crop_mode or ""}
    return {
        "model": {key: value for key, value in model.items() if value},
        "data": {key: value for key, value in data.items() if value},
    }


@dataclass(frozen=True)
class Pictures:
    """A source as in a recipe, what it is in a few words, and which output each class folder stands for, if not in order."""

    source: str
    remark: str = ""
    numbers: Mapping[str, int] = field(default_factory=dict)


def _unread(source: str, why: str) -> Pictures:
    """Pictures whose folders look like labels and are not taken for them, which is said."""
    log.warning("data: %s, so the files are judged without them", why)
    return Pictures(source, why)


def pictures_of(data: str, classes: int, names: Sequence[str] = (), *, in_natural_order: bool = False) -> Pictures:
    """What a folder of pictures, or a source that is one already, can tell of a model.

    Args:
        data: as in `Draft.of`.
        classes: of the model; 0 where it has none. Folders are then read as labels, by which its features are judged, only where
            every split has the same ones: whoever sorts pictures into albums means no classes.
        names: of these classes in the order of the outputs, where the model says them.
        in_natural_order: whether the outputs are in timm's order of the folders: 2 before 10, without regard to case.

    Raises:
        DataError: there is no such folder.
    """
    if data.partition(":")[0] in SOURCES:
        return Pictures(data)
    require_pictures(data)
    folder = expanded(data)
    if not folder.is_dir():
        raise DataError(f"there is no folder {data}; give a folder of pictures, or a source such as digits or hf:NAME")
    try:
        splits = {part: list(folders_in(below)) for part, below in layout_of(folder)[0].items()}
    except DataError:  # no folders that could be classes
        splits = {"train": []}
    folders = splits["train"]
    unlabelled, count = f"images:{folder.resolve()}", len(folders)
    if count < 2:
        return Pictures(unlabelled, "no labels")
    if not classes and (len(splits) < 2 or any(names != folders for names in splits.values())):
        return Pictures(unlabelled, f"no labels; imagefolder:{folder} takes its {count} folders for classes")
    if classes not in (0, count):
        return _unread(unlabelled, f"{count} folders, but the model has {classes} classes: labels are not read")
    labelled, natural = f"imagefolder:{folder.resolve()}", sorted(folders, key=natural_key)
    if in_natural_order and not names:
        names = natural
    if not classes or not names:
        return Pictures(labelled, f"{count} classes" + (", numbered in alphabetical order" if classes else ""))
    if set(folders) != set(names):
        return _unread(unlabelled, "the folders have other names than the model's classes: labels are not read")
    return Pictures(
        labelled, f"{count} classes", {} if folders == list(names) == natural else {n: i for i, n in enumerate(names)}
    )
