"""The page of suites that compare methods: errors with intervals, side by side, timed pairs, sweeps, and figures."""

from __future__ import annotations

from kinds.compression import CompressionCell, best_try, tries_of
from kinds.pair import PairCell, comparison_of
from records import Record, Results
from suite import Suite

from pages import plots
from pages.rows import Table
from pages.stats import Estimate, mean_sd
from pages.text import hardware, markdown, missing, percent, whole

NOTE = """\
Accuracy is on the test split; whatever was chosen was chosen on validation. *Error increase* is the errors added, as a
share of the dense model's; ± is the standard deviation over seeds; intervals are 95 % percentile intervals of a paired
bootstrap over test images (10 000 resamples; an image is drawn with all its seeds). *Training* is what follows
compression. *Epochs* are passes over the training images: those in which gates are learned, then those of recovery.
*Labels* says whether any were read."""


def interval(estimate: Estimate | None) -> str:
    """The bounds of an estimate as text."""
    return "—" if estimate is None else f"[{percent(estimate.lo, signed=True)}, {percent(estimate.hi, signed=True)}]"


def accuracy_table(table: Table, reference: str) -> str:
    """Every row that starts from one dense model."""
    head = "Row | Training | Epochs | Labels | Seeds | Params asked | Params left | MACs left | Test accuracy"
    body, dense = [], table.row(reference, "zero", "dense")
    for row in (each for each in table.rows if each.reference == reference):
        first, increases = row.cells[0], table.increases(row)
        budget = first.definition["peer"].get("params") or first.definition["recipe"]["budget"]["params"]
        accuracy, accuracy_sd = mean_sd([1 - r.result["test"]["wrong"] / r.result["test"]["total"] for r in row.cells])
        mean, sd = mean_sd(increases) if increases else (None, None)
        body.append(
            [
                f"`{row.name}`",
                row.training,
                f"{first.result['epochs']['gates']} + {first.result['epochs']['recovery']}",
                "yes" if first.result["labels"] else "no",
                f"{len(row.cells)} of {row.wanted}",
                "—" if budget is None else percent(budget),
                percent(row.left("params")),
                percent(row.left("macs")),
                percent(accuracy) + ("" if accuracy_sd is None else f" ± {percent(accuracy_sd)}"),
                "—"
                if mean is None or row is dense
                else percent(mean, signed=True) + ("" if sd is None else f" ± {percent(sd)}"),
                "—" if row is dense else interval(table.against_dense(row)),
            ]
        )
    return markdown([*head.split(" | "), "Error increase", "95 % interval"], body)


def comparison_table(table: Table) -> str:
    """The pairs that the suite names, for each dense model and training that have both."""
    body = []
    for first, second in table.suite.file.compare:
        for reference in table.suite.file.references:
            for training in ("zero", "recovered"):
                pair = [table.row(reference, training, name) for name in (first, second)]
                if pair[0] is None or pair[1] is None or (difference := table.difference(pair[0], pair[1])) is None:
                    continue
                said = (
                    "no difference shown" if not difference.excludes_zero else "fewer" if difference.hi < 0 else "more"
                )
                point = percent(difference.point, signed=True)
                body.append([reference, training, f"`{first}`", f"`{second}`", point, interval(difference), said])
    head = ["Reference", "Training", "First", "Second", "Difference of error increases", "95 % interval"]
    return markdown([*head, "Errors of the first"], body) if body else ""


def sweep_tables(table: Table) -> str:
    """Every try of every sweep, and which was best, or taken where other cells have their values from it."""
    parts = []
    relied_on = {sweep for cell in table.suite.cells if isinstance(cell, CompressionCell) for sweep in cell.best}
    for name in table.suite.sweeps:
        records = [record for record in table.records if record.definition["sweep"] == name]
        if not records:
            continue
        complete = len(records) == len(table.suite.sweeps[name])
        best, word = best_try(records) if complete else None, "taken" if name in relied_on else "best"
        keys = list(dict.fromkeys(key for record in records for key in record.definition["tried"]))
        body = [
            [
                *(str(each.tried.get(key, "")) for key in keys),
                str(each.seeds),
                f"{each.wrong} of {each.total}",
                f"{each.kl:.4f}",
                word if each == best else "",
            ]
            for each in tries_of(records)
        ]
        head = [*(f"`{key}`" for key in keys), "Seeds", "Wrong on validation", "KL to dense on validation", ""]
        parts.append(f"### {name}{'' if complete else ' (not complete)'}\n\n{markdown(head, body)}")
    return "\n\n".join(parts)


