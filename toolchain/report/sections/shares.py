"""Where it was removed: the share per block and kind of unit; ° marks kinds that are only zeroed, not physically gone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from toolchain.compress.outcome import PrunedShare
from toolchain.report.figures import BAR, GAP, PLOT, Bar, Figure
from toolchain.report.record import BlockDamage, Report
from toolchain.report.sections import Part, Section
from toolchain.report.tables import Table


def _draw(report: Report) -> Part:
    rows = report.pruned_shares
    kinds = list(dict.fromkeys(row.kind for row in rows))
    zeroed = {row.kind for row in rows if not row.physical}
    cells = {(row.block, row.kind): [row] for row in rows}

    def cell(shares: Sequence[PrunedShare]) -> str:
        total = sum(row.total for row in shares)
        return "–" if not total else f"{100 * sum(row.removed for row in shares) / total:.1f} %"

    body = [
        (block, *(cell(cells.get((block, kind), ())) for kind in kinds))
        for block in sorted({row.block for row in rows}, key=_block_order)
    ]
    body.append(("all", *(cell([row for row in rows if row.kind == kind]) for kind in kinds)))
    header = ("block", *(f"{kind}{'°' if kind in zeroed else ''}" for kind in kinds))
    title = f"Removed share per block and kind{' (° zeroed, not physically gone)' if zeroed else ''}"
    table = Table(title, header, tuple(body) if rows else ())
    return Part(title, table=table, figures=(*shares_figure(rows), *damage_figure(report.damage)))


def shares_figure(rows: Sequence[PrunedShare]) -> tuple[Figure, ...]:
    """One bar for each block and kind, as long as the removed share; nothing if nothing was removed."""
    kinds = list(dict.fromkeys(row.kind for row in rows))
    bars: list[Bar] = []
    y = 0.0
    for block in sorted({row.block for row in rows}, key=_block_order):
        below = sorted((row for row in rows if row.block == block), key=lambda row: kinds.index(row.kind))
        for index, row in enumerate(below):
            share = row.removed / row.total
            label = "" if index else block
            bars.append(Bar(y, label, 0.0, share * PLOT, f"{100 * share:.1f} %", kinds.index(row.kind)))
            y += BAR
        y += GAP
    zeroed = {row.kind for row in rows if not row.physical}
    legend = tuple(f"{kind} (zeroed, not physically gone)" if kind in zeroed else kind for kind in kinds)
    ticks = tuple((share * PLOT, f"{share:.0%}") for share in (0.0, 0.25, 0.5, 0.75, 1.0))
    return (Figure("Where it was removed", "", tuple(bars), legend, ticks, y),) if bars else ()


def damage_figure(rows: Sequence[BlockDamage]) -> tuple[Figure, ...]:
    """One bar for each block and kind, as long as what its width does to the output; nothing if nothing was weighed."""
    most = max((row.nats for row in rows), default=0.0)
    if most <= 0:
        return ()
    kinds = list(dict.fromkeys(row.kind for row in rows))
    sums = defaultdict[tuple[str, str], float](float)
    for row in rows:
        sums[row.block, row.kind] += max(row.nats, 0.0)
    bars, y, most = list[Bar](), 0.0, max(sums.values())
    for block in sorted({row.block for row in rows}, key=_block_order):
        for index, kind in enumerate(kind for kind in kinds if (block, kind) in sums):
            nats = sums[block, kind]
            bars.append(Bar(y, "" if index else block, 0.0, PLOT * nats / most, f"{nats:.2g}", kinds.index(kind)))
            y += BAR
        y += GAP
    caption = "How much the output changes by the width of one layer alone, as it was measured before the solver chose: nats an image."
    ticks = ((0.0, "0"), (float(PLOT), f"{most:.2g}"))
    return (Figure("What it does to the output", caption, tuple(bars), tuple(kinds), ticks, y),)


def _block_order(name: str) -> list[int]:
    """A sort key by which blocks.10 comes after blocks.9."""
    return [int(part) if part.isdigit() else 0 for part in name.split(".")]


SECTION = Section("shares", _draw)
