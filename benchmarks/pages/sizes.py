"""The page of budgets of bytes: which precision errs least within one, which one `any` takes, and what was predicted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from kinds.compression import unpack
from kinds.sizes import SizesCell
from numpy.typing import NDArray
from records import Record, Results
from suite import Suite

from pages import panels
from pages.panels import Lines, Point, Series
from pages.plots import INCREASE
from pages.stats import Estimate, paired_difference
from pages.text import Machines, markdown, missing, percent, whole
from toolchain.errors import ArtifactError
from toolchain.recipe import ANY

NOTE = """\
*Damage* is predicted before anything is reduced, in nats an image: of the widths, each measured alone, and of rounding, measured on the
dense model's own file. *Errors more or fewer* are a share of the dense model's errors, with the 95 % interval of a bootstrap over
images, the same images for both files: first against the dense fp32 file, then against the file that `any` gives. An interval that
holds 0 is noise. *Left* are the parameters. Seconds are of the whole run, stages that other cells share among them, beside other
processes: they say how long to wait, and are no measurement."""
PLACES = {"errors.svg": "Errors against bytes of the file, one line for each precision"}

Known = dict[SizesCell, Record]
"""Cells whose file is there, with their records."""


def page(suite: Suite, results: Results) -> dict[str, str]:
    """README.md and its figure; empty if nothing is recorded."""
    cells = [cell for cell in suite.cells if isinstance(cell, SizesCell)]
    every = {cell: record for cell in cells if (record := results.read(suite.name, cell.name)) is not None}
    if not every:
        return {}
    known = {cell: record for cell, record in every.items() if not record.result["out_of_reach"]}
    refused = [cell for cell in every if cell not in known]
    waiting = [cell.name for cell in cells if cell not in every]
    gap = missing(len(waiting), len(cells)) + (f" They are {', '.join(waiting)}." if waiting else "")
    machines = Machines()
    parts = [gap, NOTE, budgets_kept(known), choices(known)]
    figures = {name: drawn for name in PLACES if (drawn := draw(known))}
    parts += [f"![{caption}]({name})" for name, caption in PLACES.items() if name in figures]
    parts += [f"## {model}\n\n{table(model, known, machines)}" for model in models(known)]
    parts += [out_of_reach(every, refused), machines.lines()]
    return {"README.md": whole(suite, parts), **figures}


def models(known: Known) -> list[str]:
    """The dense models, in the order of their cells."""
    return list(dict.fromkeys(cell.model for cell in known))


def wrong(record: Record, what: str = "test") -> NDArray[np.bool_]:
    """[1, images], True where a file is wrong: that of the cell, or with "dense_test" the dense fp32 one."""
    images: NDArray[np.bool_] = ~unpack(record.result[what])[None]
    return images


def more(record: Record, other: Record | None = None) -> Estimate:
    """Errors more (+) or fewer (−) than another's file makes, or the dense one, as a share of the dense one's."""
    dense = wrong(record, "dense_test")
    return paired_difference(wrong(record), dense if other is None else wrong(other), dense)


def total(record: Record) -> float:
    """The damage that was predicted of widths and rounding together, nats an image."""
    damage = record.result["damage"]
    return float(damage["widths"] + damage["rounding"])


def alike(cell: SizesCell, known: Known) -> tuple[Known, Record | None]:
    """(the cells of the same model and budget that name a precision, the record of the one that leaves it open)."""
    own = {each: known[each] for each in known if (each.model, each.size) == (cell.model, cell.size)}
    free = next((record for each, record in own.items() if each.precision == ANY), None)
    return {each: record for each, record in own.items() if each.precision != ANY}, free


def budgets_kept(known: Known) -> str:
    """How much of its budget each file has; raises ArtifactError if one has more bytes than it may."""
    for cell, record in known.items():
        if record.result["bytes"] > record.result["budget"]:
            raise ArtifactError(
                f"{cell.name}: the file has {record.result['bytes']:,} bytes, its budget is {record.result['budget']:,}"
            )
    if not known:
        return ""
    used = [record.result["bytes"] / record.result["budget"] for record in known.values()]
    off = [record.result["bytes"] / record.result["predicted"] - 1 for record in known.values()]
    return (
        f"None of {len(known)} files has more bytes than its budget: they have {percent(min(used))} to {percent(max(used))} of it. "
        f"They differ by {percent(min(off), signed=True)} to {percent(max(off), signed=True)} from the bytes that were predicted."
    )


def choices(known: Known) -> str:
    """What `any` takes at each budget beside what errs least there, as a table and in one sentence."""
    body, best, noise, equal = [], 0, 0, list[bool]()
    for cell, free in known.items():
        others, _ = alike(cell, known)
        if cell.precision != ANY or not others:
            continue
        least = min(
            others, key=lambda each: (others[each].result["test"]["wrong"], each.precision != free.result["precision"])
        )
        predicted = min(others, key=lambda each: total(others[each]))
        apart = more(free, others[least])
        is_best = free.result["test"]["wrong"] <= others[least].result["test"]["wrong"]
        best, noise = best + is_best, noise + (not is_best and not apart.excludes_zero)
        twins = [each.result for c, each in others.items() if c.precision == free.result["precision"]]
        equal += [twin["file_sha256"] == free.result["file_sha256"] for twin in twins]
        body.append(
            [
                cell.model,
                cell.size.replace("%", " %"),
                f"{free.result['precision']} ({free.result['test']['wrong']} wrong)",
                predicted.precision,
                f"{least.precision} ({others[least].result['test']['wrong']} wrong)",
                "the same" if is_best else f"{shown(apart)}{'' if apart.excludes_zero else ', noise'}",
            ]
        )
    if not body:
        return ""
    rest = len(body) - best - noise
    said = f"At {best} of {len(body)} budgets no other file errs less than the one that `any` gives"
    said += f", at {noise} the difference from the best is noise" if noise else ""
    said += f", at {rest} it is not" if rest else ""
    if equal:
        said += f". Of {len(equal)} files of `any` {sum(equal)} are byte for byte the one that its precision gives when it is named"
    head = ["Model", "Budget", "`any` takes", "Least predicted damage", "Errs least", "`any` beside that one"]
    return f"## What `any` takes\n\n{said}.\n\n{markdown(head, body)}"


def table(model: str, known: Known, machines: Machines) -> str:
    """Every file of one model."""
    body = []
    for cell in (each for each in known if each.model == model):
        record, (_, free) = known[cell], alike(cell, known)
        result, damage = record.result, record.result["damage"]
        name = f"`{cell.precision}`" + (f": {result['precision']}" if cell.precision == ANY else "")
        beside = "–" if free is None or cell.precision in (ANY, free.result["precision"]) else shown(more(record, free))
        body.append(
            [
                cell.size.replace("%", " %"),
                name,
                percent(result["params"] / result["dense"]["params"]),
                f"{result['bytes']:,} of {result['budget']:,}",
                f"{damage['widths']:.2g}",
                f"{damage['rounding']:.2g}",
                f"{result['test']['wrong']} of {result['test']['total']:,}",
                shown(more(record)),
                beside,
                f"{sum(record.seconds.values()):.0f}",
                machines.number(record.machine),
            ]
        )
    first = next(record for cell, record in known.items() if cell.model == model).result
    dense = (
        f"The dense fp32 file has {first['dense']['bytes']:,} bytes and errs on {first['dense_test']['wrong']} images."
    )
    head = [
        "Budget",
        "Precision",
        "Left",
        "Bytes",
        "Damage of widths",
        "Of rounding",
        "Wrong",
        "More than dense",
        "More than `any`",
    ]
    return f"{dense}\n\n{markdown([*head, 'Seconds', 'Machine'], body)}"


def out_of_reach(every: Known, refused: Sequence[SizesCell]) -> str:
    """What the tool says of budgets that no widths meet."""
    if not refused:
        return ""
    lines = [f"- {cell.model}, `{cell.precision}`: {every[cell].result['out_of_reach']}" for cell in refused]
    return "## Out of reach\n\n" + "\n".join(lines)


def shown(estimate: Estimate) -> str:
    """A share more or fewer, with its interval, in per cent."""
    lo, hi = (f"{100 * bound:+.1f}" for bound in (estimate.lo, estimate.hi))
    return f"{100 * estimate.point:+.1f} % [{lo}, {hi}]"


def draw(known: Known) -> str:
    """Errors more than the dense file makes over bytes: a panel for each model with several budgets, a line for each precision."""
    names = list(dict.fromkeys(cell.precision for cell in known if cell.precision != ANY))
    drawn = []
    for model in models(known):
        series = {
            name: tuple(point(known[c]) for c in known if (c.model, c.precision) == (model, name)) for name in names
        }
        lines = tuple(Series(name, own, names.index(name)) for name, own in series.items() if len(own) > 1)
        if lines:
            drawn.append(Lines(model, "size of the file, kB", INCREASE, lines, log=True))
    return panels.lines(drawn, shared=True) if drawn else ""


def point(record: Record) -> Point:
    """A file's place in the figure."""
    estimate = more(record)
    numbers = (record.result["bytes"] / 1e3, *(100 * each for each in (estimate.point, estimate.lo, estimate.hi)))
    return Point(*(round(each, 6) for each in numbers))
