"""Writes the map of `toolchain/` into docs/architecture.md: floors from the import contract, files from their docstrings.

python docs/architecture_map.py     (make docs)
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
START, END = "<!-- map: written by `make docs` from the first sentence of each file -->\n", "<!-- end of the map -->\n"


def floors() -> list[list[Path]]:
    """The files and folders of each floor, from the top down, as the import contract has them; what it leaves out comes first."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ][0]
    known = [[_place(name.strip()) for name in layer.split("|")] for layer in contract["layers"]]
    named = {path for floor in known for path in floor}
    package = ROOT / contract["layers"][0].split(".")[0]
    modules = (path for path in sorted(package.iterdir()) if path.suffix == ".py" or (path / "__init__.py").is_file())
    return [[path for path in modules if path not in named], *known]


def _place(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path if path.is_dir() else path.with_suffix(".py")


def sentence(path: Path) -> str:
    """The first paragraph of a file's docstring, in one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def _files(place: Path) -> list[Path]:
    return [place] if place.is_file() else sorted(path for path in place.rglob("*.py") if path.name != "__init__.py")


def lines() -> Iterator[str]:
    """The map: a table for each floor."""
    for floor in floors():
        folders = [place for place in floor if place.is_dir()]
        title = ", ".join(f"`{place.name}{'/' if place.is_dir() else ''}`" for place in floor)
        yield f"\n### {title}\n\n"
        for folder in folders:
            yield f"`{folder.name}/`: {sentence(folder / '__init__.py')}\n\n"
        yield "| file | |\n|---|---|\n"
        for path in (path for place in floor for path in _files(place)):
            name = path.relative_to(ROOT / "toolchain").as_posix()
            yield f"| [{name}](../toolchain/{name}) | {sentence(path).replace('|', chr(92) + '|')} |\n"


def page(text: str) -> str:
    """The page with today's map in it."""
    before, _, rest = text.partition(START)
    return before + START + "".join(lines()) + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
