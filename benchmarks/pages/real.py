"""The page of pretrained backbones: errors of features against size, votes of neighbours, a probe, saliency maps, time and memory."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence

import inputs
import numpy as np
from judging import SIDE, relative
from kinds.backbone import TUNING, BackboneCell, best_try
from kinds.compression import unpack
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image
from records import Record, Results
from suite import Suite

from pages import panels
from pages.panels import LogLines, Point, Series
from pages.plots import TRAINING
from pages.stats import ALPHA, paired_difference
from pages.text import hardware, markdown, missing, percent, whole
from toolchain.artifacts.onnx_file import FP32

NOTE = """\
*Error* is E‖f_dense − f‖² / E‖f_dense − mean‖² after the last norm: 0 for the dense model, 1 for one that always gives its mean;
of patch tokens the mean is that of their place. *Objects* are whole photographs, *cut-outs* are cut out of photographs, on white.
Intervals are 95 % percentile intervals of a bootstrap over pictures. *Neighbours* is how many pictures of both have the class that
most of the five nearest others have, by the class token. *Saliency* is the same error of the map that a decoder, which was trained
on the dense backbone and is left as it is, draws of the patch tokens. *Compressing* is in a process of its own, peak memory with it.
A recovered model was trained for one epoch to give the dense model's features, on the very images that it was calibrated on."""
FILES = """\
The ONNX files of the dense backbone and of half of it, all tokens as output, judged as modules are above, by one picture a call.
*Times fp32's* is the error of a file over that of the fp32 file of the same model, on objects: a file that adds a tenth has 1.1."""
RESAMPLES = 2000
FEW = 3
"""So many layers of one kind are counted, not named."""
PARTS = {"objects": "objects_", "cut-outs": "stamps_"}
"""What the judge's classes begin with."""
COLUMNS = ("dense.features", "joint.features.params0.75", "joint.features.params0.5", "joint.features.params0.35")
"""Rows whose maps are drawn side by side, without training."""


def error(record: Record, name: str, what: str, part: str = "") -> Point:
    """The error of a record on one set, "class", "patches" or "saliency", over the classes that begin with `part`, with its interval.

    x is the share of parameters that is left, in per cent.
    """
    figures = record.result["sets"][name]
    chosen = [at for at, each in enumerate(figures["names"]) if each.startswith(part)]
    wrong, spread = (np.array(figures[what][each])[chosen] for each in ("wrong", "spread"))
    point = relative(figures[what], chosen)
    drawn = _resampled(len(wrong))
    lo, hi = np.quantile((drawn @ wrong) / (drawn @ spread), [ALPHA / 2, 1 - ALPHA / 2])
    share = 100 * record.result["params"] / record.result["dense"]["params"]
    return Point(*(round(float(value), 6) for value in (share, point, lo, hi)))


