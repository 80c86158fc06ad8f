"""What a stranger sees first, from records alone: one picture and one table of files that ship, for `docs/` and the README.

The picture is an SVG without a script that follows the reader's light or dark colours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pages import formats, real
from pages.files import timed
from pages.text import hardware, instruction_set, markdown, verified
from records import Record, Results
from suite import Suite

from toolchain.errors import ArtifactError
from toolchain.measure.comparison import Comparison

ROOT = Path(__file__).resolve().parents[1]
SUITE = "targets"
MODELS = {"deit_small": "DeiT-S shape, random weights", "fashion_mnist_vit": "ViT on Fashion-MNIST"}
DRAWN = "fashion_mnist_vit"
BEGIN, END = "<!-- results: written by `python benchmarks/report.py` -->", "<!-- /results -->"
"""Lines between which a page has the table."""
INT8 = ("int8-dynamic", "int8-qdq")
PLAIN = ("formats", "deit_small_everywhere")
"""The suite and the run of DeiT-S that were measured on a processor without AMX."""


@dataclass(frozen=True)
class File:
    """One file: what it is, its bytes, its accuracy where there are labels, and its comparison with the dense fp32 one."""

    model: str
    form: str
    precision: str
    size_bytes: int
    wrong: int | None
    total: int | None
    pair: Comparison | None

    @property
    def accuracy(self) -> float | None:
        """Per cent of the test images."""
        return None if self.wrong is None or self.total is None else 100 * (1 - self.wrong / self.total)


def files(results: Results, name: str) -> list[File]:
    """The ONNX files of a recorded run, the dense one first; raises ArtifactError if it is not recorded."""
    record = results.read(SUITE, name)
    if record is None:
        raise ArtifactError(f"{results.path(SUITE, name)} is missing: docs/results.md and the picture are made from it")
    pairs, _ = timed(record, results)
    return [_file(record, row["path"], pairs) for row in record.result["artifacts"] if row["refused"] is None]


def _file(record: Record, path: str, pairs: dict[str, Comparison]) -> File:
    row = next(row for row in record.result["artifacts"] if row["path"] == path)
    pair = pairs.get(row["precision"]) if row["model"] == "compressed" else None
    about = (record.cell, row["model"], row["precision"], row["bytes"], row["wrong"], row["total"])
    return File(*about, pair)


def table(results: Results) -> str:
    """Eight rows: two models, each dense, at half of its parameters, and that in int8 and int4; machine and instruction set below."""
    rows, machines = [], dict[str, str]()
    for name, title in MODELS.items():
        every = files(results, name)
        dense, fp32 = every[0], next(file for file in every[1:] if file.precision == "fp32")
        fastest = [file for file in every if file.precision in INT8 and file.pair is not None]
        int8 = min(fastest, key=lambda file: file.pair.ratio.point if file.pair else 0.0)
        int4 = next(file for file in every if file.precision == "int4")
        for file in (dense, fp32, int8, int4):
            pair = file.pair or fp32.pair
            assert pair is not None
            machines[hardware(pair.environment, decisive=True)] = ""
            what = "dense fp32" if file is dense else f"half of the parameters, {file.precision}"
            rows.append(
                [
                    title,
                    what,
                    f"{file.size_bytes / 1e6:.2f} MB",
                    f"{100 * file.size_bytes / dense.size_bytes:.1f} %",
                    "–" if file.accuracy is None else f"{file.accuracy:.2f} %",
                    f"{pair.latency_ms('B' if file.pair else 'A'):.2f} ms",
                    "–" if file.pair is None else verified(file.pair) or "not verified",
                ]
            )
    head = [
        "Model",
        "ONNX file",
        "Bytes",
        "Of dense fp32",
        "Test accuracy",
        "Median time of a call",
        "Verified speedup over dense fp32",
    ]
    caption = (
        "Each row is its own paired comparison with the dense fp32 file of its model, so times of different rows may not be divided: ONNX "
        "Runtime on the CPU, one thread, batch 1. A verified speedup is the lower bound of its interval, which is of 95 % or more. Accuracy "
        "is of 10,000 test images. The DeiT-S has random weights and the same width in every block: it shows bytes and times alone. "
        "[int8-qdq and int8-dynamic](docs/precision.md) are two kinds of int8; the faster one is shown. When ONNX Runtime opens an int4 "
        "file its weights become int8, which saves bytes and no time. "
        f"Measured on: {'; '.join(machines)}; its AMX units multiply int8.{without_amx(results)}"
    )
    return f"{markdown(head, rows)}\n\n{caption}\n"


def without_amx(results: Results) -> str:
    """The speedups of the halved DeiT-S where there is no AMX, as a sentence; "" where the suite of formats is not recorded."""
    record = results.read(*PLAIN)
    pairs = {} if record is None else formats.timed(record, results)
    told = [
        (precision, pairs["ort-cpu", precision]) for precision in ("fp32", INT8[0]) if ("ort-cpu", precision) in pairs
    ]
    if not told:
        return ""
    bounds = " and ".join(f"{verified(pair) or 'not verified'} in {precision}" for precision, pair in told)
    where = hardware(told[0][1].environment, decisive=True)
    return (
        f" On a processor without AMX the speedup of half a DeiT-S is {bounds} ({where}; "
        "[all files](benchmarks/results/formats/README.md))."
    )


PRETRAINED_MODEL = "vit_small_patch14_dinov2"
"""The folder of `models/` that the suite `real` measures."""
PRETRAINED = ("dense", "joint.params0.75", "joint.params0.5", "joint.params0.35")
"""Rows of the suite `real` that stand in the first table, without training."""


def pretrained_table(results: Results) -> str:
    """What is left of a pretrained backbone at each size, without labels and training; "" until all rows are recorded."""
    rows = []
    probes = {name: results.read("real", f"{_of(name, 'probe')}.zero") for name in PRETRAINED}
    machines = dict[str, str]()
    for name in PRETRAINED:
        record = results.read("real", f"{_of(name, 'features')}.zero")
        if record is None:
            return ""
        if name != "dense":
            machines[hardware(record.machine, decisive=True)] = ""
        judge, probe = record.result["sets"]["judge"], probes[name]
        votes = judge["neighbours"]["total"] - judge["neighbours"]["wrong"]
        told = None if probe is None else probe.result["probe"]["test"]
        rows.append(
            [
                "dense"
                if name == "dense"
                else f"{100 * record.result['params'] / record.result['dense']['params']:.0f} % of the parameters",
                f"{record.result['bytes'] / 1e6:.1f} MB",
                *(
                    real.shown(real.error(record, "judge", what, real.PARTS["objects"]))
                    for what in ("class", "patches")
                ),
                real.shown(real.error(record, "drawings", "class")),
                f"{votes} of {judge['neighbours']['total']}",
                "–" if told is None else f"{told['wrong']} of {told['total']}",
                "–" if name == "dense" else f"{record.seconds['compress']:.0f} s",
            ]
        )
    head = [
        "DINOv2 ViT-S/14",
        "Weights, fp32",
        "Class token error, objects",
        "Patch token error, objects",
        "Class token error, drawings",
        "5-NN right",
        "Fashion-MNIST probe wrong ¹",
        "Time to compress",
    ]
    caption = (
        "Error: the squared distance to the dense model's features after the last norm, over their variance; 0 is the dense model, 1 a "
        "model that always gives their mean. Brackets: 95 % intervals over pictures. The models were compressed at 224 pixels on 384 "
        "crops of photographs, and are judged on photographs of other subjects and on drawings, the like of which they never saw. 5-NN "
        "right: photographs that have the class of most of their five nearest others, by class token. ¹ Other models of the same sizes: "
        "the dense backbone with a linear classifier, compressed on 384 unlabelled images of Fashion-MNIST; –: not measured. "
        f"Compressed once each, on: {'; '.join(machines)}. [All rows](benchmarks/results/real/README.md)."
    )
    return f"{markdown(head, rows)}\n\n{caption}\n"


def _of(name: str, task: str) -> str:
    """The row of a name of `PRETRAINED` whose outputs are those of a task."""
    base, _, rest = name.partition(".")
    return ".".join(filter(None, (base, task, rest)))


STYLE = """\
    text { font: 13px system-ui, sans-serif; fill: #24292f; }
    .small { font-size: 12px; }
    .grid { stroke: #8c959f; stroke-opacity: 0.35; }
    .s0 { fill: #57606a; stroke: #57606a; } .s1 { fill: #0969da; stroke: #0969da; }
    .s2 { fill: #1a7f37; stroke: #1a7f37; } .s3 { fill: #bc4c00; stroke: #bc4c00; }
    .s4 { fill: #8250df; stroke: #8250df; }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3; }
      .s0 { fill: #9198a1; stroke: #9198a1; } .s1 { fill: #4493f8; stroke: #4493f8; }
      .s2 { fill: #3fb950; stroke: #3fb950; } .s3 { fill: #f0883e; stroke: #f0883e; }
      .s4 { fill: #a371f7; stroke: #a371f7; }
    }"""
SERIES = ("dense fp32", "half, fp32", "half, fp16", "half, int8", "half, int4")
WIDE, HIGH, LEFT, TOP, GAP = 330, 170, 60, 50, 60
"""Of a panel, the margins around it, and the space between the two, in pixels."""


@dataclass(frozen=True)
class Dot:
    """A file in a panel: per cent of dense with its interval, accuracy, and the number of its series."""

    x: float
    lo: float
    hi: float
    y: float
    series: int


def picture(results: Results) -> str:
    """An SVG: bytes, and latency, of each file as a share of the dense one's, against test accuracy."""
    every = [file for file in files(results, DRAWN) if file.accuracy is not None]
    dense = every[0]
    sizes, times = [], []
    for file in every:
        number = 0 if file is dense else {"fp32": 1, "fp16": 2, "int4": 4}.get(file.precision, 3)
        share = 100 * file.size_bytes / dense.size_bytes
        sizes.append(Dot(share, share, share, file.accuracy or 0.0, number))
        ratio = {"point": 1.0, "lo": 1.0, "hi": 1.0} if file.pair is None else file.pair.ratio.to_ratio()
        if file is dense or file.pair is not None:
            times.append(Dot(*(100 * ratio[name] for name in ("point", "lo", "hi")), file.accuracy or 0.0, number))
    top = 2 * (int(max(dot.y for dot in sizes)) // 2 + 1)
    low = top - 4
    panels = [_panel(0, "bytes, % of dense", sizes, low, top), _panel(1, "latency, % of dense", times, low, top)]
    pair = next(file.pair for file in every if file.pair is not None)
    width, height = LEFT + 2 * WIDE + GAP + 20, TOP + HIGH + 125
    title = "Bytes and latency against test accuracy of a ViT on Fashion-MNIST, dense and with half of its parameters"
    entries = "\n".join(
        f'  {_mark(LEFT + 10 + 140 * number, TOP + HIGH + 63, number)}<text x="{LEFT + 22 + 140 * number}" '
        f'y="{TOP + HIGH + 67}">{name}</text>'
        for number, name in enumerate(SERIES)
    )
    confidence = 100 * (1 - pair.design.alpha / pair.design.looks)
    below = (
        f"ONNX Runtime, one thread, batch 1; bars are {confidence:.3g} % intervals. Measured on: {pair.environment['cpu']} with",
        instruction_set(pair.environment),
    )
    notes = "\n".join(
        f'  <text class="small" x="{LEFT}" y="{TOP + HIGH + 95 + 17 * number}">{line}</text>'
        for number, line in enumerate(below)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">\n'
        f"  <title>{title}</title>\n  <style>\n{STYLE}\n  </style>\n"
        f'  <text x="{LEFT}" y="24">Test accuracy, %: a ViT on Fashion-MNIST, dense and with half of its parameters</text>\n'
        + "\n".join(panels)
        + f"\n{entries}\n{notes}\n</svg>\n"
    )


def _panel(number: int, label: str, dots: Sequence[Dot], low: int, high: int) -> str:
    left = LEFT + number * (WIDE + GAP)

    def across(x: float) -> str:
        return f"{left + WIDE * x / 110:.1f}"

    def up(y: float) -> str:
        return f"{TOP + HIGH * (high - y) / (high - low):.1f}"

    lines = []
    for y in range(low, high + 1, 2):
        lines.append(f'<line class="grid" x1="{left}" x2="{left + WIDE}" y1="{up(y)}" y2="{up(y)}"/>')
        lines.append(f'<text class="small" x="{left - 8}" y="{float(up(y)) + 4:.1f}" text-anchor="end">{y}</text>')
    for x in range(0, 101, 25):
        lines.append(f'<line class="grid" x1="{across(x)}" x2="{across(x)}" y1="{TOP}" y2="{TOP + HIGH}"/>')
        lines.append(f'<text class="small" x="{across(x)}" y="{TOP + HIGH + 18}" text-anchor="middle">{x}</text>')
    lines.append(f'<text x="{left + WIDE / 2:.1f}" y="{TOP + HIGH + 38}" text-anchor="middle">{label}</text>')
    for dot in dots:
        ends = f'x1="{across(dot.lo)}" x2="{across(dot.hi)}" y1="{up(dot.y)}" y2="{up(dot.y)}"'
        lines.append(f'<line class="s{dot.series}" stroke-width="2" {ends}/>')
        lines.append(_mark(float(across(dot.x)), float(up(dot.y)), dot.series))
    return "\n".join(f"  {line}" for line in lines)


def _mark(x: float, y: float, series: int) -> str:
    """A mark whose form, too, tells the series."""
    form = ("0,-6 6,0 0,6 -6,0", "-5,-5 5,-5 5,5 -5,5", "0,-6 6,5 -6,5", "-6,-5 6,-5 0,6", "-6,0 5,-6 5,6")[series]
    return f'<polygon class="s{series}" fill-opacity="0.75" transform="translate({x:.1f} {y:.1f})" points="{form}"/>'


def within(page: str, fragment: str) -> str:
    """A page with the fragment between its two marks; unchanged if it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{begin}\n\n{fragment}\n{end}{after}" if begin and end else page


def drawn(results: Results) -> dict[Path, str]:
    """File → text: the pictures, and the pages that have the tables between its two marks.

    Once the suite `real` is recorded its rows are the first table, and its maps a picture beside the other; before, neither.
    """
    first = pretrained_table(results)
    maps = real.drawn_maps(Suite.load(Path("real")), results) if first else ""
    fragment = f"{first}\n{table(results)}" if first else table(results)
    shown = {ROOT / "README.md": fragment, ROOT / "docs" / "results.md": fragment}
    texts = {
        page: within(page.read_text(encoding="utf-8"), placed(text, page))
        for page, text in shown.items()
        if page.is_file()
    }
    pictures = {"results.svg": picture(results), **({"pretrained.svg": maps} if maps else {})}
    return {**{ROOT / "docs" / name: text for name, text in pictures.items()}, **texts}


def placed(text: str, page: Path) -> str:
    """A fragment whose links, which are those of the repository's root, lead to the same files from a page."""

    def moved(link: re.Match[str]) -> str:
        return f"]({os.path.relpath(ROOT / link[1], page.parent)})"

    return re.sub(r"\]\((?!\w+:)([^)#]+)\)", moved, text)
