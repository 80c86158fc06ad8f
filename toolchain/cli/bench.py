"""bench run, compare, calibrate and verify."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from toolchain.analysis.realised import Floor
from toolchain.cli.options import (
    STDOUT,
    AffinityOption,
    BatchOption,
    BlocksOption,
    JsonFile,
    JsonFlag,
    OutFile,
    SeedOption,
    ShapeOption,
    TargetOption,
    TargetsOption,
    ThreadsOption,
    with_lone_json,
    workload,
)
from toolchain.cli.screen import Screen, line, print_facts, print_json, print_tables
from toolchain.devices.device import open_device
from toolchain.files import read_json, write_text
from toolchain.gate import GateResult
from toolchain.measure.calibration import Calibration, built_in
from toolchain.measure.calibration import calibrate as calibrate_machine
from toolchain.measure.compare import compare as compare_artifacts
from toolchain.measure.comparison import Comparison
from toolchain.measure.environment import BUSY, cores_of_others, describe_machine, slowed
from toolchain.measure.samples import BLOCKS, LOOKS, Design
from toolchain.measure.single import COLD_STARTS, Measurement
from toolchain.measure.single import measure as measure_artifact
from toolchain.measure.summary import summary
from toolchain.pipeline.verify import Measured
from toolchain.pipeline.verify import verify as verify_file
from toolchain.progress import Progress
from toolchain.report.tables import Table

EXIT = {"regressed": 1, "invalid": 4, "inconclusive": 4}
FEW = "n/a (too few samples)"

bench = typer.Typer(help="Measure latency, paired and interleaved.", no_args_is_help=True)


class _JsonFile(TyperCommand):
    """A command whose option --json takes a file or stands alone, which typer's options cannot."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """What click leaves unparsed, after a --json that stands alone was given `STDOUT`."""
        return super().parse_args(ctx, with_lone_json(args))


ArtifactArgument = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An ONNX file; a model folder for eager.")]


def register(app: typer.Typer) -> None:
    """Adds the verbs of this file."""
    for verb, name in ((run, "run"), (compare, "compare"), (calibrate, "calibrate")):
        bench.command(name, cls=_JsonFile)(verb)
    bench.command("verify")(verify)  # its arguments end in .json themselves
    app.add_typer(bench, name="bench")


def run(
    artifact: ArtifactArgument,
    target: TargetOption = "ort-cpu",
    targets_file: TargetsOption = None,
    threads: ThreadsOption = None,
    batch: BatchOption = 1,
    input_shape: ShapeOption = "",
    affinity: AffinityOption = "",
    blocks: BlocksOption = BLOCKS,
    cold_starts: Annotated[int, typer.Option(min=0, help="Fresh processes for cold start and memory.")] = COLD_STARTS,
    seed: SeedOption = 0,
    out: OutFile = None,
    json_: JsonFile = None,
) -> None:
    """Latency, tails, throughput, cold start and memory of one artifact; only `compare` says which of two is faster."""
    with Screen() as screen, open_device(target, targets_file) as device:
        screen.stage("bench")
        found = measure_artifact(
            artifact,
            device,
            workload(device, threads, batch, input_shape, affinity),
            Design(blocks=blocks, seed=seed),
            cold_starts=cold_starts,
            progress=Progress(screen),
        )
        _save(found.to_dict(), out, json_)
    print_json(found.to_dict()) if json_ == STDOUT else print_facts(_run_facts(found))


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="The baseline: an ONNX file; a model folder for eager.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="What is compared with it.")],
    target: TargetOption = "ort-cpu",
    targets_file: TargetsOption = None,
    threads: ThreadsOption = None,
    batch: BatchOption = 1,
    input_shape: ShapeOption = "",
    affinity: AffinityOption = "",
    blocks: BlocksOption = BLOCKS,
    looks: Annotated[
        int,
        typer.Option(
            min=1, max=4, help="How often to look while the data grows; each is paid for. 1 takes the shortest time."
        ),
    ] = LOOKS,
    tau: Annotated[float, typer.Option(min=0.001, max=0.5, help="Tolerance of the verdict.")] = 0.05,
    seed: SeedOption = 0,
    out: OutFile = None,
    json_: JsonFile = None,
) -> None:
    """Time B against A, interleaved with A again as control; exit 1 if regressed, 4 if nothing can be said."""
    with Screen() as screen, open_device(target, targets_file) as device:
        screen.stage("bench")
        found = compare_artifacts(
            a,
            b,
            device,
            workload(device, threads, batch, input_shape, affinity),
            Design(blocks=blocks, looks=looks, tau=tau, seed=seed),
            progress=Progress(screen),
        )
        _save(found.to_dict(), out, json_)
    if json_ == STDOUT:
        print_json(found.to_dict())
    else:
        line(summary(found))
        print_facts(_pair_facts(found))
    if (code := EXIT.get(found.verdict)) is not None:
        raise typer.Exit(code)


