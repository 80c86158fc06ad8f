"""Accepted regressions: a dated log beside gate.toml, each entry for one check, up to one value, until one day."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from toolchain.errors import RecipeError
from toolchain.files import write_text
from toolchain.settings import Section, explain, read_toml, tuple_of

HEADER = """# Regressions that were accepted, written by `slimvit gate accept` and reviewed like code.
# An entry covers one check of one cell up to `at_most`, through the day `expires`; of several, the last one counts.
"""
NEVER = {"relation.parity": "a parity failure", "relation.features": "a failure of features"}
"""Checks that cannot be accepted → their name in messages; their bounds are in gate.toml."""
AcceptState = Literal["used", "unused", "exceeded", "undecided", "expired", "moved", "unknown"]
Key = tuple[str, str]
"""The names of a cell and of one of its checks."""


class Accept(Section):
    """[[accept]]: which check, up to which value (in the check's unit), why, since when, through which day.

    `against` and `workload` are what gives the value its meaning: see `Evidence.basis` and `Evidence.workload`. One that names
    nothing is of whatever there is.
    """

    cell: str
    check: Annotated[str, Field(pattern=r"^(budget|relation)\.[a-z_]+$")]
    at_most: Annotated[float, Field(ge=0)] | Annotated[int, Field(ge=0)]
    against: str | None = None
    workload: str | None = None
    reason: str
    accepted: dt.date
    expires: dt.date

    @model_validator(mode="after")
    def _is_reasoned_and_ends(self) -> Accept:
        if not self.reason.strip():
            raise ValueError(f"the accept of {self.check} in cell {self.cell!r} gives no reason")
        if self.check in NEVER:
            raise ValueError(f"{NEVER[self.check]} cannot be accepted; change {self.check} if the models may differ")
        if self.expires < self.accepted:
            raise ValueError(f"the accept of {self.check} in cell {self.cell!r} expires before it was accepted")
        return self

    @staticmethod
    def create(**values: Any) -> Accept:
        """The entry of these values; raises RecipeError for one that is not valid."""
        try:
            return Accept.model_validate(values)
        except ValidationError as error:
            raise RecipeError(explain(error, Accept, "accept")) from None

    def to_toml(self) -> str:
        """The entry as it stands in the file."""
        lines = ["[[accept]]", f"cell = {_string(self.cell)}", f"check = {_string(self.check)}"]
        lines += [f"at_most = {self.at_most!r}"]
        lines += [] if self.against is None else [f"against = {_string(self.against)}"]
        lines += [] if self.workload is None else [f"workload = {_string(self.workload)}"]
        lines += [f"reason = {_string(self.reason)}"]
        lines += [f"accepted = {self.accepted.isoformat()}", f"expires = {self.expires.isoformat()}"]
        return "\n".join(lines) + "\n"


class AcceptUse(Accept):
    """What came of an entry in one run of the gate."""

    state: AcceptState


class _AcceptFile(Section):
    accept: Annotated[tuple[Accept, ...], BeforeValidator(tuple_of)] = ()


def last_of_each(entries: Iterable[Accept]) -> dict[Key, Accept]:
    """(cell, check) → the entry that counts, which is the last one."""
    return {(entry.cell, entry.check): entry for entry in entries}


def accepts_path(gate: Path) -> Path:
    """gate.toml → gate.accepts.toml, beside it."""
    return gate.with_name(f"{gate.stem}.accepts.toml")


def load_accepts(gate: Path) -> tuple[Accept, ...]:
    """Every entry in the file beside a gate.toml, in the order written; none if there is no such file.

    Raises:
        StorageError: the file cannot be read.
        RecipeError: it is not TOML, or an entry is not valid.
    """
    path = accepts_path(gate)
    if not path.exists():
        return ()
    try:
        return _AcceptFile.model_validate(read_toml(path)).accept
    except ValidationError as error:
        raise RecipeError(f"{path}: {explain(error, _AcceptFile, 'accepts')}") from None


def add_accepts(gate: Path, entries: Sequence[Accept]) -> Path:
    """The file beside a gate.toml, after entries were appended to it; what stands in it already stays as it is.

    Raises:
        StorageError: the file cannot be read or written.
        RecipeError: what stands in it is not valid.
    """
    load_accepts(gate)
    path = accepts_path(gate)
    before = path.read_text(encoding="utf-8") if path.exists() else HEADER
    write_text(path, "\n".join([before.rstrip("\n") + "\n", *(entry.to_toml() for entry in entries)]))
    return path


def _string(text: str) -> str:
    """A TOML basic string: JSON's, but for the one control character that JSON lets through."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
