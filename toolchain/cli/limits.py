"""bench floor, bench profile, bench references: what a latency consists of, and what it stands beside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from toolchain.artifact import write_json
from toolchain.bench.environment import describe_machine
from toolchain.bench.floor import Floor, Limit, measure_floor, realised_share
from toolchain.bench.operators import Profile, profile_operators
from toolchain.bench.references import Row, reference_rows
from toolchain.bench.summary import summary
from toolchain.cli.bench import bench, numbers
from toolchain.cli.options import JsonFlag
from toolchain.cli.screen import Screen, line, print_json, print_lines, print_tables
from toolchain.report.tables import Table, number, operations, size

Target = Annotated[str, typer.Option(help="Where to run: see `slimvit targets`.")]
Threads = Annotated[int, typer.Option(min=1)]
Batch = Annotated[int, typer.Option(min=1)]
InputShape = Annotated[
    str, typer.Option("--input-shape", help="One sample, e.g. 3,224,224, where a file leaves it open.")
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Also write the JSON document here.")]
FirstFile = Annotated[Path, typer.Argument(metavar="A", help="An ONNX file; the dense one where there are two.")]
SecondFile = Annotated[Path | None, typer.Argument(metavar="[B]", help="The compressed one.")]


def register(app: typer.Typer) -> None:  # noqa: ARG001 - they belong to `bench`
    """Adds the verbs of this file."""
    bench.command("floor")(bench_floor)
    bench.command("profile")(bench_profile)
    bench.command("references")(bench_references)


def bench_floor(
    a: FirstFile,
    b: SecondFile = None,
    target: Target = "ort-cpu",
    threads: Threads = 1,
    batch: Batch = 1,
    shape: InputShape = "",
    sessions: Annotated[int, typer.Option(min=1, help="Fresh processes.")] = 3,
    blocks: Annotated[int, typer.Option(min=4, help="Per session.")] = 10,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Out = None,
    json_: JsonFlag = False,
) -> None:
    """How close A (and B) come to the time of their matrix products alone, and how much of the ideal speedup is real."""
    with Screen() as screen:
        screen.stage("floor")
        found = measure_floor(
            a,
            b,
            target=target,
            threads=threads,
            batch=batch,
            input_shape=numbers(shape, "--input-shape"),
            sessions=sessions,
            blocks=blocks,
            seed=seed,
            on_progress=lambda text, share: screen.progress(share, text),
        )
    _give(found.to_dict(), out, json_)
    if not json_:
        _show_floor(found)


def bench_profile(
    a: FirstFile,
    b: SecondFile = None,
    target: Target = "ort-cpu",
    threads: Threads = 1,
    batch: Batch = 1,
    shape: InputShape = "",
    calls: Annotated[int, typer.Option(min=1, help="How many are averaged.")] = 30,
    out: Out = None,
    json_: JsonFlag = False,
) -> None:
    """Where the time goes: the costliest nodes of A (and of B beside it), and all of them by operator."""
    found = [
        profile_operators(
            path, target=target, threads=threads, batch=batch, input_shape=numbers(shape, "--input-shape"), calls=calls
        )
        for path in (a, b)
        if path is not None
    ]
    facts = dict(zip("AB", (profile.to_dict() for profile in found), strict=False))
    _give(facts, out, json_)
    if not json_:
        _show_profiles(found)


def bench_references(
    a: FirstFile,
    b: SecondFile = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", metavar="NAME", help="A timm model; may be given several times."),
    ] = None,
    target: Target = "ort-cpu",
    threads: Threads = 1,
    batch: Batch = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Out = None,
    json_: JsonFlag = False,
) -> None:
    """Smaller models off the shelf (untrained: for size and latency alone), and B, each timed against A."""
    with Screen() as screen:
        screen.stage("references")
        rows = reference_rows(
            a,
            b,
            models or [],
            target=target,
            threads=threads,
            batch=batch,
            seed=seed,
            on_progress=lambda text, share: screen.progress(share, text),
        )
    _give({"rows": [row.to_dict() for row in rows]}, out, json_)
    if not json_:
        _show_references(rows)


def _give(facts: dict[str, Any], out: Path | None, json_: bool) -> None:
    if out is not None:
        write_json(out, facts)
    if json_:
        print_json(facts)


def _show_floor(found: Floor) -> None:
    limits = [("A", found.a), *([("B", found.b)] if found.b is not None else [])]
    header = ("", "file", "MACs", "latency", "products alone", "rate", "share of the limit")
    rows = tuple((letter, *_limit_cells(limit)) for letter, limit in limits)
    print_tables([Table("Latency and its floor", header, rows, text=(0, 1)), *(_products(*pair) for pair in limits)])
    if found.b is not None and found.ratio is not None:
        realised = realised_share(found.ratio, found.a.macs, found.b.macs)
        share, speedup = realised.to_dict()["share"], realised.to_dict()["speedup"]
        line(
            f"speedup {_interval(speedup)} of an ideal {realised.ideal:.2f} by MACs: {_interval(share)} of it realised"
        )
    print_lines("Machine", [describe_machine(found.sessions[0].fingerprint.before.machine)])


def _limit_cells(limit: Limit) -> tuple[str, ...]:
    rate = f"{limit.macs / limit.floor_ms / 1e6:.1f} GMAC/s"
    share = _interval(limit.share.to_ratio())
    return limit.name, operations(limit.macs), f"{limit.latency_ms:.3f} ms", f"{limit.floor_ms:.3f} ms", rate, share


def _products(letter: str, limit: Limit) -> Table:
    header = ("product", "type", "count", "MACs", "time", "rate")
    rows = tuple(
        (
            row["product"],
            row["dtype"],
            str(row["count"]),
            operations(row["macs"]),
            f"{row['ms']:.3f} ms",
            f"{row['gmacs_per_s']:.1f} GMAC/s",
        )
        for row in limit.to_dict()["products"]
    )
    return Table(f"Products of {letter}, {limit.name}", header, rows, text=(0, 1))


def _show_profiles(found: Sequence[Profile]) -> None:
    tables = []
    for letter, profile in zip("AB", found, strict=False):
        total = profile.total_ms or 1.0
        rows = tuple(
            (node.name, node.op, f"{node.ns / 1e6:.3f} ms", f"{100 * node.ns / 1e6 / total:.1f} %")
            for node in profile.costliest()
        )
        title = f"Costliest nodes of {letter}, {profile.name} ({profile.target}, mean of {profile.calls} calls)"
        tables.append(Table(title, ("node", "operator", "time", "share"), rows, text=(0, 1)))
    times = [{row.op: row for row in profile.by_operator()} for profile in found]
    order = sorted({op for part in times for op in part}, key=lambda op: -max(p[op].ms for p in times if op in p))
    header = ("operator", *(f"{what} {letter}" for letter in "AB"[: len(found)] for what in ("nodes", "time", "share")))
    tables.append(Table("By operator", header, tuple((op, *_operator_cells(times, op)) for op in order)))
    print_tables(tables)
    line("A profiler slows down what it looks at; for latency see `slimvit bench compare`.")


def _operator_cells(times: Sequence[dict[str, Any]], op: str) -> list[str]:
    cells: list[str] = []
    for part in times:
        row = part.get(op)
        cells += ["–"] * 3 if row is None else [str(row.count), f"{row.ms:.3f} ms", f"{100 * row.share:.1f} %"]
    return cells


def _show_references(rows: Sequence[Row]) -> None:
    header = ("model", "", "parameters", "MACs", "size", "latency", "time of the dense")
    cells = tuple(
        (
            row.name,
            row.kind,
            number(row.params),
            operations(row.macs),
            size(row.size_bytes),
            "–" if row.latency_ms is None else f"{row.latency_ms:.3f} ms",
            "1" if row.comparison is None else _interval(row.comparison.ratio.to_ratio()),
        )
        for row in rows
    )
    print_tables([Table("Beside the dense model", header, cells, text=(0, 1))])
    print_lines("Verdicts", [f"{row.name}: {summary(row.comparison)}" for row in rows if row.comparison is not None])


def _interval(ratio: dict[str, float]) -> str:
    return f"{ratio['point']:.2f} [{ratio['lo']:.2f}, {ratio['hi']:.2f}]"