def _resampled(count: int) -> NDArray[np.int64]:
    """How often each picture is in each resample, the same for all that is held against each other: [RESAMPLES, count]."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)


def shown(point: Point) -> str:
    """An error with its interval."""
    return f"{point.y:.3f} [{point.lo:.3f}, {point.hi:.3f}]" if point.y else "0"


def of_features(records: Sequence[Record]) -> str:
    """Every row that is judged on pictures."""
    body = []
    for record in records:
        judge, seconds = record.result["sets"]["judge"], record.seconds
        votes = int(unpack(judge["neighbours"]).sum())
        memory = record.result["peak_bytes"]
        body.append(
            [
                *_names(record),
                *(shown(error(record, "judge", "class", part)) for part in PARTS.values()),
                *(shown(error(record, "judge", "patches", part)) for part in PARTS.values()),
                *(shown(error(record, "drawings", what)) for what in ("class", "patches")),
                f"{votes} of {judge['neighbours']['total']}",
                *(shown(error(record, "judge", "saliency", part)) for part in PARTS.values()),
                _seconds(seconds),
                "—" if memory is None else f"{memory / 2**30:.1f} GiB",
            ]
        )
    tokens = [f"{what}, {part}" for what in ("Class token", "Patches") for part in PARTS]
    drawn = ["Class token, drawings", "Patches, drawings"]
    head = ["Row", "Outputs", "Training", "Params left", *tokens, *drawn, "Neighbours"]
    return markdown([*head, *(f"Saliency, {part}" for part in PARTS), "Compressing", "Peak memory"], body)


def of_files(records: Sequence[Record]) -> str:
    """Every file that ships, its errors, and how many times those of the fp32 file of the same model they are."""
    whole = {_model(record): record for record in records if record.definition["precision"] == FP32}
    body = []
    for record in records:
        about, file = record.definition, record.result["file"]
        base = whole.get(_model(record))
        ratios = ["—"] * 2 if base in (None, record) else [_times(record, base, what) for what in ("class", "patches")]
        body.append(
            [
                f"`{_model(record)}`",
                about["precision"],
                f"{file['bytes'] / 1e6:.1f} MB",
                percent(file["bytes"] / record.result["dense"]["bytes"]),
                *(shown(error(record, "judge", what, PARTS["objects"])) for what in ("class", "patches")),
                *ratios,
                *(shown(error(record, "drawings", what)) for what in ("class", "patches")),
                _left(file["left"]),
            ]
        )
    objects = ["Class token, objects", "Patches, objects", "Class token, times fp32's", "Patches, times fp32's"]
    head = ["Model", "Precision", "File", "Of dense fp32", *objects, "Class token, drawings", "Patches, drawings"]
    return markdown([*head, "Left in a finer type"], body)


def _left(names: Sequence[str]) -> str:
    """Layers by name, or of one kind in more than two blocks by their number."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"^blocks\.\d+\.", "", name), []).append(name)
    few = (f"`{name}`" for alike in kinds.values() if len(alike) < FEW for name in alike)
    many = (f"`{kind}` of {len(alike)} blocks" for kind, alike in kinds.items() if len(alike) >= FEW)
    return ", ".join([*few, *many]) or "none"


def _model(record: Record) -> str:
    """The row of the model that a file is of."""
    about = record.definition
    return ".".join(part for part in about["row"].split(".") if part not in (about["task"], about["precision"]))


def _times(record: Record, base: Record, what: str) -> str:
    """How many times the error on photographs of objects is that of another record, paired picture by picture."""
    figures = [each.result["sets"]["judge"] for each in (record, base)]
    chosen = [at for at, each in enumerate(figures[0]["names"]) if each.startswith(PARTS["objects"])]
    ours, theirs = (np.array(each[what]["wrong"])[chosen] for each in figures)
    drawn = _resampled(len(chosen))
    lo, hi = np.quantile((drawn @ ours) / (drawn @ theirs), [ALPHA / 2, 1 - ALPHA / 2])
    return f"{ours.sum() / theirs.sum():.3f} [{lo:.3f}, {hi:.3f}]"


def of_probe(records: Sequence[Record]) -> str:
    """Every row of the linear probe, its errors held against the dense model's image by image."""
    dense = next((record for record in records if record.definition["row"].startswith("dense")), None)
    if dense is None:
        return ""
    body, base = [], ~unpack(dense.result["probe"]["test"])[None]
    for record in records:
        probe = record.result["probe"]
        wrong: NDArray[np.bool_] = ~unpack(probe["test"])[None]
        more = paired_difference(wrong, base, base)
        memory = record.result["peak_bytes"]
        body.append(
            [
                *_names(record),
                f"{probe['test']['wrong']} of {probe['test']['total']}",
                "—"
                if record is dense
                else f"{percent(more.point, signed=True)} [{percent(more.lo, signed=True)}, {percent(more.hi, signed=True)}]",
                f"{int(unpack(probe['neighbours']).sum())} of {probe['neighbours']['total']}",
                f"{relative(probe['class']):.3f}",
                "yes" if record.result["labels"] else "no",
                _seconds(record.seconds),
                "—" if memory is None else f"{memory / 2**30:.1f} GiB",
            ]
        )
    head = ["Row", "Outputs", "Training", "Params left", "Wrong", "Errors more or fewer", "Neighbours", "Class token"]
    return markdown([*head, "Labels read", "Compressing", "Peak memory"], body)


