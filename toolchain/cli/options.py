"""Options that several verbs share."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from toolchain.cli import completion, outputs
from toolchain.defaults import BLOCKS
from toolchain.errors import RecipeError
from toolchain.files import write_text

if TYPE_CHECKING:
    from toolchain.devices.device import Device
    from toolchain.measure.samples import Design, Workload

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a recipe key, e.g. budget.params=0.4.",
        autocompletion=completion.settings,
    ),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan; do no work.")]
NoResumeOption = Annotated[bool, typer.Option("--no-resume", help="Do every stage anew.")]
SpeedupOption = Annotated[
    float | None,
    typer.Option(
        "--require-speedup",
        min=0.0,
        help="Exit 4 unless in every place the fastest file of export.precisions verified this speedup.",
    ),
]
RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe.toml.")]
RecipeOption = Annotated[Path, typer.Option("--recipe", metavar="RECIPE", help="A recipe.toml.")]
FolderArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="A model folder that a stage before wrote.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where to write.", callback=outputs.folder)]
RunFolderOption = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Folder of the run; runs/NAME if absent.", callback=outputs.folder),
]
TargetsOption = Annotated[
    Path | None,
    typer.Option(
        "--targets", metavar="FILE", help="targets.toml; if absent, that of this folder and the user's are read."
    ),
]
ShapeOption = Annotated[
    str, typer.Option(help="One sample in the layout of the file, e.g. 3,224,224, where it leaves that open.")
]
ImageColumnOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of an hf: data set with several columns of images.")
]
LabelColumnOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Of an hf: data set with several columns of classes; '' reads no labels."),
]
SeedOption = Annotated[int | None, typer.Option(min=0, help="Of inputs, orders and bootstrap; 0 if absent.")]
SessionsOption = Annotated[
    int, typer.Option(min=3, help="Fresh processes; fewer than 3 do not show what processes differ by.")
]
BlocksOption = Annotated[int | None, typer.Option(min=4, help=f"Blocks a session, at first; {BLOCKS} if absent.")]
TauOption = Annotated[float | None, typer.Option(min=0.001, max=0.5, help="Tolerance of the verdict; 0.05 if absent.")]
OutFile = Annotated[Path | None, outputs.option("Also write the result with its raw samples here.", outputs.RESULT)]
FactsFile = Annotated[Path | None, outputs.option("Also write the result here.", outputs.RESULT)]


@dataclass(frozen=True)
class Asked:
    """What the options of a measurement say of its target and of a call; see `with_workload`."""

    target: Annotated[
        str, typer.Option(help="Where to run: see `slimvit targets`.", autocompletion=completion.targets)
    ] = "ort-cpu"
    targets: TargetsOption = None
    threads: Annotated[
        int | None, typer.Option(min=1, help="Intra-op threads; if absent, what targets.toml says, else 1.")
    ] = None
    batch: Annotated[int, typer.Option(min=1, help="First dimension of the inputs.")] = 1
    input_shape: ShapeOption = ""
    affinity: Annotated[str, typer.Option(help="Cores to run on, e.g. 0,1; all that are allowed if absent.")] = ""

    def workload(self, device: Device) -> Workload:
        """The options as they were given, and what targets.toml says where they were not; raises as `numbers`."""
        from toolchain.measure.experiment import workload_on

        return workload_on(
            device,
            batch=self.batch,
            threads=self.threads,
            affinity=numbers(self.affinity, "--affinity"),
            input_shape=numbers(self.input_shape, "--input-shape"),
        )


def with_workload(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb with the options of a measurement in place of its parameter `asked`."""

    @functools.wraps(verb)
    def command(**given: Any) -> None:
        asked = Asked(**{field.name: given.pop(field.name) for field in fields(Asked)})
        verb(asked=asked, **given)

    hints, options = get_type_hints(verb, include_extras=True), get_type_hints(Asked, include_extras=True)
    parameters: list[Parameter] = []
    for name, parameter in signature(verb).parameters.items():
        if name == "asked":
            for field in fields(Asked):
                kind = Parameter.KEYWORD_ONLY
                parameters.append(Parameter(field.name, kind, default=field.default, annotation=options[field.name]))
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def design_of(context: typer.Context, **options: float | None) -> Design:
    """How latency is timed: what the options say, and what the command was started with where they say nothing."""
    from toolchain.measure.samples import Design

    design = context.find_root().obj or Design()
    return design.model_copy(update={name: value for name, value in options.items() if value is not None})


def write_result(result: Mapping[str, object], out: Path | None) -> None:
    """Writes a result to the file that was named, if one was."""
    if out is not None:
        write_text(out, json.dumps(result, separators=(",", ":"), allow_nan=False) + "\n")


def numbers(text: str, option: str) -> tuple[int, ...] | None:
    """The integers of an option, None if it is empty; raises RecipeError if it is not of that form."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else None
    except ValueError:
        example = "3,224,224" if option == "--input-shape" else "0,1"
        raise RecipeError(f"{option} {text!r} is not of the form {example}") from None
