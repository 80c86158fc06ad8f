"""What is made of a suite's records: one file here for each kind of page; it reads records and measures nothing."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

from records import Results
from suite import Suite

from toolchain.errors import RecipeError

Page = Callable[[Suite, Results], dict[str, str]]


def page_of(name: str) -> Page:
    """The page of a name: (suite, results) → file name → text of everything that follows from the records.

    Raises:
        RecipeError: no file here has this name and a function `page`.
    """
    module = f"{__name__}.{name}"
    page: Page | None = None
    if importlib.util.find_spec(module) is not None:
        page = getattr(importlib.import_module(module), "page", None)
    if page is None:
        raise RecipeError(f"there is no page {name!r}: benchmarks/pages has no file {name}.py with a function page")
    return page
