"""The page of latency pairs of timm shapes: an overview, then every comparison, all from raw samples."""

from __future__ import annotations

from collections.abc import Sequence

from kinds.pair import PairCell, comparison_of
from records import Results
from suite import Suite

from pages.text import Machines, markdown, missing, speedup, verified, whole
from toolchain.measure.comparison import Comparison

AMX = "amx_int8"
OVERVIEW = """\
## Verified speedups over the dense fp32 file

The lower bound of each interval; a verdict where nothing was verified. `b8 t2`: batch 8, 2 threads; blank where the suite
has no such comparison. † is int8 on a processor with AMX-INT8, whose tiles multiply bytes; the other int8 numbers are of a
processor without it. Which machine gave a number stands in the table below: rows, and columns, need not share one."""
HEAD = "Model | A | B | Target | Batch | Threads | A, ms | B, ms | Speedup | Verified | Verdict | Bytes of A | Machine"
BASE = "dense fp32"

Pairs = Sequence[tuple[PairCell, Comparison | None]]


def page(suite: Suite, results: Results) -> dict[str, str]:
    """README.md; empty if nothing is recorded."""
    pairs: list[tuple[PairCell, Comparison | None]] = []
    for cell in suite.cells:
        if isinstance(cell, PairCell):
            record = results.read(suite.name, cell.name)
            pairs.append((cell, None if record is None else comparison_of(record)))
    measured = [(cell, comparison) for cell, comparison in pairs if comparison is not None]
    if not measured:
        return {}
    machines = Machines()
    rows = [row(suite, cell, comparison, machines) for cell, comparison in measured]
    every = f"## Every comparison\n\n{markdown(HEAD.split(' | '), rows)}"
    gap = missing(len(pairs) - len(measured), len(pairs))
    return {"README.md": whole(suite, [gap, overview(suite, pairs), every, machines.lines()])}


def row(suite: Suite, cell: PairCell, comparison: Comparison, machines: Machines) -> list[str]:
    """One comparison."""
    sizes = [comparison.artifacts[name].size_bytes for name in ("A", "B")]
    return [
        suite.file.models[cell.model].name,
        f"`{cell.a}`",
        f"`{cell.b}`",
        cell.target,
        str(cell.batch),
        str(cell.threads),
        f"{comparison.latency_ms('A'):.2f}",
        f"{comparison.latency_ms('B'):.2f}",
        speedup(comparison),
        verified(comparison) or "not verified",
        comparison.verdict,
        f"{100 * sizes[1] / sizes[0]:.1f} %",
        machines.number({**comparison.environment, "threads": "1 or 2"}),
    ]


def overview(suite: Suite, pairs: Pairs) -> str:
    """One row for each form that is held against the dense fp32 model, one column for each way to run it; "" if none is."""
    table: dict[tuple[str, str], dict[str, str]] = {}
    columns: dict[str, None] = {}
    for cell, comparison in pairs:
        if cell.a != BASE or cell.b.partition(" ")[0] in suite.file.models:
            continue
        column = f"{cell.target.removesuffix('-cpu')} b{cell.batch} t{cell.threads}"
        columns[column] = None
        said = "not measured"
        if comparison is not None:
            tiles = "int8" in cell.b and AMX in (comparison.environment.get("flags") or ())
            said = (verified(comparison) or comparison.verdict) + (" †" if tiles else "")
        table.setdefault((suite.file.models[cell.model].name, cell.b), {})[column] = said
    rows = [[name, f"`{form}`", *(by.get(column, "") for column in columns)] for (name, form), by in table.items()]
    return f"{OVERVIEW}\n\n{markdown(['Model', 'B', *columns], rows)}" if rows else ""
