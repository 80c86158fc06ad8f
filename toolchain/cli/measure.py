"""evaluate, parity, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from toolchain.bench.compare import compare as compare_artifacts
from toolchain.bench.summary import summary
from toolchain.cli.options import STDOUT, JsonFlag, with_lone_json
from toolchain.cli.screen import Screen, line, print_facts, print_json
from toolchain.errors import RecipeError
from toolchain.export.logits import accuracy_of, parity_of
from toolchain.export.parity import TOLERANCES, require

EXIT = {"regressed": 1, "invalid": 4, "inconclusive": 4}

bench = typer.Typer(help="Measure latency, paired and interleaved.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Adds the verbs of this file."""
    app.command()(evaluate)
    app.command()(parity)
    bench.command("compare", cls=_JsonFile)(bench_compare)
    app.add_typer(bench, name="bench")


class _JsonFile(TyperCommand):
    """A command whose option --json takes a file or stands alone, which typer's options cannot."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """What click leaves unparsed, after a --json that stands alone was given `STDOUT`."""
        return super().parse_args(ctx, with_lone_json(args))


PathArgument = Annotated[Path, typer.Argument(metavar="PATH", help="A model folder or an ONNX file.")]


def evaluate(
    path: PathArgument,
    data: Annotated[str, typer.Option("--data", help="digits, fashion-mnist, imagefolder:PATH, hf:NAME.")],
    split: Annotated[str, typer.Option(help="train, calibration, validation or test.")] = "test",
    json_: JsonFlag = False,
) -> None:
    """Top-1 accuracy of a model folder or an ONNX file, with counts."""
    found = accuracy_of(path, data, split)
    facts = {
        "path": str(path),
        "data": data,
        "split": split,
        "accuracy": found.accuracy,
        "wrong": found.wrong,
        "total": found.total,
    }
    print_json(facts) if json_ else line(
        f"{found.accuracy:.4f}  ({found.wrong} wrong of {found.total}, {data} {split})"
    )


def parity(
    a: Annotated[Path, typer.Argument(metavar="A", help="Taken as right: a model folder or an ONNX file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Compared with it.")],
    data: Annotated[str, typer.Option("--data", help="A data source; seeded noise if absent.")] = "none",
    json_: JsonFlag = False,
) -> None:
    """Whether two artifacts are one and the same model, at batch 1 and 3; exit 3 if they are not."""
    rung = parity_of(a, b, data, TOLERANCES["fp32"])
    print_json(rung.to_dict()) if json_ else line(str(rung))
    require([rung])


def bench_compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="The baseline: an ONNX file; a model folder for eager.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="What is compared with it.")],
    target: Annotated[str, typer.Option(help="Where to run: see `slimvit targets`.")] = "ort-cpu",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    input_shape: Annotated[str, typer.Option(help="One sample, e.g. 3,224,224, where a file leaves it open.")] = "",
    tau: Annotated[float, typer.Option(min=0.001, max=0.5, help="Tolerance of the verdict.")] = 0.05,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write the result with its raw samples here.")
    ] = None,
    json_: Annotated[
        str | None,
        typer.Option("--json", metavar="[FILE]", help="Print one JSON document to stdout, or write it to FILE."),
    ] = None,
) -> None:
    """Time B against A, interleaved with A again as control; exit 1 if regressed, 4 if nothing can be said."""
    with Screen() as screen:
        screen.stage("bench")

        def told(text: str, share: float) -> None:
            screen.progress(share, text)

        found = compare_artifacts(
            a,
            b,
            target=target,
            threads=threads,
            batch=batch,
            input_shape=_shape(input_shape),
            tau=tau,
            seed=seed,
            on_progress=told,
        )
    if out is not None:
        found.save(out)
    if json_ not in (None, STDOUT):
        found.save(Path(json_))
    if json_ == STDOUT:
        print_json(found.to_dict())
    else:
        line(summary(found))
        print_facts({"A": f"{found.latency_ms('A'):.3f} ms", "B": f"{found.latency_ms('B'):.3f} ms"})
    if (code := EXIT.get(found.verdict)) is not None:
        raise typer.Exit(code)


def _shape(text: str) -> tuple[int, ...] | None:
    try:
        return tuple(int(part) for part in text.split(",")) if text else None
    except ValueError:
        raise RecipeError(f"--input-shape {text!r} is not of the form 3,224,224") from None
