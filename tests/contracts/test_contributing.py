"""CONTRIBUTING keeps its word: every example runs and registers one object, and a file of a kind is named by its table alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from toolchain.artifacts import ARTIFACTS
from toolchain.compress.criteria import CRITERIA
from toolchain.compress.factorisations import FACTORISATIONS
from toolchain.export.precision import PRECISIONS
from toolchain.families import FAMILIES
from toolchain.report.sections import SECTIONS
from toolchain.surgery.huggingface import LAYOUTS
from toolchain.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
TABLES = {
    "LAYOUTS": LAYOUTS,
    "FAMILIES": FAMILIES,
    "CRITERIA": CRITERIA,
    "FACTORISATIONS": FACTORISATIONS,
    "PRECISIONS": PRECISIONS,
    "ARTIFACTS": ARTIFACTS,
    "TARGETS": TARGETS,
    "SECTIONS": SECTIONS,
}
# Files that are more than one entry: what others are built on. A floor is measured on two runtimes, each by its own runner.
SHARED = {"targets/ort.py", "targets/openvino_cpu.py", "families/vit.py", "families/eva.py"}


@pytest.fixture
def restored():
    before = {name: dict.fromkeys(table) for name, table in TABLES.items()}
    yield
    for name, table in TABLES.items():
        for entry in [entry for entry in table if entry not in before[name]]:
            table.discard(entry)


def test_every_table_has_its_row_and_its_example():
    rows = dict(re.findall(r"`([A-Z]+)`, `(slimvit\.\w+)` \|$", TEXT, re.MULTILINE))
    assert rows == {name: table.group for name, table in TABLES.items()}
    assert {name for name in TABLES if any(f"{name}.add(" in text for text in EXAMPLES)} == set(TABLES)


@pytest.mark.parametrize("text", EXAMPLES, ids=[re.findall(r"(\w+)\.add\(", text)[0] for text in EXAMPLES])
def test_an_example_registers_one_object_for_each_of_its_lines(text, restored):
    before = {name: set(table) for name, table in TABLES.items()}
    exec(compile(text, "CONTRIBUTING.md", "exec"), {"__name__": "example"})
    wanted = re.findall(r"^(\w+)\.add\(", text, re.MULTILINE)
    added = {name: set(table) - before[name] for name, table in TABLES.items()}
    assert {name: len(entries) for name, entries in added.items() if entries} == dict.fromkeys(wanted, 1)
    assert all(TABLES[name][entry].name == entry for name, entries in added.items() for entry in entries)


def entry_files():
    """Files below toolchain/ that hold one entry of a table each, beside the file of the table."""
    for folder, table in (("report/sections", "report/sections"), ("targets", "targets"), ("families", "families")):
        declared = (ROOT / "toolchain" / table / "__init__.py").read_text(encoding="utf-8")
        for path in sorted((ROOT / "toolchain" / folder).glob("*.py")):
            module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
            if f"{module}:" in declared or (folder == "report/sections" and f'"{path.stem}"' in declared):
                yield path, module
    for kind in ("tensorrt_engine", "openvino_ir", "mlpackage", "ncnn_model", "pte", "tflite"):
        yield ROOT / "toolchain/artifacts" / f"{kind}.py", f"toolchain.artifacts.{kind}"


@pytest.mark.parametrize(
    ("path", "module"),
    [each for each in entry_files() if str(each[0].relative_to(ROOT / "toolchain")) not in SHARED],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_other_file_names_the_file_of_an_entry(path, module):
    others = [each for each in (ROOT / "toolchain").rglob("*.py") if each not in (path, path.parent / "__init__.py")]
    naming = [each.name for each in others if re.search(rf"{re.escape(module)}\b", each.read_text(encoding="utf-8"))]
    assert naming == []
