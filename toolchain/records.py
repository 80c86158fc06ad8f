"""The base of typed records, and the first fault that pydantic finds in one, in words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from pydantic import BaseModel, ConfigDict, ValidationError


class Record(BaseModel):
    """Facts as they are recorded and read back: frozen, of exactly these fields and types."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


def first_fault(error: ValidationError, whole: str = "") -> str:
    """The first fault as "where: what"; `whole` is what stands for a fault of the whole record."""
    where, what = place_and_fault(error)
    where = where or whole
    return f"{where}: {what}" if where else what


@contextlib.contextmanager
def checked(raised: Callable[[str], Exception], what: str) -> Iterator[None]:
    """A block that makes a record; if pydantic refuses it, the first fault is raised as another error, after `what`."""
    try:
        yield
    except ValidationError as error:
        raise raised(f"{what}: {first_fault(error)}") from None


def place_and_fault(error: ValidationError) -> tuple[str, str]:
    """(where, what) of the first fault; where is a dotted path, "" for the whole record."""
    first = error.errors()[0]
    return ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
