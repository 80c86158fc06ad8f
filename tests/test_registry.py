"""A registry: entries by name, lazily, from here and from other packages; a broken package is named and breaks nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from toolchain.errors import RecipeError
from toolchain.registry import Registry


@dataclass(frozen=True)
class Entry:
    name: str
    of: str = "slimvit"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs a distribution that declares entry points of the group "test.entries"."""

    def install(**points):
        information = tmp_path / "other-1.dist-info"
        information.mkdir()
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
        lines = "".join(f"{name} = {place}\n" for name, place in points.items())
        (information / "entry_points.txt").write_text(f"[test.entries]\n{lines}")
        (tmp_path / "other_entries.py").write_text(
            "from dataclasses import dataclass\n\n@dataclass\nclass Entry:\n    name: str\n    of: str = 'other'\n\n"
            "THEIRS, ONE = Entry('theirs'), Entry('one')\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def registry(**entries):
    return Registry("entry", "test.entries", entries)


def test_entries_are_in_the_order_of_their_declaration_and_the_nearest_name_is_offered():
    entries = registry(one=Entry("one"), three=Entry("three"))
    entries.add(Entry("two"))
    assert list(entries) == ["one", "three", "two"]
    assert entries.require("three") is entries["three"]
    with pytest.raises(RecipeError, match=r"unknown entry 'thre'; did you mean 'three'\?"):
        entries.require("thre")
    entries.discard("three")
    assert "three" not in entries
    assert len(entries) == 2


def test_a_built_in_entry_is_imported_when_it_is_asked_for():
    entries = registry(missing="no_such_module:ENTRY")
    assert list(entries) == ["missing"]
    with pytest.raises(ModuleNotFoundError):
        entries["missing"]


def test_a_package_adds_entries_and_replaces_none_of_slimvits(package):
    package(theirs="other_entries:THEIRS", one="other_entries:ONE")
    entries = registry(one=Entry("one"))
    assert [(entry.name, entry.of) for entry in entries.values()] == [("one", "slimvit"), ("theirs", "other")]


def test_a_broken_package_is_named_and_the_others_stay(package):
    package(broken="no_such_module:ENTRY", theirs="other_entries:THEIRS")
    entries = registry(one=Entry("one"))
    assert entries["theirs"].of == "other"
    with pytest.raises(
        RecipeError, match=r"entry 'broken' cannot be loaded from no_such_module:ENTRY: ModuleNotFound.*[Rr]emove"
    ):
        entries["broken"]
