"""bench run, compare, calibrate and verify."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolchain.cli.options import (
    Asked,
    BlocksOption,
    JsonFlag,
    OutFile,
    SeedOption,
    TauOption,
    design_of,
    with_workload,
    write_result,
)
from toolchain.cli.screen import Screen, line, print_facts, print_json, print_tables
from toolchain.defaults import COLD_STARTS, LOOKS
from toolchain.progress import Progress
from toolchain.report.tables import Table

if TYPE_CHECKING:
    from toolchain.measure.calibration import Calibration
    from toolchain.measure.comparison import Comparison
    from toolchain.measure.single import Measurement

EXIT = {"regressed": 1, "invalid": 4, "inconclusive": 4}
FEW = "n/a (too few samples)"

bench = typer.Typer(help="Measure latency, paired and interleaved.", no_args_is_help=True)


ArtifactArgument = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An ONNX file; a model folder for eager.")]


def register(app: typer.Typer) -> None:
    """Adds the verbs of this file."""
    for verb in (run, compare, calibrate, verify):
        bench.command()(verb)
    app.add_typer(bench, name="bench")


@with_workload
def run(
    context: typer.Context,
    artifact: ArtifactArgument,
    asked: Asked,
    blocks: BlocksOption = None,
    cold_starts: Annotated[int, typer.Option(min=0, help="Fresh processes for cold start and memory.")] = COLD_STARTS,
    seed: SeedOption = None,
    out: OutFile = None,
    json_: JsonFlag = False,
) -> None:
    """Latency, tails, throughput, cold start and memory of one artifact; only `compare` says which of two is faster."""
    from toolchain.devices.device import open_device
    from toolchain.measure.single import measure

    with Screen() as screen, open_device(asked.target, asked.targets) as device:
        screen.stage("bench")
        measurement = measure(
            artifact,
            device,
            asked.workload(device),
            design_of(context, blocks=blocks, seed=seed),
            cold_starts=cold_starts,
            progress=Progress(screen),
        )
        write_result(measurement.to_dict(), out)
    print_json(measurement.to_dict()) if json_ else print_facts(_run_facts(measurement))


@with_workload
def compare(
    context: typer.Context,
    a: Annotated[Path, typer.Argument(metavar="A", help="The baseline: an ONNX file; a model folder for eager.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="What is compared with it.")],
    asked: Asked,
    blocks: BlocksOption = None,
    looks: Annotated[
        int | None,
        typer.Option(
            min=1, max=4, help=f"How often to look while the data grows; each is paid for. {LOOKS} if absent."
        ),
    ] = None,
    tau: TauOption = None,
    seed: SeedOption = None,
    out: OutFile = None,
    json_: JsonFlag = False,
) -> None:
    """Time B against A, interleaved with A again as control; exit 1 if regressed, 4 if nothing can be said."""
    from toolchain.devices.device import open_device
    from toolchain.measure.compare import compare as compare_artifacts

    with Screen() as screen, open_device(asked.target, asked.targets) as device:
        screen.stage("bench")
        design = design_of(context, blocks=blocks, looks=looks, tau=tau, seed=seed)
        comparison = compare_artifacts(a, b, device, asked.workload(device), design, progress=Progress(screen))
        write_result(comparison.to_dict(), out)
    show_comparison(comparison, json_=json_)


def show_comparison(comparison: Comparison, *, json_: bool) -> None:
    """Prints a comparison; ends the command with the exit code of its verdict."""
    if json_:
        print_json(comparison.to_dict())
    else:
        line(comparison.headline)
        print_facts(_pair_facts(comparison))
    if (code := EXIT.get(comparison.verdict)) is not None:
        raise typer.Exit(code)


@with_workload
def calibrate(
    context: typer.Context,
    asked: Asked,
    artifact: Annotated[
        Path | None,
        typer.Argument(metavar="[ARTIFACT]", help="What to time against itself; built-in matmuls if absent."),
    ] = None,
    blocks: BlocksOption = None,
    out: OutFile = None,
    json_: JsonFlag = False,
) -> None:
    """How small a difference this machine can support now, and how long a comparison takes for it."""
    from toolchain.devices.device import open_device
    from toolchain.measure.calibration import built_in
    from toolchain.measure.calibration import calibrate as calibrate_machine

    with (
        Screen() as screen,
        tempfile.TemporaryDirectory(prefix="slimvit-bench-") as folder,
        open_device(asked.target, asked.targets) as device,
    ):
        screen.stage("bench")
        artifact = artifact or built_in(Path(folder) / "built-in.onnx")
        design = design_of(context, blocks=blocks)
        calibration = calibrate_machine(artifact, device, asked.workload(device), design, Progress(screen))
        write_result(calibration.to_dict(), out)
    print_json(calibration.to_dict()) if json_ else _print_calibration(calibration)


def verify(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="Results of bench run, compare, floor, calibrate or of gate."),
    ],
    a: Annotated[
        Path | None, typer.Option("--a", help="The artifact that was A; its bytes must be those timed.")
    ] = None,
    b: Annotated[Path | None, typer.Option("--b", help="The artifact that was B.")] = None,
    here: Annotated[bool, typer.Option("--here", help="Also require that it was measured on this machine.")] = False,
    json_: JsonFlag = False,
) -> None:
    """Recompute every statistic of results from their raw samples; exit 3 if one does not follow. Needs no hardware."""
    from toolchain.measure.stored import read
    from toolchain.measure.verify import verify as verify_file

    checked = [(path, verify_file(path, a=a, b=b, here=here)) for path in files]
    if json_:
        rows = [{"path": str(path), **{k: v for k, v in read(path).items() if k != "raw"}} for path, _ in checked]
        print_json(rows)
        return
    for path, result in checked:
        line(f"{path}: {result.headline}; follows from its samples")


def _run_facts(found: Measurement) -> dict[str, str]:
    from toolchain.measure.environment import describe_machine

    latency, cold = found.latency.to_ratio(), found.cold_start
    facts = {
        "latency": f"{latency['point']:.3f} ms  [{latency['lo']:.3f}, {latency['hi']:.3f}]",
        "p90": _ms(found.tail_ms("A", 0.9)),
        "p99": _ms(found.tail_ms("A", 0.99)),
        "throughput": f"{found.samples_per_second:.1f} samples/s at batch {found.scenario.batch}",
        "size": f"{found.artifact.size_bytes:,} bytes",
        "this machine now": f"supports comparisons at τ ≥ {100 * found.tau_min:.1f} %",
        "machine": describe_machine(found.environment),
    }
    facts |= _pace(found)
    if cold is not None:
        facts["cold start"] = f"{cold.open_ms:.0f} ms to open, {cold.first_ms:.1f} ms for the first call"
        if cold.peak_rss_bytes is not None:
            before = f" ({cold.rss_before_bytes / 1e6:.0f} MB of it the interpreter)" if cold.rss_before_bytes else ""
            facts["peak memory"] = f"{cold.peak_rss_bytes / 1e6:.0f} MB{before}"
        if cold.device_bytes is not None:
            facts["device memory"] = f"{cold.device_bytes / 1e6:.0f} MB"
    return facts


def _pair_facts(found: Comparison) -> dict[str, str]:
    def one(name: str) -> str:
        tails = ", ".join(
            f"{label} {_ms(found.tail_ms(name, share))}" for label, share in (("p90", 0.9), ("p99", 0.99))
        )
        return f"{found.latency_ms(name):.3f} ms  ({tails})"

    return {name: one(name) for name in ("A", "B")} | _pace(found)


def _pace(found: Measurement | Comparison) -> dict[str, str]:
    """What a reader should know of the device and of what ran beside, if there is something."""
    from toolchain.measure.environment import BUSY, cores_of_others, slowed

    prints = [(each.fingerprint.before, each.fingerprint.after) for each in found.sessions]
    said, others = slowed(prints), cores_of_others(prints)
    facts = {"the device slowed down": "; ".join(said)} if said else {}
    if others is not None and others > BUSY:
        facts["beside it"] = f"other processes kept {others:.1f} cores busy"
    return facts


def _ms(value: float | None) -> str:
    return FEW if value is None else f"{value:.3f} ms"


def _print_calibration(found: Calibration) -> None:
    from toolchain.measure.environment import describe_machine

    rows = tuple(
        (str(row.look), str(row.sessions), str(row.blocks), f"{100 * row.tau_min:.1f} %", f"{row.seconds:.0f} s")
        for row in found.rows
    )
    header = ("Look", "Sessions", "Blocks", "Smallest τ", "Takes")
    print_tables([Table("What a comparison supports on this machine now", header, rows)])
    print_facts({"machine": describe_machine(found.environment)})
