"""gate, gate accept, gate digest."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolchain.cli import completion, outputs
from toolchain.cli.options import JsonFlag, OutFile, TargetsOption, design_of, write_result
from toolchain.cli.screen import Screen, line, print_json, print_tables, print_wrapped
from toolchain.errors import RecipeError, StorageError
from toolchain.files import write_json, write_text
from toolchain.progress import Progress
from toolchain.version import tool

if TYPE_CHECKING:
    from toolchain.devices.device import Devices
    from toolchain.gate import Accept, Check, GateConfig, GateResult

gate = typer.Typer(help="Hold artifacts against budgets and against a baseline that is measured beside them.")
ConfigOption = Annotated[Path, typer.Option("--config", "-c", metavar="GATE", help="A gate.toml.")]
DEFAULT = completion.GATE


def register(app: typer.Typer) -> None:
    """Adds the verbs of this file."""
    gate.callback(invoke_without_command=True)(run)
    gate.command("accept")(accept)
    gate.command("digest")(digest)
    app.add_typer(gate, name="gate")


def run(
    context: typer.Context,
    config: ConfigOption = DEFAULT,
    why: Annotated[bool, typer.Option("--why", help="Attribute sizes, or their change, to layers.")] = False,
    targets: TargetsOption = None,
    out: OutFile = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write Markdown.", callback=outputs.file(outputs.MARKDOWN))
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write JUnit XML.", callback=outputs.file(outputs.JUNIT))
    ] = None,
    github_benchmark: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write JSON for github-action-benchmark.",
            callback=outputs.file(outputs.LISTED, holds=outputs.is_github_benchmark),
        ),
    ] = None,
    bencher: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write Bencher's JSON.",
            callback=outputs.file(outputs.OBJECT, holds=outputs.is_bencher),
        ),
    ] = None,
    json_: JsonFlag = False,
) -> None:
    """Judge every cell; exit 1 if a check failed or nothing was evaluated, 4 if nothing failed but something is open."""
    if context.invoked_subcommand is not None:
        if config != DEFAULT or why or any((json_, targets, out, markdown, junit, github_benchmark, bencher)):
            # a flag must not be ignored without a word
            verb = context.invoked_subcommand
            raise RecipeError(f"options of `gate {verb}` stand behind it: slimvit gate {verb} --config GATE …")
        return
    from toolchain.devices.device import Devices
    from toolchain.gate import GateConfig, load_accepts
    from toolchain.report.gate import gate_markdown
    from toolchain.report.junit import to_junit
    from toolchain.report.trackers import to_bencher, to_github_benchmark

    outputs.remove_earlier(out, markdown, junit, github_benchmark, bencher)
    if config == DEFAULT and not config.exists():
        raise StorageError(
            f"there is no {config} in {Path.cwd()}: write one as docs/ci.md shows, or name yours with --config"
        )
    loaded = GateConfig.load(config, targets)
    accepts = load_accepts(config)
    with Screen() as screen, Devices(targets) as devices:  # finished sessions are kept until all is written
        result = _judge(context, loaded, accepts, devices, screen, why=why)
        write_result(result.to_dict(), out)
        if markdown is not None:
            write_text(markdown, gate_markdown(result))
        if junit is not None:
            write_text(junit, to_junit(result))
        if github_benchmark is not None:
            write_json(github_benchmark, to_github_benchmark(result))
        if bencher is not None:
            write_json(bencher, to_bencher(result))
    print_json(result.to_dict()) if json_ else _print(result)
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def accept(
    context: typer.Context,
    cell: Annotated[str, typer.Argument(metavar="CELL", help="The name of a cell.", autocompletion=completion.cells)],
    reason: Annotated[str, typer.Option(help="Why this is acceptable; it is read by whoever reviews the file.")],
    expires: Annotated[dt.datetime, typer.Option(formats=["%Y-%m-%d"], metavar="YYYY-MM-DD", help="The last day.")],
    config: ConfigOption = DEFAULT,
    check: Annotated[str, typer.Option(metavar="NAME", help="Only this check, e.g. relation.size.")] = "",
    result: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="A result of `gate --out FILE`, instead of judging now."),
    ] = None,
    targets: TargetsOption = None,
    json_: JsonFlag = False,
) -> None:
    """Accept what fails in a cell, each check up to its value of now, until a day; writes GATE's .accepts.toml."""
    from toolchain.devices.device import Devices
    from toolchain.gate import Accept, GateConfig, GateResult, add_accepts

    today = _today()
    if expires.date() < today:
        raise RecipeError(f"--expires {expires.date()} is in the past; today is {today}")
    if not reason.strip():
        raise RecipeError("--reason gives no reason; it is what the next reader has")
    loaded = GateConfig.load(config, targets).only(cell, check)
    with Screen() as screen, Devices(targets) as devices:
        if result is None:
            judged = _judge(context, loaded, (), devices, screen)
        else:
            judged = GateResult.load(result)
            judged.require_asked(loaded)
        entries = [
            Accept.create(
                cell=cell,
                check=each.name,
                at_most=value,
                **judged.meaning(cell, each.name),
                reason=reason,
                accepted=today,
                expires=expires.date(),
            )
            for each, value in _acceptable(judged, cell, check)
        ]
        path = add_accepts(config, entries)
    if json_:
        print_json({"path": str(path), "accepted": [entry.model_dump(mode="json") for entry in entries]})
    else:
        for entry in entries:
            line(f"accepted {entry.check} of {cell} up to {entry.at_most:,} through {entry.expires}, in {path}")


