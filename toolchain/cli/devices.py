"""targets, bench pack, bench unpack: devices by name, and those that no network reaches."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from toolchain.cli.bench import EXIT, bench
from toolchain.cli.options import JsonFlag, SessionsOption, TargetsOption, numbers
from toolchain.cli.screen import line, print_facts, print_json, print_tables
from toolchain.devices.device import probe
from toolchain.devices.targets_toml import BundleSettings, load_targets, named_target
from toolchain.errors import RecipeError, SlimvitError, TargetUnavailable
from toolchain.measure.bundle import Question, pack, unpack
from toolchain.measure.samples import SESSIONS, Design, Workload
from toolchain.measure.summary import summary
from toolchain.report.tables import Table
from toolchain.targets import TARGETS, TargetInfo


def register(app: typer.Typer) -> None:
    """Adds the verbs of this file."""
    app.command()(targets)
    bench.command("pack")(bench_pack)
    bench.command("unpack")(bench_unpack)


def targets(targets_file: TargetsOption = None, json_: JsonFlag = False) -> None:
    """Which targets can be used: those of this machine, and the devices of targets.toml, which are asked."""
    named = load_targets(targets_file)
    rows = [_row(name, target.probe) for name, target in TARGETS.items()]
    with ThreadPoolExecutor() as pool:
        rows += pool.map(lambda each: _row(each[0], lambda: probe(*each)), named.items())
    if json_:
        print_json(rows)
        return

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        detail = "; ".join(f"{key}: {value}" for key, value in row["details"].items())
        return row["target"], "yes" if row["available"] else "no", row["runtime"], row["device"], detail, row["install"]

    header = ("target", "available", "runtime", "device", "details", "install")
    print_tables([Table("Targets", header, tuple(cells(row) for row in rows), text=tuple(range(6)))])


def _row(name: str, ask: Callable[[], TargetInfo]) -> dict[str, Any]:
    try:
        info = ask()
    except SlimvitError as error:
        nothing = {"target": name, "available": False, "runtime": "", "device": ""}
        reason, install = (error.reason, error.install) if isinstance(error, TargetUnavailable) else (str(error), "")
        return {**nothing, "details": {"reason": reason}, "install": install}
    return {
        "target": name,
        "available": True,
        "runtime": f"{info.runtime} {info.version}".strip(),
        "device": info.device,
        "details": dict(info.details),
        "install": "",
    }


def bench_pack(
    a: Annotated[Path, typer.Argument(metavar="A", help="The baseline, an ONNX file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="What is compared with it.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The tar to write.")],
    target: Annotated[str, typer.Option(help="A device of targets.toml, or a runtime.")] = "ort-cpu",
    targets_file: TargetsOption = None,
    threads: Annotated[int | None, typer.Option(min=1, help="If absent, what targets.toml says, else 1.")] = None,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    input_shape: Annotated[
        str, typer.Option(help="One sample in the layout of the file, e.g. 3,224,224, where it leaves that open.")
    ] = "",
    sessions: SessionsOption = SESSIONS,
    blocks: Annotated[int, typer.Option(min=4, help="Per session; nothing can be added later.")] = 24,
    tau: Annotated[float, typer.Option(min=0.001, max=0.5, help="Tolerance of the verdict.")] = 0.05,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json_: JsonFlag = False,
) -> None:
    """Write a tar that measures B against A on a device without a network; `bench unpack` reads what comes back."""
    settings = named_target(target, targets_file)
    if not isinstance(settings, BundleSettings):
        try:
            settings = BundleSettings(
                transport="bundle", runtime=settings.runtime, threads=settings.threads, affinity=settings.affinity
            )
        except ValueError:
            raise RecipeError(f"target {target!r} runs on {settings.runtime}, which bundles do not have") from None
    question = Question(
        settings.runtime,
        Workload(batch, threads or settings.threads, settings.affinity, numbers(input_shape, "--input-shape")),
        Design(sessions=sessions, blocks=blocks, tau=tau, seed=seed),
    )
    files = pack(a, b, out, question)
    facts = {"bundle": str(out), "bytes": out.stat().st_size, "files": files, "sessions": sessions}
    if json_:
        print_json(facts)
    else:
        print_facts(facts)
        line("On the device: unpack it, `sh run.sh`, and bring back result.json.")


def bench_unpack(
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="The result.json that came back, or a tar with it.")],
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The tar that was sent.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the comparison here.")] = None,
    json_: JsonFlag = False,
) -> None:
    """Check what a bundle's device sent back and judge it; exit codes as `bench compare`."""
    found = unpack(result, bundle)
    if out is not None:
        found.save(out)
    if json_:
        print_json(found.to_dict())
    else:
        line(summary(found))
        print_facts({name: f"{found.latency_ms(name):.3f} ms" for name in "AB"})
    if (code := EXIT.get(found.verdict)) is not None:
        raise typer.Exit(code)
