"""Where it was removed: the share per block and kind of unit; ° marks kinds that are only zeroed, not physically gone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from toolchain.compress.outcome import PrunedShare
from toolchain.report.figures import BAR, GAP, PLOT, Bar, Figure
from toolchain.report.record import BlockDamage, Report
from toolchain.report.sections import Part, Section
from toolchain.report.tables import Table


def _draw(report: Report) -> Part:
    rows = report.pruned_shares
    kinds = list(dict.fromkeys(row.kind for row in rows))
    zeroed = {row.kind for row in rows if not row.physical}
    shares = _shares(rows)

    def line(block: str, of: Mapping[tuple[str, str], float]) -> tuple[str, ...]:
        known = (of.get((block, kind)) for kind in kinds)
        return (block, *("–" if share is None else f"{100 * share:.1f} %" for share in known))

    body = [line(block, shares) for block in sorted({row.block for row in rows}, key=_block_order)]
    body.append(line("all", _shares([row.model_copy(update={"block": "all"}) for row in rows])))
    header = ("block", *(f"{kind}{'°' if kind in zeroed else ''}" for kind in kinds))
    title = f"Removed share per block and kind{' (° zeroed, not physically gone)' if zeroed else ''}"
    table = Table(title, header, tuple(body) if rows else ())
    return Part(title, table=table, figures=(*shares_figure(rows), *damage_figure(report.damage)))


def _shares(rows: Iterable[PrunedShare]) -> dict[tuple[str, str], float]:
    """(block, kind) → the removed share of all its units: a block may have several modules with units of one kind."""
    removed, total = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for row in rows:
        removed[row.block, row.kind] += row.removed
        total[row.block, row.kind] += row.total
    return {key: removed[key] / count for key, count in total.items() if count}


def shares_figure(rows: Sequence[PrunedShare]) -> tuple[Figure, ...]:
    """One bar for each block and kind, as long as the removed share; nothing if nothing was removed."""
    kinds = list(dict.fromkeys(row.kind for row in rows))
    bars, height = _bars(kinds, {key: (share, f"{100 * share:.1f} %") for key, share in _shares(rows).items()})
    zeroed = {row.kind for row in rows if not row.physical}
    legend = tuple(f"{kind} (zeroed, not physically gone)" if kind in zeroed else kind for kind in kinds)
    ticks = tuple((share * PLOT, f"{share:.0%}") for share in (0.0, 0.25, 0.5, 0.75, 1.0))
    return (Figure("Where it was removed", "", bars, legend, ticks, height),) if bars else ()


def damage_figure(rows: Sequence[BlockDamage]) -> tuple[Figure, ...]:
    """One bar for each block and kind, as long as what its width does to the output; nothing if nothing was weighed."""
    sums = defaultdict[tuple[str, str], float](float)
    for row in rows:
        sums[row.block, row.kind] += max(row.nats, 0.0)
    most = max(sums.values(), default=0.0)
    if most <= 0:
        return ()
    kinds = list(dict.fromkeys(row.kind for row in rows))
    bars, height = _bars(kinds, {key: (nats / most, f"{nats:.2g}") for key, nats in sums.items()})
    caption = "How much the output changes by the width of one layer alone, as it was measured before the solver chose: nats an image."
    ticks = ((0.0, "0"), (float(PLOT), f"{most:.2g}"))
    return (Figure("What it does to the output", caption, bars, tuple(kinds), ticks, height),)


def _bars(kinds: Sequence[str], lengths: Mapping[tuple[str, str], tuple[float, str]]) -> tuple[tuple[Bar, ...], float]:
    """(a bar for each (block, kind) that has a length 0…1 and its words, the blocks together and in their order; the height of all)."""
    bars, y = list[Bar](), 0.0
    for block in sorted({block for block, _ in lengths}, key=_block_order):
        for index, kind in enumerate(kind for kind in kinds if (block, kind) in lengths):
            length, words = lengths[block, kind]
            bars.append(Bar(y, "" if index else block, 0.0, PLOT * length, words, kinds.index(kind)))
            y += BAR
        y += GAP
    return tuple(bars), y


def _block_order(name: str) -> list[int]:
    """A sort key by which blocks.10 comes after blocks.9."""
    return [int(part) if part.isdigit() else 0 for part in name.split(".")]


SECTION = Section("shares", _draw)
