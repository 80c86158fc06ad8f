"""The pages of the site: no link of theirs leads to what the site lacks."""

from __future__ import annotations

from os.path import normpath
from pathlib import Path

from site_pages import LINK, ROOT, linked_files, on_site, page


def missing(files: set[Path], root: Path = ROOT) -> list[tuple[Path, str]]:
    """The pages and links that lead nowhere on a site of some files."""
    there = {on_site(path) for path in files}
    pages = [path for path in files if on_site(path).suffix == ".md"]
    return [
        (source, match["path"])
        for source in pages
        for match in LINK.finditer(page(source, files, root))
        if Path(normpath(on_site(source).parent / match["path"])) not in there
    ]


def test_every_link_of_every_page_is_on_the_site():
    files = linked_files()
    assert len(files) > 100
    assert missing(files) == []


def test_what_the_site_lacks_is_named_without_a_link(tmp_path: Path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("[a](docs/a.md#top) [b](b.md#top) [c](c) ![d](d.png) ![e](docs/e.png#x)")
    (tmp_path / "docs/a.md").write_text("[back](../README.md)")
    files = linked_files(tmp_path)
    assert page(Path("README.md"), files, tmp_path) == "[a](a.md#top) b c d e"
    assert page(Path("docs/a.md"), files, tmp_path) == "[back](index.md)"
    assert missing(files, tmp_path) == []