def of_sweeps(suite: Suite, results: Results) -> str:
    """Every try of every sweep on the tuning set, and which was taken."""
    parts = []
    for name, cells in suite.sweeps.items():
        records = [record for cell in cells if (record := results.read(suite.name, cell.name)) is not None]
        if not records:
            continue
        best = best_try(records) if len(records) == len(cells) else None
        keys = list(dict.fromkeys(key for record in records for key in record.definition["tried"]))
        body = [
            [
                *(str(record.definition["tried"].get(key, "")) for key in keys),
                _tuning(record),
                "taken" if record is best else "",
            ]
            for record in records
        ]
        parts.append(f"### {name}\n\n{markdown([*(f'`{key}`' for key in keys), 'On the tuning set', ''], body)}")
    return "\n\n".join(parts)


def _tuning(record: Record) -> str:
    if "probe" in record.result:
        counted = record.result["probe"]["validation"]
        return f"{counted['wrong']} of {counted['total']} validation images wrong"
    figures = record.result["sets"][TUNING]
    return f"class token {relative(figures['class']):.3f}, patches {relative(figures['patches']):.3f}"


def _names(record: Record) -> list[str]:
    about, result = record.definition, record.result
    row = ".".join(part for part in about["row"].split(".") if part != about["task"])
    return [f"`{row}`", about["task"], about["training"], percent(result["params"] / result["dense"]["params"])]


def _seconds(seconds: Mapping[str, float]) -> str:
    spent = sum(seconds.get(name, 0.0) for name in ("gradients", "compress"))
    after = seconds.get("recovery")
    return f"{spent:.0f} s{'' if after is None else f' + {after:.0f} s'}" if spent else "—"


def by_size(records: Sequence[Record]) -> str:
    """Errors on the judge's photographs of objects against what is left, one line for each method and training."""
    drawn, names = [], dict[str, int]()
    for what, title in (("class", "class token"), ("patches", "patch tokens"), ("saliency", "saliency map")):
        series: dict[str, list[Point]] = {}
        for record in records:
            about = record.definition
            if about["row"].startswith("dense") or about["task"] == "probe":
                continue
            method = "Torch-Pruning" if about["peer"] else f"joint, {about['task']}"
            label = f"{method}, {TRAINING[about['training']]}"
            names.setdefault(label, len(names))
            series.setdefault(label, []).append(error(record, "judge", what, PARTS["objects"]))
        lines = tuple(Series(label, tuple(points), names[label]) for label, points in series.items())
        drawn.append(LogLines(title, "parameters left, % of dense", "error on other photographs", lines, zero=False))
    return panels.lines(drawn)


CELL, GAP, TOP, LEFT, LINE = 112, 6, 42, 4, 15
"""Pixels of a picture in the figure, between them, above them, and beside them, and of a line of a title."""


