"""bench floor, bench profile: what a latency consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolchain.cli.bench import bench
from toolchain.cli.options import (
    Asked,
    JsonFlag,
    OutFile,
    SeedOption,
    SessionsOption,
    design_of,
    with_workload,
    write_result,
)
from toolchain.cli.screen import Screen, line, print_json, print_lines, print_tables
from toolchain.defaults import FLOOR_BLOCKS, FLOOR_SESSIONS
from toolchain.progress import Progress
from toolchain.report.tables import Table, operations

if TYPE_CHECKING:
    from toolchain.analysis.operators import OperatorTime, Profile
    from toolchain.analysis.realised import Floor, Limit

FirstFile = Annotated[Path, typer.Argument(metavar="A", help="An ONNX file; the dense one where there are two.")]
SecondFile = Annotated[Path | None, typer.Argument(metavar="[B]", help="The compressed one.")]


def register(app: typer.Typer) -> None:  # noqa: ARG001 - they belong to `bench`
    """Adds the verbs of this file."""
    bench.command("floor")(bench_floor)
    bench.command("profile")(bench_profile)


@with_workload
def bench_floor(
    context: typer.Context,
    a: FirstFile,
    asked: Asked,
    b: SecondFile = None,
    sessions: SessionsOption = FLOOR_SESSIONS,
    blocks: Annotated[int, typer.Option(min=4, help="Per session.")] = FLOOR_BLOCKS,
    seed: SeedOption = None,
    out: OutFile = None,
    json_: JsonFlag = False,
) -> None:
    """How close A (and B) come to the time of their matrix products alone, and how much of the ideal speedup is real."""
    from toolchain.analysis.floor import measure_floor
    from toolchain.devices.device import Devices

    with Screen() as screen, Devices(asked.targets) as devices:
        screen.stage("floor")
        device = devices.here(asked.target, "a floor")
        design = design_of(context, sessions=sessions, blocks=blocks, seed=seed)
        floor = measure_floor(a, b, device, asked.workload(device), design, Progress(screen))
        write_result(floor.to_dict(), out)
    print_json(floor.to_dict()) if json_ else _show_floor(floor)


@with_workload
def bench_profile(
    a: FirstFile,
    asked: Asked,
    b: SecondFile = None,
    calls: Annotated[int, typer.Option(min=1, help="How many are averaged.")] = 30,
    out: OutFile = None,
    json_: JsonFlag = False,
) -> None:
    """Where the time goes: the costliest nodes of A (and of B beside it), and all of them by operator."""
    from toolchain.analysis.operators import profile_operators
    from toolchain.devices.device import Devices

    with Screen() as screen, Devices(asked.targets) as devices:
        screen.stage("profile")
        device = devices.here(asked.target, "a profile")
        workload, files = asked.workload(device), [path for path in (a, b) if path is not None]
        profiles = [profile_operators(p, device, workload, calls=calls, progress=Progress(screen)) for p in files]
    facts = dict(zip("AB", (profile.to_dict() for profile in profiles), strict=False))
    write_result(facts, out)
    print_json(facts) if json_ else _show_profiles(profiles)


def _show_floor(found: Floor) -> None:
    from toolchain.measure.environment import describe_machine

    limits = [(limit.letter, limit) for limit in found.limits]
    header = ("", "file", "MACs", "latency", "products alone", "rate", "share of the limit")
    rows = tuple((letter, *_limit_cells(limit)) for letter, limit in limits)
    print_tables([Table("Latency and its floor", header, rows, text=(0, 1)), *(_products(*pair) for pair in limits)])
    if (realised := found.realised) is not None:
        line(
            f"speedup {_interval(realised.speedup.to_ratio())} of an ideal {realised.ideal:.2f} by MACs: "
            f"{_interval(realised.share.to_ratio())} of it realised"
        )
    if not found.is_valid:
        line(f"not verified: the control strays too far, this run supports τ ≥ {100 * found.tau_min:.1f} %")
    print_lines("Machine", [describe_machine(found.environment)])


def _limit_cells(limit: Limit) -> tuple[str, ...]:
    rate = f"{limit.macs / limit.floor_ms / 1e6:.1f} GMAC/s"
    share = _interval(limit.share.to_ratio())
    return limit.name, operations(limit.macs), f"{limit.latency_ms:.3f} ms", f"{limit.floor_ms:.3f} ms", rate, share


def _products(letter: str, limit: Limit) -> Table:
    header = ("product", "type", "count", "MACs", "time", "rate")
    rows = tuple(
        (
            row.product,
            row.dtype,
            str(row.count),
            operations(row.macs),
            f"{row.ms:.3f} ms",
            f"{row.gmacs_per_s:.1f} GMAC/s",
        )
        for row in limit.rates
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


def _operator_cells(times: Sequence[Mapping[str, OperatorTime]], op: str) -> list[str]:
    cells: list[str] = []
    for part in times:
        row = part.get(op)
        cells += ["–"] * 3 if row is None else [str(row.count), f"{row.ms:.3f} ms", f"{100 * row.share:.1f} %"]
    return cells


def _interval(ratio: dict[str, float]) -> str:
    from toolchain.measure.intervals import outward

    return f"{ratio['point']:.2f} {outward(ratio['lo'], ratio['hi'])}"
