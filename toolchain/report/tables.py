"""The report as plain tables of text, which Markdown and the terminal draw."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.measure.environment import describe_machine
from toolchain.outputs import Output, divergence_words


@dataclass(frozen=True)
class Table:
    """A titled table of text; `text` are the columns that hold words, the others hold numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: tuple[int, ...] = (0,)


def number(value: float | None) -> str:
    """1_234_567 → "1,234,567"; None → "–"."""
    return "–" if value is None else f"{value:,.0f}"


def size(size_bytes: float | None) -> str:
    """Bytes in kB or MB of powers of 1000."""
    if size_bytes is None:
        return "–"
    return f"{size_bytes / 1e6:,.2f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:,.1f} kB"


def operations(macs: float | None) -> str:
    """MACs in M or G: 20_507_392 → "20.51 M"."""
    if macs is None:
        return "–"
    return f"{macs / 1e9:,.2f} G" if macs >= 1e9 else f"{macs / 1e6:,.2f} M"


def percent(share: float | None) -> str:
    """0.972 → "97.20 %"."""
    return "–" if share is None else f"{100 * share:.2f} %"


def cell_name(row: Mapping[str, Any]) -> str:
    """What was measured: "ort-cpu, batch 1, 1 thread", with the precision where it is not fp32."""
    precision = row.get("precision", "fp32")
    where = f"{row['target']}, batch {row['batch']}, {row['threads']} thread{'s' * (row['threads'] > 1)}"
    return where if precision == "fp32" else f"{precision}, {where}"


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Every table of a report, in reading order; an empty one is left out."""
    found = [
        headline(report),
        stage_table(report),
        shares_table(report),
        bench_table(report),
        artifact_table(report),
        size_table(report),
        graph_table(report),
        parity_table(report),
        engine_table(report),
    ]
    return [table for table in found if table.rows]


def headline(report: Mapping[str, Any]) -> Table:
    """Dense against compressed."""
    dense, small, ratio = report["dense"], report["compressed"], report["ratio"]
    rows = [
        ("parameters", number(dense["params"]), number(small["params"]), f"{ratio['params']:.3f} left"),
        ("MACs per image", number(dense["macs"]), number(small["macs"]), f"{ratio['macs']:.3f} left"),
        ("ONNX file, fp32", size(dense["bytes"]), size(small["bytes"]), f"{ratio['bytes']:.3f} left"),
    ]
    if dense["total"] is not None:
        increase = report["relative_error_increase"]
        more = "–" if increase is None else f"{100 * increase:+.1f} % errors"
        rows += [
            ("test accuracy", percent(dense["accuracy"]), percent(small["accuracy"]), ""),
            (f"wrong of {number(dense['total'])}", number(dense["wrong"]), number(small["wrong"]), more),
        ]
    if (error := small.get("error")) is not None:
        rows.append(("squared error of the outputs", "0", percent(error), "of the dense outputs' variance"))
    for row in report["bench"]:
        times = (f"{row['dense_ms']:.3f} ms", f"{row['compressed_ms']:.3f} ms")
        rows.append((cell_name(row), *times, f"{row['ratio']['point']:.3f} of the time"))
    return Table("Dense against compressed", ("", "dense", "compressed", "change"), tuple(rows))


def stage_table(report: Mapping[str, Any]) -> Table:
    """What each stage left."""
    stages = report["stages"]
    totals = {row["total"] for row in stages} - {None}
    judged: tuple[str, ...] = ("accuracy", f"wrong of {number(max(totals))}" if totals else "wrong")
    figures: list[tuple[str, ...]] = [(percent(row["accuracy"]), number(row["wrong"])) for row in stages]
    if any(row.get("error") is not None for row in stages):
        judged, figures = ("squared error",), [(percent(row["error"]),) for row in stages]
    rows = tuple(
        (
            row["name"],
            number(row["params"]),
            operations(row["macs"]),
            size(row["bytes"]),
            *figure,
            "–" if row["seconds"] is None else f"{row['seconds']:.1f}",
        )
        for row, figure in zip(stages, figures, strict=True)
    )
    return Table("Stages", ("after", "parameters", "MACs", "size", *judged, "seconds"), rows)


def shares_table(report: Mapping[str, Any]) -> Table:
    """Removed share per block and kind of unit; ° marks kinds that are only zeroed, not physically gone."""
    rows = report["pruned_shares"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    zeroed = {row["kind"] for row in rows if not row["physical"]}
    cells = {(row["block"], row["kind"]): row for row in rows}
    blocks = list(dict.fromkeys(row["block"] for row in rows))
    blocks.sort(key=block_order)

    def cell(found: Sequence[Mapping[str, Any]]) -> str:
        total = sum(row["total"] for row in found)
        return "–" if not total else f"{100 * sum(row['removed'] for row in found) / total:.1f} %"

    body = [(block, *(cell([cells[block, k]] if (block, k) in cells else []) for k in kinds)) for block in blocks]
    body.append(("all", *(cell([row for row in rows if row["kind"] == k]) for k in kinds)))
    header = ("block", *(f"{kind}{'°' if kind in zeroed else ''}" for kind in kinds))
    title = f"Removed share per block and kind{' (° zeroed, not physically gone)' if zeroed else ''}"
    return Table(title, header, tuple(body) if rows else ())


def block_order(name: str) -> list[int]:
    """A sort key by which blocks.10 comes after blocks.9."""
    return [int(part) if part.isdigit() else 0 for part in name.split(".")]


def bench_table(report: Mapping[str, Any]) -> Table:
    """The verdicts, in the words of the harness."""
    rows = tuple((cell_name(row), row["summary"]) for row in report["bench"])
    return Table("Latency verdicts", ("where", "verdict"), rows, text=(0, 1))


def artifact_table(report: Mapping[str, Any]) -> Table:
    """The files that could ship; of one alone the headline says all."""
    rows = report.get("artifacts", ())
    totals = {row["total"] for row in rows} - {None}
    wrong = f"wrong of {number(max(totals))}" if totals else "wrong"
    header: tuple[str, ...] = ("file", "size", "as gzip", "accuracy", wrong, "refused")
    judged: list[tuple[str, ...]] = [(percent(row["accuracy"]), number(row["wrong"])) for row in rows]
    if any(row.get("error") is not None for row in rows):
        header = ("file", "size", "as gzip", "squared error", "refused")
        judged = [(percent(row["error"]),) for row in rows]
    body = tuple(
        (row["path"], size(row["bytes"]), size(row["download_bytes"]), *counts, row["refused"] or "")
        for row, counts in zip(rows, judged, strict=True)
    )
    return Table("Files", header, body if len(body) > 2 else (), text=(0, len(header) - 1))


def size_table(report: Mapping[str, Any]) -> Table:
    """Where the bytes are: each kind of layer, in the dense file and in those that could ship."""
    rows = report.get("layers", ())
    paths = list(rows[0]["bytes"]) if rows else []
    kinds: dict[str, dict[str, int]] = {}
    for row in rows:
        kind = re.sub(r"\b\d+\b", "*", row["layer"])
        sums = kinds.setdefault(kind, dict.fromkeys(paths, 0))
        for path in paths:
            sums[path] += row["bytes"][path]
    ordered = sorted(kinds.items(), key=lambda item: -item[1][paths[0]])
    body = [(kind, *(size(sums[path]) for path in paths)) for kind, sums in ordered]
    header = ("layers", *(path.removeprefix("onnx/").removesuffix(".onnx") for path in paths))
    return Table("Where the bytes are", header, tuple(body))


def graph_table(report: Mapping[str, Any]) -> Table:
    """Nodes of each operator: as torch exported the dense and the compressed model, and in each file."""
    columns = {}
    for name, graph in report["graphs"].items():
        if name in ("dense", "compressed"):
            columns[f"{name}, exported"] = graph["nodes_before"]
        columns[name] = graph["nodes_after"]
    totals = sum(map(Counter, columns.values()), Counter[str]())
    ordered = sorted(totals, key=lambda operator: (-totals[operator], operator))
    rows = [(name, *(number(nodes.get(name, 0)) for nodes in columns.values())) for name in ordered]
    rows.append(("all", *(number(sum(nodes.values())) for nodes in columns.values())))
    return Table("Nodes", ("operator", *columns), tuple(rows) if ordered else ())


def parity_table(report: Mapping[str, Any]) -> Table:
    """The ladder, rung by rung."""
    rows = tuple(
        (
            f"{rung['from']} == {rung['to']}",
            rung["verdict"],
            "–" if rung["max_abs"] is None else f"{rung['max_abs']:.1e}",
            rung["reason"] or "",
        )
        for rung in report["parity"]
    )
    return Table("Parity", ("rung", "verdict", "max |Δ|", "reason"), rows, text=(0, 1, 3))


def closed_form_line(found: Mapping[str, Any], output: Output = "logits") -> str:
    """How the closed form was carried out, and how far it left the model from the dense one."""
    head = "re-fitted" if found["head_refitted"] else "left as it was"
    far = "not a number" if found["kl"] is None else f"{found['kl']:.3g} nats per validation image"
    return (
        f"Closed form: β = {found['beta']:g}, the classifier {head}; {divergence_words(output)} from the dense model, "
        f"before any training, {far}."
    )


def finetune_line(found: Mapping[str, Any], output: Output = "logits") -> str:
    """What fine-tuning did on validation, and which model it kept, from what `Finetune` found."""
    if found["judged_by"] == "errors":
        before, after = number(found["before"]), number(found["after"])
        counted = f"{before} of {number(found['images'])} validation images wrong before, {after} after"
    else:
        before, after = ("not a number" if found[end] is None else f"{found[end]:.3g}" for end in ("before", "after"))
        counted = (
            f"without labels, {divergence_words(output)} from the dense model {before} before, {after} after "
            f"({number(found['images'])} validation images)"
        )
    return f"Fine-tuning: {counted}; the model {found['kept']} it was kept."


def _engines(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [
        file
        for file in report["files"]
        if file["path"].startswith("engines/") and file["path"].endswith((".engine", ".xml", ".bin"))
    ]


def engine_table(report: Mapping[str, Any]) -> Table:
    """The engines that were built; "2 of 12 fused" is what the engine inspector says of attention, where a GPU is present."""
    rows = []
    for row in report.get("engines", ()):
        fused, attention = row["fused_attention"], row["attention_layers"]
        rows.append(
            (
                row["path"],
                size(row["bytes"]),
                size(row["download_bytes"]),
                f"{100 * row['of_dense']:.1f} %",
                ", ".join(f"{count} {kind}" for kind, count in (row["matmul_dtypes"] or {}).items()),
                "–" if attention is None else f"{'?' if fused is None else fused} of {attention} fused",
                row["verdict"],
            )
        )
    head = ("file", "size", "download", "of dense", "products", "attention", "parity")
    return Table("Engines", head, tuple(rows), text=(0, 4, 5, 6))


def suggestion_lines(report: Mapping[str, Any]) -> list[str]:
    """Which file to take, where there is a choice."""
    found = report.get("suggestion")
    if found is None or len(report["artifacts"]) <= 2:
        return []
    counted = any(row["total"] is not None for row in report["artifacts"])
    limit = f"at most {percent(found['accuracy_loss'])} of the images lost" if counted else "accuracy is not known"
    lines = [f"Smallest file ({limit}): {found['smallest']}."]
    lines += [
        f"Fastest file on {cell_name(row)} ({limit}): {row['path']}, {row['ratio']['point']:.3f} of the dense time."
        for row in found["fastest"]
    ]
    lines += [int8_line(row) for row in report.get("int8", ())]
    return lines + [f"Left out, as less accurate: {path}." for path in found["left_out"]]


def int8_line(row: Mapping[str, Any]) -> str:
    """Which kind of int8 is the faster one on a target."""
    ratio = row["ratio"]
    if ratio is None:
        return f"int8 on {cell_name(row)}: {row['chosen'] or 'slower than fp32'}."
    took = f"int8-qdq took {ratio['point']:.3f} [{ratio['lo']:.3f}, {ratio['hi']:.3f}] of the time of int8-dynamic"
    if row["slower_than_fp32"]:
        return f"int8 on {cell_name(row)}: neither; the faster one is slower than fp32 ({took})."
    if row["chosen"] is None:
        return f"int8 on {cell_name(row)}: not chosen, as fp32 has no valid time to hold it against ({took})."
    known = "" if row["verified"] else ", a difference is not verified"
    return f"int8 on {cell_name(row)}: {row['chosen']} ({took}{known})."


def verdicts(report: Mapping[str, Any]) -> list[str]:
    """One line per measured cell."""
    return [f"{cell_name(row)}: {row['summary']}" for row in report["bench"]]


def parity_lines(report: Mapping[str, Any]) -> list[str]:
    """The ladder in short: how many rungs hold and the largest deviation, then each that failed or was not run."""
    rungs = report["parity"]
    held = [rung for rung in rungs if rung["verdict"] == "pass"]
    exact = [rung for rung in held if rung["tolerance"].get("max_abs") is not None]  # of others no |Δ| is judged
    differ = max((rung["max_abs"] for rung in exact if rung["max_abs"] is not None), default=None)
    shown = "" if differ is None else f", max |Δ| {differ:.1e}"
    others = [rung for rung in rungs if rung["verdict"] != "pass"]
    return [
        f"{len(held)} of {len(rungs)} rungs hold{shown}",
        *(f"{rung['verdict'].replace('_', ' ')}: {rung['from']} == {rung['to']} ({rung['reason']})" for rung in others),
    ]


def engine_lines(report: Mapping[str, Any]) -> list[str]:
    """One line per engine."""
    return [f"{file['path']}, {size(file['bytes'])}" for file in _engines(report)]


def hardware(report: Mapping[str, Any]) -> str:
    """The machine that latency was measured on, in one line; "" if none was."""
    if not report["bench"]:
        return ""
    return describe_machine(report["bench"][0]["environment"])
