"""The page of one model on every runtime: each file with its bytes, parity and errors, and how fast it is where it was timed."""

from __future__ import annotations

from typing import Any

from kinds.files import FilesCell
from kinds.pair import comparison_of
from records import Record, Results
from suite import Suite

from pages.files import after_compression
from pages.text import hardware, markdown, missing, speedup, verified, whole
from toolchain.measure.comparison import Comparison

HEAD = ("File", "Bytes", "Of the dense file", "Same outputs", "Wrong", "Runtime", "ms", "Speedup", "Verified")
Timed = dict[tuple[str, str], Comparison]
"""(target, precision) → the comparison with the dense fp32 file of that runtime."""


def page(suite: Suite, results: Results) -> dict[str, str]:
    """README.md; empty if nothing is recorded."""
    runs = [results.read(suite.name, cell.name) for cell in suite.cells if isinstance(cell, FilesCell)]
    parts = [part(record, results) for record in runs if record is not None]
    gap = missing(len(runs) - len(parts), len(runs))
    return {"README.md": whole(suite, [gap, *parts])} if parts else {}


def timed(record: Record, results: Results) -> Timed:
    """Every comparison of a run with a dense file."""
    beside = [each for each in results.below(record.suite, record.cell) if each.definition["a"] == "dense fp32"]
    return {
        (each.definition["target"], each.definition["b"].removeprefix("compressed ")): comparison_of(each)
        for each in beside
    }


def part(record: Record, results: Results) -> str:
    """One run."""
    run, pairs = record.result, timed(record, results)
    own = {row["target"] for row in run["engines"]}  # what they time is what they built
    dense = run["artifacts"][0]["bytes"]
    rows = [
        line
        for row in run["artifacts"]
        for line in lines(row, "pass", {at: each for at, each in pairs.items() if at[0] not in own}, dense)
    ]
    for row in run["engines"]:
        there = {at: each for at, each in pairs.items() if at[0] == row["target"]}
        rows += lines(row, row["verdict"].replace("_", " "), there, dense)
    silent = {rung["reason"] for rung in run["parity"] if rung["verdict"] == "not_run"}
    verdicts = [rung["verdict"] for rung in run["parity"]]
    parity = f"Parity: {verdicts.count('pass')} rungs pass, {verdicts.count('fail')} fail, {verdicts.count('not_run')} not run"
    machines = sorted({f"Measured on: {hardware(each.environment)}." for each in pairs.values()})
    took = f"From the deploy model to all files and engines, parity and errors included: {after_compression(record.seconds):.0f} s."
    reasons = f" ({'; '.join(sorted(silent))})" if silent else ""
    words = [f"{parity}{reasons}.", took, *machines]
    return f"## {record.cell}\n\n{markdown(HEAD, rows)}\n\n" + "\n".join(words)


def lines(row: dict[str, Any], verdict: str, pairs: Timed, dense: int) -> list[list[str]]:
    """A file's rows: one for each runtime that it was timed on, or one."""
    size = row["bytes"]
    facts = [
        f"`{row['path']}`",
        "–" if size is None else f"{size:,}",
        "–" if size is None else f"{100 * size / dense:.1f} %",
        verdict if size is not None else "refused",
        "–" if row["wrong"] is None else f"{row['wrong']} of {row['total']:,}",
    ]
    if row["model"] == "dense":
        firsts = {target: pair for (target, _), pair in reversed(pairs.items())}
        times = [[target, f"{pair.latency_ms('A'):.3f}", "1", "–"] for target, pair in reversed(firsts.items())]
    else:
        times = [
            [target, f"{pair.latency_ms('B'):.3f}", speedup(pair), verified(pair) or "not verified"]
            for (target, precision), pair in pairs.items()
            if precision == row["precision"]
        ]
    blank = [""] * len(facts)
    return [[*(facts if index == 0 else blank), *time] for index, time in enumerate(times or [["–"] * 4])]
