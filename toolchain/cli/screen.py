"""What a person sees: results on stdout, progress on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from toolchain.cache import Done
from toolchain.report.tables import Table


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False, default=str) + "\n")


def line(text: str) -> None:
    """One line on stdout, as it is."""
    sys.stdout.write(text + "\n")


def print_tables(tables: Iterable[Table]) -> None:
    """Tables on stdout; as wide as they need where stdout is not a terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    for table in tables:
        drawn = RichTable(title=Text(table.title, style="bold"), title_justify="left")
        for index, name in enumerate(table.header):
            text = index == 0 or name in ("verdict", "reason", "sha256")
            drawn.add_column(name, justify="left" if text else "right", overflow="fold")
        for row in table.rows:
            drawn.add_row(*(Text(cell) for cell in row))
        console.print(drawn)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Name and value, one a line."""
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        line(f"{name:<{width}}  {value}")


class Screen:
    """A pipeline listener that draws a bar per stage on a terminal, and plain lines elsewhere; a context manager."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._told = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self._progress = Progress(*columns, *times, console=self._console, transient=True)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def stage(self, name: str) -> None:
        """Starts a bar."""
        self._told = time.monotonic()
        if self._progress is not None:
            self._task = self._progress.add_task(name, total=1.0, text="")

    def progress(self, share: float, text: str) -> None:
        """Moves the bar; without a terminal, a line every ten seconds."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=share, text=text)
        elif time.monotonic() - self._told > 10:
            self._told = time.monotonic()
            self._console.print(f"  {share:4.0%} {text}", markup=False)

    def done(self, name: str, done: Done) -> None:
        """Replaces the bar by a line."""
        if self._progress is not None and self._task is not None:
            self._progress.remove_task(self._task)
        how = "kept from an earlier run" if done.reused else f"{done.seconds:.1f} s"
        self._console.print(f"{name:<28} {how}", markup=False)
