"""Writes build/pages, from which the site is built: the pages of docs/, what they link to, and the reference.

A page keeps its path, but that docs/ is the root of the site, and that a module of `toolchain` becomes the page of its
docstrings. No generator's hook is used, so that any generator that reads Markdown can build the site.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from os.path import normpath, relpath
from pathlib import Path

from toolchain.cli.schema import SCHEMAS

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "pages"
LINK = re.compile(r"(?P<before>\]\(|\b(?:src|href)=\")(?![a-z]+:|#|/)(?P<path>[^)#\"\s]+)(?=#|\)|\")")
ELSEWHERE = re.compile(r"!\[[^]]*\]\([a-z]+:[^)]*\)\n?")
"""Pictures of other hosts, such as badges: a reader of the site asks no one else for anything."""


def linked_files(root: Path = ROOT) -> set[Path]:
    """README.md, the files of docs/, and whatever in the repository `root` these link to, over any number of links."""
    found = {
        Path("README.md"),
        *(path.relative_to(root) for path in (root / "docs").rglob("*") if path.suffix != ".py"),
    }
    found = {path for path in found if (root / path).is_file()}
    waiting = [*found]
    while waiting:
        source = waiting.pop()
        if source.suffix == ".md":
            linked = {_target(source, match["path"]) for match in LINK.finditer((root / source).read_text())}
            fresh = {path for path in linked - found if ".." not in path.parts and (root / path).is_file()}
            found |= fresh
            waiting += fresh
    return found


def on_site(path: Path) -> Path:
    """Where the site has a file of the repository."""
    if path == Path("README.md"):
        return Path("index.md")
    if path.parts[0] == "toolchain" and path.suffix == ".py":
        return Path("reference", path).with_suffix(".md")
    return path.relative_to("docs") if path.parts[0] == "docs" else path


def page(source: Path, files: set[Path], root: Path = ROOT) -> str:
    """A page with its links as the site has them; what the site lacks, such as a folder, is named without a link."""
    if source.suffix == ".py":
        module = ".".join(source.with_suffix("").parts).removesuffix(".__init__")
        return f"# {module}\n\n::: {module}\n"

    def moved(match: re.Match[str]) -> str:
        target = _target(source, match["path"])
        to = on_site(target) if target in files else target
        return match["before"] + relpath(to, on_site(source).parent)

    text = (root / source).read_text()
    for name in {match["path"] for match in LINK.finditer(text) if _target(source, match["path"]) not in files}:
        text = re.sub(rf"!?\[([^]]*)\]\({re.escape(name)}(#[^)]*)?\)", r"\1", text)
    return LINK.sub(moved, ELSEWHERE.sub("", text))


def reference() -> dict[str, str]:
    """Pages that the program itself writes: its options, its schemas, and what `import toolchain` offers."""
    options = _printed("typer", "toolchain.cli", "utils", "docs", "--name", "slimvit")
    schemas = [f"## {name}\n\n```json\n{_printed('toolchain', 'schema', name)}```\n" for name in SCHEMAS]
    return {
        "reference/cli.md": options.replace("# `slimvit`", "# Every option", 1),
        "reference/schemas.md": "\n".join(["# JSON schemas\n\n`slimvit schema NAME` prints them.\n", *schemas]),
        "reference/toolchain.md": "# Python\n\n::: toolchain\n    options:\n      show_root_heading: false\n",
    }


def _target(source: Path, link: str) -> Path:
    return Path(normpath(source.parent / link))


def _printed(module: str, *words: str) -> str:
    """What a module prints when it is run."""
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def main() -> None:
    """Writes the folder anew."""
    shutil.rmtree(PAGES, ignore_errors=True)
    files = linked_files()
    for source in files:
        to = PAGES / on_site(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        if to.suffix == ".md":
            to.write_text(page(source, files))
        else:
            shutil.copyfile(ROOT / source, to)
    for name, text in reference().items():
        (PAGES / name).write_text(text)


if __name__ == "__main__":
    main()
