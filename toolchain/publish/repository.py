"""A run's folder → the files of a repository that transformers.js finds, under the names that optimum expects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import JsonValue

from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.errors import ArtifactError, DataError, RecipeError, StorageError, fault_words
from toolchain.files import read_json
from toolchain.model import ModelRecord
from toolchain.outputs import FEATURES
from toolchain.places import HUB
from toolchain.publish.card import About, Shipped, card
from toolchain.publish.configs import config, preprocessor
from toolchain.publish.content import Content
from toolchain.publish.layout import NAMES, places
from toolchain.publish.manifest import Manifest
from toolchain.publish.recipe_of import recipe_in
from toolchain.publish.renamed import referring_to, renamed
from toolchain.report.record import Report

CARD, CONFIG, PREPROCESSOR, PLAN = "README.md", "config.json", "preprocessor_config.json", "plan.json"
REPORT, RECORD = "report.json", "deploy/model.json"
DATA = "_data"
"""What stands behind the name of an ONNX file that keeps its weights beside it."""


def repository(
    folder: Path, name: str, *, revision: str = "", labels: Sequence[str] = (), license_: str = "", base: str = ""
) -> dict[str, Content]:
    """Path → content of every file of a run's repository.

    Args:
        folder: of the run.
        name: of the repository, for the snippets of its card; of a folder, without a "/", there is none to name in them.
        revision: the branch that its snippets name; "" for the default branch.
        labels: names of the classes in the order of the outputs; () for those that the files say, and where they say none for those
            of transformers, "LABEL_0" and so on.
        license_: of the weights, as hubs spell it.
        base: the repository that the dense weights came from; "" for that which the run took them from, if it did.

    Raises:
        StorageError: the folder is not that of a run, or lacks files that its report lists.
        ArtifactError: one of them is not what it says, or was altered since the run wrote it.
        RecipeError: its files take pixels, or no image processor prepares pictures as they need it.
        DataError: there are more or fewer labels than classes.
    """
    report = Report.load(folder)
    manifest = Manifest.load(folder)
    record = ModelRecord.load(folder / RECORD)
    rows = [row for row in report.artifacts if row.model == "compressed" and row.refused is None]
    if not rows:
        raise StorageError(f"{folder} has no ONNX file of a compressed model; run its recipe with export.precisions")
    opened = [_opened(folder / row.path) for row in rows]
    read = [file.relative_to(folder).as_posix() for artifact in opened for file in artifact.files]
    manifest.require_these(folder, [REPORT, RECORD, PLAN, *read])
    where = places([row.precision for row in rows])
    files, shipped, external = dict[str, Content](), list[Shipped](), dict[str, JsonValue]()
    for row, artifact in zip(rows, opened, strict=True):
        place = where[row.precision]
        names = {port.name: NAMES.get(port.name, port.name) for port in (*artifact.inputs, *artifact.outputs)}
        beside = [file for file in artifact.files if file != artifact.path]
        model = renamed(artifact.model, names)
        if len(beside) > 1:
            raise ArtifactError(f"{artifact.path} keeps its weights in {len(beside)} files; one is expected")
        weights = tuple(f"{place.path}{DATA}" for _ in beside)
        for file, there in zip(beside, weights, strict=True):
            model = referring_to(model, Path(there).name)
            files[there] = Content(file)
            external[Path(place.path).name] = 1
        files[place.path] = Content(model.SerializeToString())
        shipped.append(Shipped(row, place, names[artifact.main_output], weights))
    count = 0 if report.output in FEATURES else _classes(opened[0])
    classes = _labels(labels or opened[0].class_names, count)
    browser: dict[str, JsonValue] = {} if where.get("int8-dynamic") or where.get("int8-qdq") else _default(shipped)
    if external:
        browser["use_external_data_format"] = external
    files[CONFIG] = _json(config(record, report.output, classes, browser))
    files[PREPROCESSOR] = _json(preprocessor(record.preprocess))
    files[PLAN] = Content((folder / PLAN).read_bytes())
    about = About(
        name,
        revision,
        base or _base(record),
        license_,
        manifest.versions,
        record.provenance,
        recipe_in(folder, report.recipe_digest),
    )
    files[CARD] = Content.of_text(card(report, shipped, about))
    return dict(sorted(files.items()))


def _opened(path: Path) -> OnnxFile:
    file = OnnxFile(path)
    if file.own_pixels:
        raise RecipeError(
            f"{path.name} takes uint8 pixels, which no image processor gives: run the recipe with export.preprocess = false"
        )
    return file


def _classes(file: OnnxFile) -> int:
    """The width of its outputs."""
    shape = next(port.shape for port in file.outputs if port.name == file.main_output)
    if not shape or not isinstance(shape[-1], int):
        raise ArtifactError(f"{file.path} does not say how many classes it tells apart")
    return shape[-1]


def _labels(labels: Sequence[str], count: int) -> tuple[str, ...]:
    if labels and len(labels) != count:
        raise DataError(f"there are {len(labels)} labels, and the model has {count} classes: give one label for each")
    return tuple(labels) or tuple(f"LABEL_{index}" for index in range(count))


def _default(shipped: Sequence[Shipped]) -> dict[str, JsonValue]:
    """The dtype to take where a page asks for none: browsers would look for an int8 file, which is not there."""
    dtypes = [each.place.dtype for each in shipped if each.place.dtype]
    chosen = "fp32" if "fp32" in dtypes else next(iter(dtypes), "")
    return {"dtype": chosen} if chosen else {}


def _base(record: ModelRecord) -> str:
    """The repository of a hub that the dense weights came from; "" if they came from elsewhere."""
    origin = str(record.provenance.get("pretrained", "")).removeprefix(f"{HUB}:").partition("@")[0]
    return origin if origin.count("/") == 1 else ""


def _json(value: object) -> Content:
    return Content.of_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_labels(path: Path) -> tuple[str, ...]:
    """The names of classes in a file: one a line, a JSON list, or a config.json with `id2label`.

    Raises:
        StorageError: it cannot be read.
        DataError: it is no text, holds no names, or numbers them otherwise than from 0 on.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot read {path}: {fault_words(error)}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text: save the names as UTF-8") from error
    if path.suffix != ".json":
        names = tuple(line.strip() for line in text.splitlines() if line.strip())
    else:
        raw = read_json(path)
        table = raw.get("id2label", raw) if isinstance(raw, dict) else raw
        if isinstance(table, dict) and table and all(key.isdecimal() for key in table):
            missing = [index for index in range(len(table)) if str(index) not in table]
            if missing:
                raise DataError(
                    f"{path} numbers {len(table)} classes, and none of them is {missing[0]}: number them from 0 to {len(table) - 1}"
                )
            table = [table[str(index)] for index in range(len(table))]
        names = tuple(map(str, table)) if isinstance(table, list) else ()
    if not names:
        raise DataError(
            f"{path} holds no names of classes: write one a line, a JSON list, or id2label as in a config.json"
        )
    return names
