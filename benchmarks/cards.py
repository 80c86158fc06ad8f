"""The card of each folder of `models/`: what its recipe says and what is recorded of it, written by `benchmarks/report.py`.

Prose is the recipe's own header, numbers are those of the records, of timm's model and of the plan; none is typed into a card.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import headline
import torch
from kinds.pair import comparison_of
from pages.text import hardware, markdown, speedup, verified
from records import SUFFIX, Record, Results, read_record

from toolchain.cost import ModelShape, Widths, trace
from toolchain.families import family_of
from toolchain.outputs import WORDS, output_of
from toolchain.plan import CompressionPlan, ModelRef
from toolchain.recipe import Recipe
from toolchain.report.tables import operations
from toolchain.settings import read_toml
from toolchain.surgery.replay import create_dense

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "models"
RECIPE, PLAN = "recipe.toml", "plan.json"
SOURCE = "<!-- written by `python benchmarks/report.py` from the recipe and the records; do not edit, change the recipe's header -->"
TRAINED = (
    "The recipe made it from a model that it trained itself; on another processor training rounds otherwise, and other widths "
    "may follow."
)
PRETRAINED = (
    "It was made from the weights and the photographs of the suite `real`; from others, other widths may follow."
)
"""What a committed plan was made from."""
FILES = ("targets", "formats")
"""Suites that record a recipe as every file that ships; the first that has one of a recipe's model is shown."""


def drawn(results: Results) -> dict[Path, str]:
    """Path → text of every card."""
    return {
        folder / "README.md": card(folder, results)
        for folder in sorted(MODELS.iterdir())
        if (folder / RECIPE).is_file()
    }


