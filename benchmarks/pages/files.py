"""The page of whole runs: every file that ships, its bytes, parity and latency, the last from raw samples."""

from __future__ import annotations

from collections.abc import Mapping

from kinds.files import FilesCell
from kinds.pair import comparison_of
from records import Record, Results
from suite import Suite

from pages.text import hardware, markdown, missing, speedup, verified, whole
from toolchain.measure.comparison import Comparison

MEASURED = ("bench-", "duel-")
DUEL = "compressed int8-dynamic"
"""The baseline of the comparison that holds the two kinds of int8 against each other."""


def page(suite: Suite, results: Results) -> dict[str, str]:
    """README.md; empty if nothing is recorded."""
    runs = [results.read(suite.name, cell.name) for cell in suite.cells if isinstance(cell, FilesCell)]
    parts = [part(record, results) for record in runs if record is not None]
    gap = missing(len(runs) - len(parts), len(runs))
    return {"README.md": whole(suite, [gap, *parts])} if parts else {}


def timed(record: Record, results: Results) -> tuple[dict[str, Comparison], Comparison | None]:
    """(precision → its comparison with the dense fp32 file, that of the two kinds of int8 with each other)."""
    pairs, duel = {}, None
    for beside in results.below(record.suite, record.cell):
        comparison = comparison_of(beside)
        if beside.definition["a"] == DUEL:
            duel = comparison
        else:
            pairs[beside.definition["b"].removeprefix("compressed ")] = comparison
    return pairs, duel


def part(record: Record, results: Results) -> str:
    """One run."""
    run, seconds = record.result, record.seconds
    pairs, duel = timed(record, results)
    dense = next(row for row in run["artifacts"] if row["model"] == "dense")
    rows = []
    for row in run["artifacts"]:
        pair = pairs.get(row["precision"]) if row["model"] == "compressed" else None
        rows.append(
            [
                f"`{row['path']}`",
                "–" if row["bytes"] is None else f"{row['bytes']:,}",
                "–" if row["bytes"] is None else f"{100 * row['bytes'] / dense['bytes']:.1f} %",
                "–" if row["wrong"] is None else f"{row['wrong']} of {row['total']:,}",
                "–" if pair is None else speedup(pair),
                "–" if pair is None else verified(pair) or "not verified",
            ]
        )
    rows += [
        [f"`{file['path']}`", f"{file['bytes']:,}", f"{100 * file['bytes'] / dense['bytes']:.1f} %", "–", "–", "–"]
        for file in run["files"]
        if file["path"].startswith("engines/") and not file["path"].endswith(".json")
    ]
    verdicts = [rung["verdict"] for rung in run["parity"]]
    silent = [rung for rung in run["parity"] if rung["verdict"] == "not_run"]
    said = f" ({'; '.join(sorted({rung['reason'] for rung in silent}))})" if silent else ""
    machines = [comparison.environment for comparison in (*pairs.values(), *filter(None, [duel]))]
    later = sum(seconds[name] for name in _later(seconds))
    took = f"{after_compression(seconds):.0f} s, with the measurements {later:.0f} s; "
    took += f"compressing took {seconds['compress']:.0f} s."
    lines = [
        f"Parity: {verdicts.count('pass')} rungs pass, {verdicts.count('fail')} fail, {len(silent)} not run{said}.",
        f"From the deploy model to all files and engines: {took}",
        "" if duel is None else int8_line(duel, pairs),
        *sorted({f"Measured on: {hardware(machine)}." for machine in machines}),
        "The int8 and int4 speedups are of a processor with AMX-INT8."
        if any(_by_tiles(name, comparison) for name, comparison in pairs.items())
        else "",
    ]
    table = markdown(["File", "Bytes", "Of the dense file", "Wrong", "Speedup", "Verified"], rows)
    return f"## {record.cell}\n\n{table}\n\n" + "\n".join(filter(None, lines))


def _by_tiles(precision: str, comparison: Comparison) -> bool:
    """Whether a file was timed whose integers AMX multiplies."""
    return precision.startswith("int") and "amx_int8" in (comparison.environment.get("flags") or ())


def int8_line(duel: Comparison, pairs: Mapping[str, Comparison]) -> str:
    """Which kind of int8 is the faster one; neither if fp32 is faster than it."""
    ratio, control = duel.ratio.to_ratio(), duel.control.to_ratio()
    noise = max(abs(control["lo"] - 1), abs(control["hi"] - 1))
    differ = duel.verdict != "invalid" and not ratio["lo"] - noise <= 1 <= ratio["hi"] + noise
    faster = "int8-qdq" if ratio["point"] < 1 else "int8-dynamic"
    took = f"int8-qdq took {ratio['point']:.3f} [{ratio['lo']:.3f}, {ratio['hi']:.3f}] of the time of int8-dynamic"
    where = f"{duel.scenario.target}, batch {duel.scenario.batch}, {duel.scenario.threads} thread"
    if {faster, "fp32"} <= set(pairs) and pairs[faster].ratio.point >= pairs["fp32"].ratio.point:
        return f"int8 on {where}: neither; the faster one is slower than fp32 ({took})."
    return f"int8 on {where}: {faster} ({took}{'' if differ else ', a difference is not verified'})."


def after_compression(seconds: Mapping[str, float]) -> float:
    """Seconds from the deploy model to all files and engines, without what was spent on measuring them."""
    return sum(seconds[name] for name in _later(seconds) if not name.startswith(MEASURED))


def _later(seconds: Mapping[str, float]) -> list[str]:
    names = list(seconds)
    deploy = names.index("deploy")
    return [*(name for name in names[:deploy] if name == "onnx-dense"), *names[deploy + 1 :]]