def calibrate(
    artifact: Annotated[
        Path | None,
        typer.Argument(metavar="[ARTIFACT]", help="What to time against itself; built-in matmuls if absent."),
    ] = None,
    target: TargetOption = "ort-cpu",
    targets_file: TargetsOption = None,
    threads: ThreadsOption = None,
    batch: BatchOption = 1,
    input_shape: ShapeOption = "",
    affinity: AffinityOption = "",
    blocks: BlocksOption = BLOCKS,
    out: OutFile = None,
    json_: JsonFile = None,
) -> None:
    """How small a difference this machine can support now, and how long a comparison takes for it."""
    with (
        Screen() as screen,
        tempfile.TemporaryDirectory(prefix="slimvit-bench-") as folder,
        open_device(target, targets_file) as device,
    ):
        screen.stage("bench")
        found = calibrate_machine(
            artifact or built_in(Path(folder) / "built-in.onnx"),
            device,
            workload(device, threads, batch, input_shape, affinity),
            Design(blocks=blocks),
            progress=Progress(screen),
        )
        _save(found.to_dict(), out, json_)
    print_json(found.to_dict()) if json_ == STDOUT else _print_calibration(found)


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
    checked = [(path, verify_file(path, a=a, b=b, here=here)) for path in files]
    if json_:
        rows = [{"path": str(path), **{k: v for k, v in read_json(path).items() if k != "raw"}} for path, _ in checked]
        print_json(rows)
        return
    for path, found in checked:
        line(f"{path}: {_short(found)}")


def _save(result: dict[str, Any], out: Path | None, json_: str | None) -> None:
    """Writes a result to the files that were named, while its sessions are still kept, should one not be writable."""
    for path in (out, None if json_ in (None, STDOUT) else Path(json_)):
        if path is not None:
            write_text(path, json.dumps(result, separators=(",", ":"), allow_nan=False) + "\n")


def _run_facts(found: Measurement) -> dict[str, str]:
    shown = found.to_dict()
    latency, cold = shown["latency_ms"], shown["cold_start"]
    facts = {
        "latency": f"{latency['point']:.3f} ms  [{latency['lo']:.3f}, {latency['hi']:.3f}]",
        "p90": _ms(shown["p90_ms"]),
        "p99": _ms(shown["p99_ms"]),
        "throughput": f"{shown['samples_per_second']:.1f} samples/s at batch {found.scenario.batch}",
        "size": f"{shown['size_bytes']:,} bytes",
        "this machine now": f"supports comparisons at τ ≥ {100 * shown['tau_min']:.1f} %",
        "machine": describe_machine(shown["environment"]),
    }
    facts |= _pace(found)
    if cold:
        facts["cold start"] = f"{cold['open_ms']:.0f} ms to open, {cold['first_ms']:.1f} ms for the first call"
        if cold["peak_rss_bytes"] is not None:
            before = (
                f" ({cold['rss_before_bytes'] / 1e6:.0f} MB of it the interpreter)" if cold["rss_before_bytes"] else ""
            )
            facts["peak memory"] = f"{cold['peak_rss_bytes'] / 1e6:.0f} MB{before}"
        if cold["device_bytes"] is not None:
            facts["device memory"] = f"{cold['device_bytes'] / 1e6:.0f} MB"
    return facts


def _short(found: Measured | GateResult) -> str:
    """One line about a result that was recomputed."""
    if isinstance(found, Comparison):
        return summary(found)
    if isinstance(found, GateResult):
        return f"{found.headline}; latencies follow from their samples"
    if isinstance(found, Measurement):
        shown = found.latency.to_ratio()
        said = f"{shown['point']:.3f} ms [{shown['lo']:.3f}, {shown['hi']:.3f}]"
    elif isinstance(found, Floor):
        shares = [f"{limit.name} at {math.exp(limit.share.point):.2f} of its limit" for limit in found.limits]
        said = ", ".join(shares) + ("" if found.is_valid else ", not verified")
    else:
        said = f"τ ≥ {100 * found.rows[-1].tau_min:.1f} % with {found.rows[-1].blocks} blocks"
    return f"{said}, follows from its samples"


def _pair_facts(found: Comparison) -> dict[str, str]:
    def one(name: str) -> str:
        tails = ", ".join(
            f"{label} {_ms(found.tail_ms(name, share))}" for label, share in (("p90", 0.9), ("p99", 0.99))
        )
        return f"{found.latency_ms(name):.3f} ms  ({tails})"

    return {name: one(name) for name in ("A", "B")} | _pace(found)


def _pace(found: Measurement | Comparison) -> dict[str, str]:
    """What a reader should know of the device and of what ran beside, if there is something."""
    prints = [(each.fingerprint.before, each.fingerprint.after) for each in found.sessions]
    said, others = slowed(prints), cores_of_others(prints)
    facts = {"the device slowed down": "; ".join(said)} if said else {}
    if others is not None and others > BUSY:
        facts["beside it"] = f"other processes kept {others:.1f} cores busy"
    return facts


def _ms(value: float | None) -> str:
    return FEW if value is None else f"{value:.3f} ms"


def _print_calibration(found: Calibration) -> None:
    rows = tuple(
        (str(row.look), str(row.sessions), str(row.blocks), f"{100 * row.tau_min:.1f} %", f"{row.seconds:.0f} s")
        for row in found.rows
    )
    header = ("Look", "Sessions", "Blocks", "Smallest τ", "Takes")
    print_tables([Table("What a comparison supports on this machine now", header, rows)])
    print_facts({"machine": describe_machine(found.environment)})
