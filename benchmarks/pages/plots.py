"""Which figures a suite has, and the numbers in them, from its recorded cells alone; what is not recorded is left out."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from kinds.cost import pass_seconds
from records import Record

from pages import panels
from pages.panels import Bars, Cells, Lines, Point, Series
from pages.rows import Row, Table
from pages.stats import Estimate

IMAGES = "data.calibration_images"
TRAINING = {"zero": "without training", "recovered": "after recovery"}
INCREASE = "error increase, %"
PARTS = 4
"""So many rows of one budget are shown as bars, not as points of lines."""
KINDS = {
    "head_dim": "dimensions kept per head, %",
    "mlp_hidden": "feed-forward neurons kept, %",
    "attn_in": "attention input",
    "attn_out": "attention output",
    "mlp_in": "feed-forward input",
    "rank": "rank of qkv and proj",
}
Figures = dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Drawing:
    """A figure as numbers: what it shows, and its panels, all of one kind."""

    caption: str
    panels: Sequence[Lines] | Sequence[Bars] | Sequence[Cells]
    shared: bool = False

    def svg(self) -> str:
        """The figure."""
        if isinstance(self.panels[0], Bars):
            return panels.bars(cast("Sequence[Bars]", self.panels))
        if isinstance(self.panels[0], Cells):
            return panels.cells(cast("Sequence[Cells]", self.panels))
        return panels.lines(cast("Sequence[Lines]", self.panels), shared=self.shared)


def draw(table: Table) -> Figures:
    """File name → (caption, SVG)."""
    return {name: (drawing.caption, drawing.svg()) for name, drawing in drawings(table).items()}


def drawings(table: Table) -> dict[str, Drawing]:
    """File name → figure, of all that the recorded cells are enough for."""
    figures: dict[str, Drawing] = {}
    for reference, models in table.suite.file.references.items():
        rows = [row for row in table.rows if row.reference == reference and _base(row) != "dense"]
        rows = [row for row in rows if not set(row.seeds).isdisjoint(models.seeds)]  # the others stand in the tables
        rows = [
            row
            for row in rows
            if IMAGES not in row.cells[0].definition["tried"] and table.against_dense(row) is not None
        ]
        budgets = _by_budget(rows)
        if any(len({row.name for row in same}) >= PARTS for same in budgets.values()):
            caption = f"Error increase of each variant with its 95 % interval, {reference}"
            figures[f"parts.{reference}.svg"] = Drawing(caption, _parts(table, budgets))
        elif rows:
            caption = f"Error increase against the share of parameters left, {reference}"
            figures[f"increase.{reference}.svg"] = Drawing(caption, _increase(table, rows, reference), shared=True)
            if solved := _plans([row for row in rows if _recipe(row)["compress"]["allocation"] == "solver"]):
                caption = f"Widths that the solver chose for each block at each budget, {reference}"
                figures[f"widths.{reference}.svg"] = Drawing(caption, _widths(solved))
        if gated := _plans([row for row in rows if row.cells[0].result["epochs"]["gates"]]):
            caption = f"Share removed of each kind of unit in each block, per cent, {reference}"
            figures[f"pruned.{reference}.svg"] = Drawing(caption, _pruned(gated))
    if any(IMAGES in row.cells[0].definition["tried"] and table.against_dense(row) is not None for row in table.rows):
        caption = "Error increase and KL divergence against calibration images"
        figures["calibration.svg"] = Drawing(caption, _calibration(table))
    return {name: drawing for name, drawing in figures.items() if drawing.panels}


def _base(row: Row) -> str:
    return row.name.partition(".")[0]


def _recipe(row: Row) -> dict[str, Any]:
    recipe: dict[str, Any] = row.cells[0].definition["recipe"]
    return recipe


def _budget(row: Row) -> float:
    """The share of parameters that was asked for; 1 where none was."""
    peer = row.cells[0].definition["peer"]
    return float(peer.get("params") or _recipe(row)["budget"]["params"] or 1.0)


def _by_budget(rows: Sequence[Row]) -> dict[float, list[Row]]:
    budgets: dict[float, list[Row]] = {}
    for row in rows:
        budgets.setdefault(_budget(row), []).append(row)
    return dict(sorted(budgets.items(), reverse=True))


def _point(x: float, estimate: Estimate | None) -> Point:
    assert estimate is not None
    return Point(*(round(value, 6) for value in (x, 100 * estimate.point, 100 * estimate.lo, 100 * estimate.hi)))


def _increase(table: Table, rows: Sequence[Row], reference: str) -> list[Lines]:
    """One panel without training, one after recovery; one line for each method."""
    methods = list(dict.fromkeys(_base(row) for row in rows))
    drawn = []
    for training, title in TRAINING.items():
        series: dict[str, list[Point]] = {}
        for row in (row for row in rows if row.training == training):
            point = _point(100 * row.left("params"), table.against_dense(row))
            series.setdefault(_base(row), []).append(point)
        if not series:
            continue
        control = table.row(reference, training, "dense") if training == "recovered" else None
        level = None if control is None else ("dense, trained on", _point(100, table.against_dense(control)).y)
        lines = tuple(Series(name, tuple(points), methods.index(name)) for name, points in series.items())
        drawn.append(Lines(title, "parameters left, % of dense", INCREASE, lines, level))
    return drawn


def _parts(table: Table, budgets: Mapping[float, Sequence[Row]]) -> list[Bars]:
    """One panel for each budget, one bar for each row."""
    drawn = []
    for budget, rows in budgets.items():
        bars, named = [], Counter((_base(row), row.training) for row in rows)
        for row in rows:
            number = list(TRAINING).index(row.training)
            label = _base(row) if named[_base(row), row.training] == 1 else row.name
            bars.append((label, _point(0, table.against_dense(row)), number, TRAINING[row.training]))
        title = f"{100 * budget:.0f} % of the parameters left" if budget < 1 else "under another budget"
        drawn.append(Bars(title, INCREASE, tuple(bars)))
    return drawn


def _plans(rows: Sequence[Row]) -> list[Row]:
    """One row for each plan: recovery does not change it."""
    return list({row.name: row for row in sorted(rows, key=lambda row: row.training == "zero")}.values())


def removed(record: Record) -> dict[tuple[str, bool], list[float]]:
    """(kind of unit, whether it is cut) → the share removed in each block, of one recorded plan."""
    shares, units = record.result["pruned_shares"], record.result["units"]
    depth = max((int(share["block"].rpartition(".")[2]) + 1 for share in shares), default=0)
    for share in shares:  # blocks that are left whole are not named
        depth = max(depth, units.get(share["kind"], 0) // share["total"])
    kinds: dict[tuple[str, bool], list[float]] = {}
    for kind, physical in dict.fromkeys((share["kind"], share["physical"]) for share in shares):
        own = [share for share in shares if share["kind"] == kind]
        sums = [[0, 0] for _ in range(depth)]
        for share in own:
            place = sums[int(share["block"].rpartition(".")[2])]
            place[0] += share["removed"]
            place[1] += share["total"]
        kinds[kind, physical] = [100 * gone / total if total else 0.0 for gone, total in sums]
    return kinds


def _over_seeds(row: Row) -> dict[tuple[str, bool], list[tuple[float, float, float]]]:
    """As `removed`, with (mean, least, most) over the seeds; what a seed leaves whole counts as 0."""
    each = [removed(record) for record in row.cells]
    depth = max((len(shares) for seed in each for shares in seed.values()), default=0)
    keys = dict.fromkeys(key for seed in each for key in seed)
    over = {}
    for key in keys:
        columns = zip(*(seed.get(key, [0.0] * depth) for seed in each), strict=True)
        over[key] = [(statistics.mean(column), min(column), max(column)) for column in columns]
    return over


def _widths(rows: Sequence[Row]) -> list[Lines]:
    """One panel for each kind of unit, one line for each plan, from dark (little is left) to light."""
    ordered = sorted(rows, key=lambda row: (_budget(row), row.name))
    single = len({_base(row) for row in rows}) == 1
    drawn = []
    for kind in ("head_dim", "mlp_hidden"):
        series = []
        for number, row in enumerate(ordered):
            if (blocks := _over_seeds(row).get((kind, True))) is None:
                continue
            label = f"{100 * _budget(row):.0f} % left"
            kept = [[round(100 - value, 6) for value in block] for block in blocks]
            points = tuple(Point(i, mean, least, most) for i, (mean, most, least) in enumerate(kept))
            series.append(Series(label if single else f"{_base(row)}, {label}", points, number, len(ordered)))
        if series:
            drawn.append(Lines("", "block", KINDS[kind], tuple(series), zero=False, shares=True))
    return drawn


def _pruned(rows: Sequence[Row]) -> list[Cells]:
    """One panel for each row: kinds of units × blocks, and all blocks together."""
    drawn = []
    for row in rows:
        kinds = _over_seeds(row)
        names = [KINDS.get(kind, kind).partition(" kept")[0] for kind, _ in kinds]
        labels = tuple(f"{n} ({'cut' if cut else 'zeroed only'})" for n, (_, cut) in zip(names, kinds, strict=True))
        values = []
        for blocks in kinds.values():
            means = [mean for mean, _, _ in blocks]
            values.append(tuple(round(value, 6) for value in (*means, statistics.mean(means))))
        depth = max(len(blocks) for blocks in kinds.values())
        columns = (*(str(i) for i in range(depth)), "all")
        title = f"{_base(row)}, {100 * _budget(row):.0f} % of the parameters left"
        drawn.append(Cells(title, labels, columns, tuple(values), "block", depth))
    return drawn


def _calibration(table: Table) -> list[Lines]:
    """Error increase with intervals, and the divergence on validation; one line for each budget."""
    increases: dict[float, list[Point]] = {}
    divergences: dict[float, list[Point]] = {}
    for row in table.rows:
        tried, estimate = row.cells[0].definition["tried"], table.against_dense(row)
        if IMAGES in tried and estimate is not None and row.training == "zero":
            images = float(tried[IMAGES])
            kl = round(statistics.mean(record.result["validation"]["kl"] for record in row.cells), 9)
            increases.setdefault(_budget(row), []).append(_point(images, estimate))
            divergences.setdefault(_budget(row), []).append(Point(images, kl, kl, kl))
    texts = ((INCREASE, increases), ("KL divergence, nats per image", divergences))
    drawn = []
    for text, points in texts:
        ordered = sorted(points.items(), reverse=True)
        series = tuple(Series(f"{100 * b:.0f} % left", tuple(own), i) for i, (b, own) in enumerate(ordered))
        title = (
            "of the test images, with 95 % intervals"
            if points is increases
            else "from the dense model, on validation images"
        )
        drawn.append(Lines(title, "calibration images", text, series, log=True))
    return drawn


def cost(records: Sequence[Record]) -> Drawing:
    """Seconds of one pass of the closed form, and peak memory; one line for each model."""
    names: dict[str, list[tuple[float, float, float]]] = {}
    for record in records:
        recipe = record.definition["recipe"]
        label = f"{recipe['model']['name'].partition('_patch')[0]}, {record.result['blocks']} blocks"
        (_, seconds), memory = pass_seconds(record), record.result["peak_bytes"] / 2**30
        names.setdefault(label, []).append((recipe["data"]["calibration_images"], seconds, memory))
    drawn = []
    for column, text in ((1, "a pass, s"), (2, "peak memory, GiB")):
        series = []
        for number, (label, measured) in enumerate(names.items()):
            points = tuple(Point(each[0], *(round(each[column], 6),) * 3) for each in measured)
            series.append(Series(label, points, number))
        drawn.append(Lines("", "calibration images", text, tuple(series)))
    caption = "Seconds of one pass of the closed form, and peak memory, against calibration images"
    return Drawing(caption, drawn)
