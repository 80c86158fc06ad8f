"""Pushes the files of a repository, without touching files that others wrote there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from toolchain.errors import StorageError
from toolchain.publish.content import Content, Digests

RECEIPT = "slimvit.json"
"""The file of a repository that says which of its files slimvit wrote."""


class Destination(Protocol):
    """The place that a repository's files are written to: a hub, or a folder."""

    @property
    def name(self) -> str:
        """Its name in messages."""
        ...

    def there(self) -> Mapping[str, Digests]:
        """Path → digests of every file that is there; nothing where the repository is still to be made. Raises StorageError."""
        ...

    def read(self, path: str) -> bytes:
        """The bytes of a file that is there; raises StorageError."""
        ...

    def write(self, files: Mapping[str, Content], gone: Sequence[str], message: str) -> str:
        """Writes files and removes others, all or none where the place can; returns where to look. Raises StorageError."""
        ...


class Receipt(BaseModel):
    """The content of slimvit.json."""

    model_config = ConfigDict(populate_by_name=True)

    schema_: Literal["slimvit.pushed/1"] = Field("slimvit.pushed/1", alias="schema")
    tool: str
    files: dict[str, Digests]


@dataclass(frozen=True)
class Pushed:
    """The outcome of a push.

    Attributes:
        url: where to look.
        written: paths that are new or have other bytes than before.
        unchanged: paths that were there as they are.
        removed: paths of an earlier push that belong to the repository no longer.
    """

    url: str
    written: tuple[str, ...]
    unchanged: tuple[str, ...]
    removed: tuple[str, ...]


@dataclass(frozen=True)
class Before:
    """What a place holds before a push.

    Attributes:
        there: path → digests of every file.
        own: paths of an earlier push that are as it wrote them.
        same: paths of files that are to be pushed, and are there as they are.
    """

    there: Mapping[str, Digests]
    own: frozenset[str]
    same: frozenset[str]


def before(files: Mapping[str, Content], destination: Destination, *, overwrite: bool = False) -> Before:
    """What a place holds; the arguments and errors are those of `push`, and nothing is written."""
    there = destination.there()
    receipt = _receipt(destination) if RECEIPT in there else None
    listed = receipt.files if receipt is not None else {}
    own = frozenset(path for path, digests in listed.items() if path in there and digests.same(there[path]))
    same = frozenset(path for path, content in files.items() if path in there and content.digests.same(there[path]))
    foreign = sorted(set(files) & set(there) - own - same)
    if RECEIPT in there and receipt is None:
        foreign.append(RECEIPT)
    if foreign and not overwrite:
        names = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise StorageError(
            f"{destination.name} holds {names}, which slimvit did not write or which {'was' if len(foreign) == 1 else 'were'} "
            "changed since: choose another repository or revision, or pass --overwrite to replace"
        )
    return Before(there, own, same)


def push(
    files: Mapping[str, Content], destination: Destination, *, tool: str, message: str, overwrite: bool = False
) -> Pushed:
    """Brings files to a place.

    Files that are there and neither the same nor of an earlier push are foreign, and so are those of one that were changed
    since, such as a card that someone edited. Files of others that happen to be the same stay theirs: the receipt lists what
    was written now or before, so that no later push removes them.

    Args:
        files: path → content.
        destination: the place.
        tool: name and version of this program.
        message: of the commit.
        overwrite: whether foreign files are replaced.

    Raises:
        StorageError: the place cannot be read or written, or holds foreign files.
    """
    held = before(files, destination, overwrite=overwrite)
    removed = sorted(held.own - set(files))
    fresh = {path: content for path, content in files.items() if path not in held.same}
    receipt = Receipt(
        tool=tool, files={path: files[path].digests for path in files if path in fresh or path in held.own}
    )
    said = Content.of_text(json.dumps(receipt.model_dump(mode="json", by_alias=True), indent=2) + "\n")
    if RECEIPT not in held.there or not said.digests.same(held.there[RECEIPT]):
        fresh[RECEIPT] = said
    url = destination.write(fresh, removed, message)
    return Pushed(url, tuple(sorted(fresh)), tuple(sorted(held.same)), tuple(removed))


def _receipt(destination: Destination) -> Receipt | None:
    """What an earlier push left there; None where that file is of someone else."""
    try:
        return Receipt.model_validate_json(destination.read(RECEIPT))
    except ValidationError:
        return None