def maps(columns: Mapping[str, Record]) -> str:
    """Pictures of the judge, and the maps that the decoder draws of each backbone's tokens, as an SVG with the bitmaps in it."""
    dense = next(iter(columns.values()))
    names = list(dense.result["thumbnails"])
    titles = ["picture", *(_title(record) for record in columns.values())]
    parts = [
        f'<text x="{_at(column) + CELL / 2:.0f}" y="{TOP - 10 - LINE * below}" text-anchor="middle">{line}</text>'
        for column, title in enumerate(titles)
        for below, line in enumerate(reversed(title.split(", ")))
    ]
    for row, name in enumerate(names):
        bitmaps = [f"data:image/jpeg;base64,{dense.result['thumbnails'][name]}"]
        bitmaps += [_bitmap(record.result["maps"][name]) for record in columns.values()]
        parts += [
            f'<image x="{_at(column)}" y="{TOP + row * (CELL + GAP)}" width="{CELL}" height="{CELL}" href="{bitmap}"/>'
            for column, bitmap in enumerate(bitmaps)
        ]
    width, height = _at(len(titles)), TOP + len(names) * (CELL + GAP)
    title = "Saliency maps that one decoder draws of the dense backbone and of smaller ones"
    style = (
        "text { font: 12px system-ui, sans-serif; fill: #24292f; } "
        "@media (prefers-color-scheme: dark) { text { fill: #e6edf3; } }"
    )
    body = "\n".join(f"  {part}" for part in parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">\n'
        f"  <title>{title}</title>\n  <style>{style}</style>\n{body}\n</svg>\n"
    )


def _at(column: int) -> int:
    return LEFT + column * (CELL + GAP)


def _title(record: Record) -> str:
    share = record.result["params"] / record.result["dense"]["params"]
    if share == 1:
        return "dense"
    return f"{'Torch-Pruning, ' if record.definition['peer'] else ''}{100 * share:.0f} % left"


def _bitmap(small: str) -> str:
    """A recorded map in colour, as the URI of a PNG."""
    image = Image.frombytes("P", (SIDE, SIDE), base64.b64decode(small))
    image.putpalette((255 * colormaps["magma"](np.arange(256))[:, :3]).round().astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def drawn_maps(suite: Suite, results: Results) -> str:
    """The figure of maps, of the rows that are recorded; "" without the dense one."""
    rows = {row: results.read(suite.name, f"{row}.zero") for row in COLUMNS}
    found = {row: record for row, record in rows.items() if record is not None}
    peer = next((c.name for c in suite.cells if c.row == "taylor.features.params0.5" and c.name.endswith(".zero")), "")
    if peer and (record := results.read(suite.name, peer)) is not None:
        found[peer] = record
    return maps(found) if COLUMNS[0] in found and "thumbnails" in found[COLUMNS[0]].result else ""


def page(suite: Suite, results: Results) -> dict[str, str]:
    """README.md and its figures; empty if nothing is recorded."""
    cells = [cell for cell in suite.cells if isinstance(cell, BackboneCell)]
    every = [results.read(suite.name, cell.name) for cell in cells]
    records = [record for record in every if record is not None]
    if not records:
        return {}
    rows = [record for record in records if not record.definition["sweep"]]
    shipped = [record for record in rows if record.definition.get("precision")]
    pictured = [record for record in rows if record.definition["task"] != "probe" and record not in shipped]
    files = {}
    parts = [missing(len(cells) - len(records), len(cells)), NOTE]
    if [record for record in pictured if not record.definition["row"].startswith("dense")]:
        files["error.svg"] = by_size(pictured)
        parts.append(
            "![Errors of features and maps on other photographs against the share of parameters left](error.svg)"
        )
    if figure := drawn_maps(suite, results):
        files["maps.svg"] = figure
        whose = "; ".join(inputs.SHOWN.values())
        parts.append("![Saliency maps of the dense backbone and of smaller ones, side by side](maps.svg)")
        parts.append(f"No training. The pictures are in the public domain ({whose}).")
    sections = {
        "Features on other pictures": of_features(pictured) if pictured else "",
        "Files": f"{FILES}\n\n{of_files(shipped)}" if shipped else "",
        "A linear probe on Fashion-MNIST": of_probe([r for r in rows if r.definition["task"] == "probe"]),
        "Sweeps": of_sweeps(suite, results),
    }
    parts += [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    parts.append("Measured on: " + "; ".join(sorted({hardware(record.machine) for record in records})) + ".")
    return {"README.md": whole(suite, parts), **files}
