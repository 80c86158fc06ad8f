"""What is made of a suite's records: one file for each kind of page; it reads records and measures nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from records import Results
from suite import Suite

from toolchain.errors import RecipeError

Page = Callable[[Suite, Results], dict[str, str]]
PAGES = ("accuracy", "cost", "speed", "floor", "files", "validity")


def page_of(name: str) -> Page:
    """The page of a name: (suite, results) → file name → text of everything that follows from the records."""
    if name not in PAGES:
        raise RecipeError(f"there is no page {name!r}; known: {', '.join(PAGES)}")
    page: Page = importlib.import_module(f"pages.{name}").page
    return page
