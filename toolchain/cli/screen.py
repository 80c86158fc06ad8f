"""What a person sees: results on stdout, progress on stderr."""

from __future__ import annotations

import datetime as dt
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable
from rich.text import Text

from toolchain.report.tables import Table
from toolchain.shell import word

if TYPE_CHECKING:
    from toolchain.report.record import Report
    from toolchain.report.sections import Part

WIDE = 160


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False, default=str) + "\n")


def line(text: str) -> None:
    """One line on stdout, as it is."""
    sys.stdout.write(text + "\n")


class _Console(Console):
    """A console that says when its reader is gone; rich itself would end the program, with a code of its own."""

    def on_broken_pipe(self) -> None:
        """Raises BrokenPipeError."""
        raise BrokenPipeError


def _stdout() -> Console:
    console = _Console(highlight=False)
    return console if console.is_terminal else _Console(highlight=False, width=WIDE)


def print_tables(tables: Iterable[Table]) -> None:
    """Tables on stdout; as wide as they need where stdout is not a terminal."""
    console = _stdout()
    for table in tables:
        drawn = RichTable(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for column, name in enumerate(table.header):
            drawn.add_column(name, justify="left" if column in table.text else "right", overflow="fold")
        for row in table.rows:
            drawn.add_row(*(Text(cell) for cell in row))
        console.print(Text(table.title, style="bold"))
        console.print(drawn)
        console.print()


def print_lines(title: str, lines: Iterable[str]) -> None:
    """A titled list on stdout, wrapped as by `print_wrapped`; nothing if there are no lines."""
    for index, text in enumerate(lines):
        if index == 0:
            _stdout().print(Text(title, style="bold"))
        print_wrapped([text], indent=2)


def print_wrapped(lines: Iterable[str], *, indent: int = 0) -> None:
    """Sentences on stdout, each wrapped between words on a terminal, and one line elsewhere."""
    console = _stdout()
    for text in lines:
        if console.is_terminal:
            console.print(Padding(Text(text), (0, 0, 0, indent), expand=False))
        else:
            line(" " * indent + text)


def print_report(report: Report, folder: Path) -> None:
    """A run, section by section: cautions first, then what came out, and at last where to read on."""
    from toolchain.report.sections import parts

    drawn = list(parts(report))
    print_wrapped(f"note: {caution}" for part in drawn for caution in part.cautions)
    for part in drawn:
        if part.is_empty or part.brief == ():
            continue
        if part.table and part.table.rows and part.brief is None:
            print_tables([part.table])
            print_wrapped(part.lines)
        else:
            print_lines(part.title, part.lines if part.brief is None else part.brief)
            line("")
    print_lines("Report", [f"{folder / 'report.html'}  (also report.md, report.json, manifest.json)"])
    line("")
    print_lines("Next", _next(report, folder))


def _next(report: Report, folder: Path) -> list[str]:
    """Commands that a reader may type now, each with what it is for."""
    commands = (
        [("inspect", report.suggestion.smallest, "what is in the smallest file")] if report.suggestion.smallest else []
    )
    if report.bench:
        row = report.bench[0]
        name = f"bench/{row.target}.{row.precision}.b{row.batch}.t{row.threads}.json"
        commands.append(("bench verify", name, "the verdict again, from its raw samples"))
    shown = [(f"slimvit {verb} {word(folder / path)}", why) for verb, path, why in commands if (folder / path).exists()]
    return [
        *(f"{command}  # {why}" for command, why in shown),
        f"slimvit report {word(folder)}  # this page again",
    ]


def print_part(part: Part) -> None:
    """The table and the sentences of a part."""
    print_tables([part.table] if part.table else [])
    print_wrapped(part.lines)


def print_facts(facts: Mapping[str, object]) -> None:
    """Name and value, one a line; facts of facts below their name, indented."""
    for text in fact_lines(facts):
        line(text)


def fact_lines(facts: Mapping[str, object], indent: int = 0) -> Iterator[str]:
    """The lines of `print_facts`: counts as "MatMul 24, Add 13", shapes as [batch, 3, 224, 224], what is empty as "-"."""
    width = max((len(str(name)) for name in facts), default=0)
    for name, value in facts.items():
        label = f"{'':{indent}}{name!s:<{width}}  "
        if (text := _inline(value)) is not None:
            yield f"{label}{text}"
            continue
        yield label.rstrip()
        for entry in value if isinstance(value, list | tuple) else [value]:
            first, *rest = (
                fact_lines(entry, indent + 4) if isinstance(entry, Mapping) else (f"{'':{indent + 4}}{entry}",)
            )
            yield first if isinstance(value, Mapping) else f"{'':{indent + 2}}- {first.strip()}"
            yield from rest


def _inline(value: object) -> str | None:
    """A value as one line, or None where it needs several."""
    if isinstance(value, Mapping):
        counts = value and all(isinstance(count, int) and not isinstance(count, bool) for count in value.values())
        return ", ".join(f"{name} {count:,}" for name, count in value.items()) if counts else None if value else "-"
    if isinstance(value, list | tuple):
        short = all(entry is None or isinstance(entry, str | int | float) for entry in value)
        prose = any(isinstance(entry, str) and " " in entry for entry in value)
        return (
            None
            if not short or prose
            else f"[{', '.join('?' if e is None else str(e) for e in value)}]"
            if value
            else "-"
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None or value == "" else f"{value:,}" if isinstance(value, int) else str(value)


class Pace:
    """How long a stage will still take, by how fast it went since its first report: a resumed one does not start at 0."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None

    def left(self, share: float, now: float) -> str:
        """Time left as 0:00:00, "" until two reports say how fast it goes.

        Args:
            share: of the stage that is done.
            now: seconds of a clock that only goes forward.
        """
        if self._first is None:
            self._first = share, now
        begun, since = self._first
        if share <= begun:
            return ""
        return str(dt.timedelta(seconds=round((now - since) * (1 - share) / (share - begun))))


class Screen:
    """A watcher that draws a bar per stage on a terminal, and plain lines elsewhere; a context manager.

    Args:
        clock: seconds, from any moment on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._console = Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._shown = 0.0
        self._pace = Pace()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self._progress = Progress(
                *columns, TimeElapsedColumn(), TextColumn("{task.fields[left]}"), console=self._console, transient=True
            )
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def stage(self, name: str) -> None:
        """Starts a bar."""
        self._shown, self._pace = self._clock(), Pace()
        if self._progress is not None:
            self._task = self._progress.add_task(name, total=1.0, text="", left="")

    def say(self, text: str) -> None:
        """One line of its own."""
        self._console.print(text, markup=False, soft_wrap=True)

    def at(self, share: float, text: str) -> None:
        """Moves the bar; without a terminal, a line every ten seconds."""
        soon = self._pace.left(share, self._clock())
        left = f"{soon} left" if soon else ""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=share, text=text, left=left)
        elif self._clock() - self._shown > 10:
            self._shown = self._clock()
            self._console.print(f"  {share:4.0%} {', '.join(filter(None, [text, left]))}", markup=False, soft_wrap=True)

    def done(self, name: str, seconds: float, *, reused: bool) -> None:
        """Replaces the bar by a line."""
        if self._progress is not None and self._task is not None:
            self._progress.remove_task(self._task)
        how = "kept from an earlier run" if reused else f"{seconds:.1f} s"
        self._console.print(f"{name:<28} {how}", markup=False, soft_wrap=True)
