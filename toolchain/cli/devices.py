"""targets, bench pack, bench unpack: devices by name, and those that no network reaches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolchain.cli import outputs
from toolchain.cli.bench import bench, show_comparison
from toolchain.cli.options import (
    Asked,
    JsonFlag,
    OutFile,
    SeedOption,
    SessionsOption,
    TargetsOption,
    TauOption,
    design_of,
    with_workload,
    write_result,
)
from toolchain.cli.screen import line, print_facts, print_json, print_tables
from toolchain.defaults import SESSIONS
from toolchain.errors import SlimvitError, TargetUnavailable
from toolchain.report.tables import Table

if TYPE_CHECKING:
    from toolchain.targets import Target, TargetInfo


def register(app: typer.Typer) -> None:
    """Adds the verbs of this file."""
    app.command()(targets)
    bench.command("pack")(bench_pack)
    bench.command("unpack")(bench_unpack)


def targets(targets_file: TargetsOption = None, json_: JsonFlag = False) -> None:
    """Which targets can be used: those of this machine, and the devices of targets.toml, which are asked."""
    from toolchain.devices.device import probe
    from toolchain.devices.targets_toml import load_targets
    from toolchain.targets import TARGETS

    named = load_targets(targets_file)
    rows = [_row(name, partial(TARGETS.require, name)) for name in TARGETS]
    with ThreadPoolExecutor() as pool:
        rows += pool.map(lambda each: _row(each[0], lambda: probe(*each)), named.items())
    if json_:
        print_json([asdict(row) for row in rows])
        return
    header = ("target", "available", "runtime", "device", "details")
    print_tables([Table("Targets", header, tuple(row.cells for row in rows), text=tuple(range(5)))])
    for index, row in enumerate(row for row in rows if row.install):
        if index == 0:
            line("What brings those that are missing")
        line(f"  {row.target}: {row.install}")  # whole, so that it can be copied


@dataclass(frozen=True)
class Row:
    """A target: what answers under its name, or in `details` why nothing does."""

    target: str
    available: bool
    runtime: str
    device: str
    details: Mapping[str, str]
    install: str
    never_run: str

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        never = {"never run here": self.never_run} if self.never_run else {}
        detail = "; ".join(f"{key}: {value}" for key, value in {**self.details, **never}.items())
        return self.target, "yes" if self.available else "no", self.runtime, self.device, detail


def _row(name: str, ask: Callable[[], TargetInfo | Target]) -> Row:
    from toolchain.targets import Target

    never_run = ""
    try:
        answer = ask()
        if isinstance(answer, Target):
            never_run = answer.never_run
            answer = answer.probe()
        info = answer
    except SlimvitError as error:
        reason, install = (error.reason, error.install) if isinstance(error, TargetUnavailable) else (str(error), "")
        return Row(name, False, "", "", {"reason": reason}, install, never_run)
    return Row(name, True, f"{info.runtime} {info.version}".strip(), info.device, info.details, info.install, never_run)


@with_workload
def bench_pack(
    context: typer.Context,
    a: Annotated[Path, typer.Argument(metavar="A", help="The baseline, an ONNX file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="What is compared with it.")],
    out: Annotated[
        Path,
        outputs.option("The tar to write.", outputs.BUNDLE),
    ],
    asked: Asked,
    sessions: SessionsOption = SESSIONS,
    blocks: Annotated[int, typer.Option(min=4, help="Per session; nothing can be added later.")] = 24,
    tau: TauOption = None,
    seed: SeedOption = None,
    json_: JsonFlag = False,
) -> None:
    """Write a tar that measures B against A on a device without a network; `bench unpack` reads what comes back."""
    from toolchain.devices.device import Device
    from toolchain.devices.targets_toml import bundled_runtime, named_target
    from toolchain.measure.bundle import Question, pack

    settings = named_target(asked.target, asked.targets)
    device = Device(
        asked.target, bundled_runtime(asked.target, settings), threads=settings.threads, affinity=settings.affinity
    )
    design = design_of(context, sessions=sessions, blocks=blocks, tau=tau, seed=seed)
    files = pack(a, b, out, Question(device.runtime, asked.workload(device), design))
    facts = {"bundle": str(out), "bytes": out.stat().st_size, "files": files, "sessions": sessions}
    if json_:
        print_json(facts)
    else:
        print_facts(facts)
        line("On the device: unpack it, `sh run.sh`, and bring back result.json.")


def bench_unpack(
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="The result.json that came back, or a tar with it.")],
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The tar that was sent.")],
    out: OutFile = None,
    json_: JsonFlag = False,
) -> None:
    """Check what a bundle's device sent back and judge it; exit codes as `bench compare`."""
    from toolchain.measure.bundle import unpack

    comparison = unpack(result, bundle)
    write_result(comparison.to_dict(), out)
    show_comparison(comparison, json_=json_)
