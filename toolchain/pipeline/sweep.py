"""A recipe in several variants: the runs of a grid of settings, which share every stage that has the same inputs."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from toolchain.errors import FolderBusy, RecipeError, SlimvitError, StorageError, TargetUnavailable
from toolchain.files import LONGEST, digest_of, write_json, write_text
from toolchain.pipeline.folder import Workspace
from toolchain.recipe import Recipe
from toolchain.report.markdown import inline, table_lines
from toolchain.report.page import drawn
from toolchain.report.record import Report
from toolchain.report.several import front, side_by_side
from toolchain.report.tables import Table

log = logging.getLogger(__name__)
COMMA = re.compile(r""",(?=(?:[^"'\[\]{}]|"[^"]*"|'[^']*'|\[[^\]]*\]|\{[^}]*\})*$)""")
"""A comma that stands in no string, array or table."""
WAIT = 5.0
"""Seconds until a run that another process carries out is looked at again."""
SCHEMA = "slimvit.sweep/1"


@dataclass(frozen=True)
class Variant:
    """One combination of settings: the name of its folder, and its recipe."""

    name: str
    recipe: Recipe


Runs = Callable[[Variant, Path, Sequence[Path]], Report]
"""(variant, its folder, the folders of all) → the report of its run."""
Ended = tuple[Variant, Report | SlimvitError]
"""A variant, and the report of its run or why there is none."""


@dataclass(frozen=True)
class Swept:
    """What came out of each variant, in the order of the grid: a report, an error, or of a run that lost a device both."""

    reports: Mapping[str, Report]
    failed: Mapping[str, SlimvitError]


def variants(recipe: Path, settings: Sequence[str]) -> list[Variant]:
    """Every combination of values, the first setting slowest.

    Args:
        recipe: the path of a recipe.toml.
        settings: `key=VALUE`, or `key=VALUE,VALUE,…` for what is varied.

    Raises:
        RecipeError: nothing is varied, two combinations are the same, or one is no recipe.
    """
    split = [_values(setting) for setting in settings]
    if twice := [key for key, count in Counter(key for key, _ in split).items() if count > 1]:
        raise RecipeError(f"{twice[0]} is given twice; write its values in one --set {twice[0]}=VALUE,VALUE")
    if all(len(values) == 1 for _, values in split):
        raise RecipeError("nothing is varied: give a key several values, as in --set budget.params=0.7,0.5,0.3")
    varied = [key for key, values in split if len(values) > 1]
    grid: list[tuple[str, str, Recipe]] = []  # name, digest, recipe
    for chosen in product(*(values for _, values in split)):
        pairs = {key: value for (key, _), value in zip(split, chosen, strict=True)}
        loaded = Recipe.load(recipe, [f"{key}={value}" for key, value in pairs.items()])
        name = "_".join(f"{_short(key, varied)}-{_slug(pairs[key])}" for key in varied)
        if any(loaded == other for *_, other in grid):
            raise RecipeError(f"two combinations of --set give the same recipe ({name}); give each value once")
        grid.append((name, digest_of(pairs)[:8], loaded))
    count = Counter(name for name, *_ in grid)  # letters that a folder's name leaves out may be all that differs
    return [
        Variant(name if count[name] == 1 and len(name) <= LONGEST else f"{name[:LONGEST]}-{digest}", loaded)
        for name, digest, loaded in grid
    ]


def _values(setting: str) -> tuple[str, list[str]]:
    key, equals, values = setting.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {setting!r} is not of the form a.b=VALUE or a.b=VALUE,VALUE")
    return key.strip(), [value.strip() for value in COMMA.split(values)]


def _short(key: str, keys: Sequence[str]) -> str:
    """The last part of a key, or all of it where another key ends alike."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key.replace(".", "-")


def _slug(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", value).strip("-.") or "empty"


def require_writable(grid: Sequence[Variant], out: Path) -> None:
    """Raises StorageError if the folder of a sweep, or that of one of its variants, plainly cannot be written; creates nothing."""
    for folder in (out, *(out / variant.name for variant in grid)):
        with contextlib.suppress(FolderBusy):  # a sweep waits for the process that is at it
            Workspace(folder.resolve()).check()


def sweep(grid: Sequence[Variant], out: Path, carry_out: Runs, wait_s: float = WAIT) -> Swept:
    """The runs of a grid, each in a folder of its own below `out`, with sweep.json, sweep.md and sweep.html beside them.

    Several processes may do this at once: each takes the runs that no other is at, and waits for the others' at the end.
    What a variant cannot do, such as a budget out of reach, ends that variant alone.

    Args:
        grid: the variants.
        out: the folder; what earlier sweeps finished in it is taken up.
        carry_out: runs one of them.
        wait_s: seconds until a run that another process carries out is looked at again.

    Raises:
        StorageError: the folder cannot be written.
    """
    return gathered(grid, out, _one_after_another(grid, out, carry_out, wait_s))


def gathered(grid: Sequence[Variant], out: Path, ended: Iterable[Ended]) -> Swept:
    """What came out of a grid, with sweep.json, sweep.md and sweep.html in `out`.

    Args:
        grid: the variants.
        out: the folder that holds those of their runs.
        ended: each variant with its outcome, in any order.

    Raises:
        StorageError: the folder cannot be written.
    """
    reports, failed = dict[str, Report](), dict[str, SlimvitError]()
    for variant, outcome in ended:
        if isinstance(outcome, Report):
            reports[variant.name] = outcome
            continue
        if isinstance(outcome, StorageError):  # of a folder that cannot be written: the next run's cannot either
            raise outcome
        failed[variant.name] = outcome
        with contextlib.suppress(SlimvitError):  # a run that lost a device has a report all the same
            report = Report.load(out / variant.name)
            if isinstance(outcome, TargetUnavailable) and report.recipe_digest == variant.recipe.digest:
                reports[variant.name] = report
    names = [variant.name for variant in grid]
    swept = Swept(
        {name: reports[name] for name in names if name in reports},
        {name: failed[name] for name in names if name in failed},
    )
    _write(swept, out)
    return swept


def _one_after_another(grid: Sequence[Variant], out: Path, carry_out: Runs, wait_s: float) -> Iterator[Ended]:
    folders = [out / variant.name for variant in grid]
    waiting, said = list(grid), False
    while waiting:
        busy = []
        for variant in waiting:
            try:
                yield variant, carry_out(variant, out / variant.name, folders)
            except FolderBusy:
                busy.append(variant)
            except SlimvitError as error:
                yield variant, error
        if busy and len(busy) == len(waiting):
            if not said:
                log.warning("another process is at %s; waiting for it", ", ".join(variant.name for variant in busy))
            said = True
            time.sleep(wait_s)
        waiting = busy


def _write(outcome: Swept, out: Path) -> None:
    best = front(outcome.reports)
    runs = [
        {
            "name": name,
            "recipe_digest": report.recipe_digest,
            "compressed": report.compressed.model_dump(mode="json"),
            "dense": report.dense.model_dump(mode="json"),
            "front": name in best.names,
            "knee": name == best.knee,
        }
        for name, report in outcome.reports.items()
    ]
    failed = {name: str(error) for name, error in outcome.failed.items()}
    write_json(out / "sweep.json", {"schema": SCHEMA, "runs": runs, "failed": failed})
    for name in ("sweep.md", "sweep.html"):
        (out / name).unlink(missing_ok=True)
    if outcome.reports:
        part = side_by_side(outcome.reports, failed)
        title, origin = (
            f"Sweep of {len(runs)} runs",
            f"In {out.resolve().name}; each run's folder has its own report.html",
        )
        table = part.table or Table("", (), ())
        text = [
            f"# {title}",
            "",
            f"{inline(origin)}.",
            "",
            *table_lines(table),
            *(f"\n{inline(line)}" for line in part.lines),
        ]
        write_text(out / "sweep.md", "\n".join(text) + "\n")
        write_text(out / "sweep.html", drawn(title, origin, [part]))