def shares_table(table: Table) -> str:
    """How much of each kind of unit a row removes over all blocks, mean over seeds; some units are only zeroed."""
    body = []
    for row in table.rows:
        if row.training == "recovered" and not row.cells[0].result["epochs"]["gates"]:
            continue  # the same plan as without training
        kinds: dict[tuple[str, bool], list[float]] = {}
        for record in row.cells:
            for kind, physical in sorted({(s["kind"], s["physical"]) for s in record.result["pruned_shares"]}):
                own = [s for s in record.result["pruned_shares"] if s["kind"] == kind]
                total = record.result["units"].get(kind) or sum(s["total"] for s in own)
                kinds.setdefault((kind, physical), []).append(sum(s["removed"] for s in own) / total)
        for (kind, physical), shares in kinds.items():
            how = "cut" if physical else "zeroed only"
            removed = percent(sum(shares) / len(row.cells))
            body.append([row.reference, f"`{row.name}`", row.training, kind, how, removed])
    head = ["Reference", "Row", "Training", "Kind of unit", "How", "Removed of all"]
    return markdown(head, body) if body else ""


def latency_table(suite: Suite, results: Results) -> str:
    """The timed pairs, in the suite's order; every number is computed from the raw samples."""
    body, machines = [], set()
    for cell in suite.cells:
        if not isinstance(cell, PairCell) or (record := results.read(suite.name, cell.name)) is None:
            continue
        comparison = comparison_of(record)
        machines.add(hardware(comparison.environment))
        pair = f"`{cell.a}` → `{cell.b}`"
        body.append([pair, comparison.scenario.target, comparison.verdict, comparison.headline])
    head = ["Pair", "Target", "Verdict", "Time of the second over the first"]
    return markdown(head, body) + "\n\nTimed on: " + "; ".join(sorted(machines)) + "." if body else ""


def recorded(suite: Suite, results: Results) -> tuple[list[Record], str]:
    """(the records of a suite's compression runs in its order, what to say of all cells that are missing)."""
    records = [record for cell in suite.cells if (record := results.read(suite.name, cell.name)) is not None]
    gap = missing(len(suite.cells) - len(records), len(suite.cells))
    return [record for record in records if "recipe" in record.definition], gap


def page(suite: Suite, results: Results) -> dict[str, str]:
    """README.md and its figures; empty if nothing is recorded."""
    records, gap = recorded(suite, results)
    if not records:
        return {}
    table = Table(suite, tuple(records))
    drawn = plots.draw(table)
    parts = [gap, *(f"![{caption}]({name})" for name, (caption, _) in drawn.items()), NOTE]
    shown = [name for name in suite.file.references if any(row.reference == name for row in table.rows)]
    parts += [f"## From the dense model `{name}`\n\n{accuracy_table(table, name)}" for name in shown]
    sections = {
        "Side by side": comparison_table(table),
        "Latency": latency_table(suite, results),
        "What is removed": shares_table(table),
        "Sweeps": sweep_tables(table),
    }
    parts += [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    adopted = [record for record in records if record.result["trained"] == "adopted"]
    if names := sorted({f"`{r.definition['reference']}_s{r.definition['seed']}`" for r in adopted}):
        parts.append(f"Dense models that were trained by the tool outside this suite, and adopted: {', '.join(names)}.")
    parts.append("Measured on: " + "; ".join(sorted({hardware(record.machine) for record in records})) + ".")
    return {"README.md": whole(suite, parts), **{name: svg for name, (_, svg) in drawn.items()}}