def digest(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A file or a folder, or hf://ORG/NAME/FILE.")],
    json_: JsonFlag = False,
) -> None:
    """Print the sha256 by which a gate.toml names a baseline."""
    from toolchain.artifacts import open_artifact
    from toolchain.gate.baselines import fetched_file

    value = open_artifact(fetched_file(path)).sha256
    print_json({"path": str(path), "sha256": value}) if json_ else line(value)


def _acceptable(result: GateResult, cell: str, name: str) -> Sequence[tuple[Check, float]]:
    """The failing checks of a cell, or the one of that name, beside the value that each is accepted up to."""
    from toolchain.gate.accepts import NEVER

    checks = [check for each in result.cells if each.name == cell for check in each.checks]
    failing = [check for check in checks if check.status == "fail" and name in ("", check.name)]
    if not failing:
        what = f"{name} of cell {cell!r} does not fail" if name else f"no check of cell {cell!r} fails"
        raise RecipeError(f"{what}; there is nothing to accept")
    pairs = []
    for check in failing:
        if check.name in NEVER:
            raise RecipeError(
                f"{NEVER[check.name]} cannot be accepted; change {check.name} if the models may differ, or name another "
                "check by --check"
            )
        if (value := check.acceptable_up_to) is None:
            raise RecipeError(f"{check.name} of cell {cell!r} failed without a value: {check.reason}")
        pairs.append((check, value if isinstance(value, int) else math.ceil(value * 1e4) / 1e4))
    return pairs


def _judge(
    context: typer.Context,
    config: GateConfig,
    accepts: Sequence[Accept],
    devices: Devices,
    screen: Screen,
    *,
    why: bool = False,
) -> GateResult:
    from toolchain.gate import run_gate
    from toolchain.gate.timing import Clock, timed

    screen.stage("gate")
    clock, progress = Clock(partial(timed, design=design_of(context))), Progress(screen)
    return run_gate(
        config, accepts, tool=tool(), day=_today(), devices=devices, why=why, clock=clock, progress=progress
    )


def _print(result: GateResult) -> None:
    from toolchain.report.gate import checks_table, gate_notes, why_table

    tables = [checks_table(result), *(table for cell in result.cells if (table := why_table(cell)) is not None)]
    print_tables(tables)
    print_wrapped(gate_notes(result))
    print_wrapped([result.headline])


def _today() -> dt.date:
    return dt.datetime.now(dt.UTC).date()
