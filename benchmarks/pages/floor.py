"""The page of floors: how much of the ideal speedup is real, from raw samples."""

from __future__ import annotations

from kinds.floor import floor_of
from kinds.pair import PairCell
from records import Results
from suite import Suite

from pages.text import Machines, markdown, missing, whole
from toolchain.measure.intervals import outward

HEAD = "Model | Limit reached, dense | joint50 | Ideal | Speedup | Realised share | Valid | Machine"


def page(suite: Suite, results: Results) -> dict[str, str]:
    """README.md; empty if nothing is recorded."""
    rows, machines = [], Machines()
    for cell in suite.cells:
        record = results.read(suite.name, cell.name)
        if not isinstance(cell, PairCell) or record is None or (realised := floor_of(record).realised) is None:
            continue
        floor, about = floor_of(record), realised.to_dict()
        share, control = about["share"], f"the control supports τ ≥ {100 * floor.tau_min:.1f} %"
        rows.append(
            [
                suite.file.models[cell.model].name,
                *(f"{limit.share.to_ratio()['point']:.2f}" for limit in floor.limits),
                f"{about['ideal']:.2f}",
                f"{about['speedup']['point']:.2f}",
                f"{share['point']:.3f} {outward(share['lo'], share['hi'], 3)}",
                f"yes, {control}" if floor.is_valid else f"no: {control}",
                machines.number(floor.environment),
            ]
        )
    gap = missing(len(suite.cells) - len(rows), len(suite.cells))
    parts = [gap, markdown(HEAD.split(" | "), rows), machines.lines()]
    return {"README.md": whole(suite, parts)} if rows else {}