def card(folder: Path, results: Results) -> str:
    """The text of one card."""
    recipe = Recipe.load(folder / RECIPE)
    shape = shape_of(recipe)
    parts = [
        f"# {folder.name}",
        SOURCE,
        header((folder / RECIPE).read_text(encoding="utf-8")),
        "## What it is",
        markdown(["", ""], what(folder, recipe, shape)),
        "## Numbers",
        *(numbers(folder, recipe, results) or [nothing(folder, recipe)]),
        "## The plan",
        plan_of(folder, recipe, shape),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def header(text: str) -> str:
    """The comment that a recipe begins with, as Markdown: commands, which are indented, become a block of their own."""
    lines = [
        line.removeprefix("#").removeprefix(" ")
        for line in text.split("\n\n", maxsplit=1)[0].splitlines()
        if line.startswith("#")
    ]
    parts: list[str] = []
    for paragraph in "\n".join(lines).split("\n\n"):
        code = paragraph.startswith("  ")
        parts.append(f"```sh\n{paragraph.replace('  ', '', 1)}\n```" if code else paragraph)
    return "\n\n".join(parts)


def shape_of(recipe: Recipe) -> ModelShape:
    """What the recipe's dense model costs."""
    ref = ModelRef(name=recipe.model.name, kwargs=recipe.model.kwargs)
    with torch.device("meta"):
        module = create_dense(
            ref if recipe.model.output is None else ref.model_copy(update={"kwargs": _kwargs(recipe)})
        )
        family = family_of(module, ref.name)
        return trace(module, family, family.input_size(module))


def _kwargs(recipe: Recipe) -> dict[str, Any]:
    return {**recipe.model.kwargs, "num_classes": 0} if recipe.model.output == "features" else dict(recipe.model.kwargs)


def what(folder: Path, recipe: Recipe, shape: ModelShape) -> list[list[str]]:
    """Name and value of what the recipe asks for."""
    model, budget, export = recipe.model, recipe.budget, recipe.export
    weights = "timm's pretrained ones" if model.pretrained else "trained by the recipe" if recipe.train else "untrained"
    source = read_toml(folder / RECIPE, "the recipe ")["data"]["source"]  # as it is written, for any reader's home
    others = [path.name for path in sorted(folder.glob("recipe.*.toml"))]
    rows = [
        ["model", f"timm's `{model.name}`" + (f" with `{_inline(model.kwargs)}`" if model.kwargs else "")],
        ["dense model", f"{shape.params:,} parameters, {operations(shape.macs)} multiply-accumulates an image"],
        ["outputs", WORDS[output_of(model.output, 2)]],
        ["weights", weights],
        ["images", f"`{source}`, {recipe.data.calibration_images} of them to calibrate on"],
        ["method", f"`{recipe.compress.method}`"],
        ["budget", budget.shown],
        ["training after", f"{recipe.finetune.epochs} epochs" if recipe.finetune.epochs else "none"],
        ["files", ", ".join(export.precisions)],
        ["engines", engines(recipe.engine.targets)],
        ["timed on", ", ".join(recipe.bench.targets) or "nothing"],
        ["recipe", ", ".join(f"[{name}]({name})" for name in (RECIPE, *others))],
    ]
    return [row for row in rows if row[1]]


def engines(targets: Sequence[str]) -> str:
    """The targets that a recipe builds engines for, the line that brings what they need, and how to do without."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    needed = [
        max((extra for extra in known if f"{target}-".startswith(f"{extra}-")), key=len, default="")
        for target in targets
    ]
    install = f"pip install 'slimvit[{','.join(filter(None, needed))}]'"
    without = "`--set 'engine.targets=[]'` leaves them out"
    return f"{', '.join(targets)}: needs `{install}`; {without}" if any(needed) else ", ".join(targets) or "none"


def _inline(kwargs: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in kwargs.items())


def numbers(folder: Path, recipe: Recipe, results: Results) -> list[str]:
    """What is recorded of the recipe's model with its method and its budget; nothing if nothing is."""
    parts = [*_files(recipe, results)]
    first = headline.pretrained_table(results) if folder.name == headline.PRETRAINED_MODEL else ""
    if first:
        parts.append(headline.placed(first, folder / "README.md").strip())
    return parts


def nothing(folder: Path, recipe: Recipe) -> str:
    """Where nothing is recorded: that, and what measures it."""
    return (
        f"No record of [benchmarks/results](../../benchmarks/README.md) is of this recipe, so this card has no numbers of it. "
        f"`slimvit run models/{folder.name}/{RECIPE} --out runs/{folder.name}` measures them, on "
        f"{', '.join(recipe.bench.targets) or 'no target'}, and writes them to `runs/{folder.name}/report.html`."
    )


def _records(results: Results, suite: str) -> Iterator[Record]:
    """Every record of a suite, by name."""
    paths = sorted((results.root / suite / "records").glob(f"*{SUFFIX}"))
    return (record for record in map(read_record, paths) if record is not None)


def _is_of(raw: dict[str, Any], recipe: Recipe) -> bool:
    """Whether a recorded recipe is of the same model, method and budget."""
    asked = (recipe.model.name, dict(recipe.model.kwargs), recipe.compress.method, recipe.budget.params)
    return (raw["model"]["name"], raw["model"]["kwargs"], raw["compress"]["method"], raw["budget"]["params"]) == asked


def _files(recipe: Recipe, results: Results) -> Iterator[str]:
    """A table of every file of a recorded run."""
    runs = (record for suite in FILES for record in _records(results, suite) if record.kind == "files")
    for record in islice((run for run in runs if _is_of(run.definition["recipe"], recipe)), 1):
        pairs = [each for each in results.below(record.suite, record.cell) if each.kind == "pair"]
        dense = next(row for row in record.result["artifacts"] if row["model"] == "dense")
        rows = [
            [
                f"`{row['path']}`",
                f"{row['bytes']:,}",
                f"{100 * row['bytes'] / dense['bytes']:.1f} %",
                f"{row['wrong']:,} of {row['total']:,}" if row["total"] else "–",
                "; ".join(_timed(row, pairs)) or "–",
            ]
            for row in record.result["artifacts"]
            if row["refused"] is None
        ]
        machines = sorted({hardware(comparison_of(pair).environment) for pair in pairs})
        head = ["File", "Bytes", "Of the dense file", "Test images wrong", "Speedup over the dense fp32 file, batch 1"]
        table = markdown(head, rows)
        yield (
            f"### As every file that ships\n\n{table}\n\nMeasured on: {'; '.join(machines) or 'nothing'}. "
            f"[All rows](../../benchmarks/results/{record.suite}/README.md) of the suite `{record.suite}`."
        )


def _timed(row: dict[str, Any], pairs: Sequence[Record]) -> Iterator[str]:
    for pair in pairs:
        if pair.definition["a"] == "dense fp32" and pair.definition["b"] == f"{row['model']} {row['precision']}":
            comparison = comparison_of(pair)
            yield f"{pair.definition['target']}: {speedup(comparison)}, {verified(comparison) or 'not verified'}"


def plan_of(folder: Path, recipe: Recipe, shape: ModelShape) -> str:
    """The widths of the committed plan."""
    plan = CompressionPlan.load(folder / PLAN)
    small = planned(plan, shape)
    blocks = dict[str, dict[str, str]]()
    for keep in plan.keeps:
        block, _, part = keep.module.rpartition(".")
        blocks.setdefault(block, {})[f"{part}, {keep.unit}"] = f"{keep.kept} of {keep.total}"
    for rank in plan.low_ranks:
        block, _, part = rank.module.rpartition(".")
        blocks.setdefault(block, {})[f"{part}, rank"] = str(rank.rank)
    columns = sorted({name for row in blocks.values() for name in row})
    table = markdown(
        ["", *columns], [[f"`{name}`", *(row.get(c, "all") for c in columns)] for name, row in blocks.items()]
    )
    return (
        f"[{PLAN}]({PLAN}), digest `{plan.digest[:12]}`, leaves {small.params:,} of {shape.params:,} parameters "
        f"({100 * small.params / shape.params:.1f} %) and {small.macs:,} of {shape.macs:,} multiply-accumulates "
        f"({100 * small.macs / shape.macs:.1f} %). {TRAINED if recipe.train else PRETRAINED}\n\n{table}"
    )


def planned(plan: CompressionPlan, shape: ModelShape) -> ModelShape:
    """What the planned model costs."""
    with torch.device("meta"):
        module = create_dense(plan.model)
        groups = family_of(module, plan.model.name).unit_groups(module)
    return shape.shrunk(Widths.of(plan), groups)
