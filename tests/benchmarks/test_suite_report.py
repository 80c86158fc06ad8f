from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import report
from records import Results
from suite import Suite

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FILES = ["README.md", "increase.tiny.svg", "widths.tiny.svg", "pruned.tiny.svg"]
SUITES = sorted(path.stem for path in (BENCHMARKS / "suites").glob("*.toml"))


DRAWN_BY = re.compile(r"<dc:title>(matplotlib [^<]*)</dc:title>")
NUMBERS = re.compile(r"numbers ([0-9a-f]{16})")


def same(name: str, written: str, wanted: str) -> bool:
    """Whether two files say the same: byte for byte, or where another matplotlib drew them, by the numbers in them."""
    if written == wanted or not name.endswith(".svg"):
        return written == wanted
    drawn_by, numbers = ([pattern.findall(text) for text in (written, wanted)] for pattern in (DRAWN_BY, NUMBERS))
    return drawn_by[0] != drawn_by[1] and len(numbers[0]) == 1 and numbers[0] == numbers[1]


def stale(suite: Suite, results: Results) -> list[str]:
    """The committed pages and figures that do not follow from the committed cells, missing and needless ones too."""
    wanted, folder = report.regenerate(suite, results), results.root / suite.name
    there = {path.name: path.read_text() for path in sorted(folder.glob("*")) if path.suffix in (".md", ".svg")}
    names = dict.fromkeys((*wanted, *there))
    return [n for n in names if n not in there or n not in wanted or not same(n, there[n], wanted[n])]


@pytest.mark.parametrize("name", SUITES)
def test_committed_tables_follow_from_the_committed_cells(name):
    assert stale(Suite.load(BENCHMARKS / "suites" / f"{name}.toml"), Results(BENCHMARKS / "results")) == []


@pytest.fixture
def copied(measured, tmp_path) -> tuple[Suite, Results]:
    """The measured tiny suite with its pages, in a folder that a test may change."""
    suite, results = Suite.load(measured / "tiny.toml"), Results(tmp_path / "results")
    shutil.copytree(measured / "results", results.root)
    assert stale(suite, results) == sorted(FILES, key=FILES.index)
    for name, text in report.regenerate(suite, results).items():
        (results.root / "tiny" / name).write_text(text)
    assert stale(suite, results) == []
    return suite, results


def test_that_check_notices_a_number_that_was_changed(copied):
    suite, results = copied
    page = results.root / "tiny" / "README.md"
    page.write_text(page.read_text().replace("50.00 %", "50.01 %", 1))
    assert stale(suite, results) == ["README.md"]


def test_that_check_notices_figures_that_were_changed_forgotten_or_left_over(copied):
    suite, results = copied
    folder = results.root / "tiny"
    (folder / "widths.tiny.svg").unlink()
    (folder / "old.svg").write_text("<svg/>")
    figure = folder / "pruned.tiny.svg"
    figure.write_text(figure.read_text().replace("zeroed only", "cut", 1))
    assert set(stale(suite, results)) == {"widths.tiny.svg", "old.svg", "pruned.tiny.svg"}


def test_a_figure_of_another_matplotlib_is_judged_by_its_numbers(copied):
    suite, results = copied
    figure = results.root / "tiny" / "increase.tiny.svg"
    other, changed = DRAWN_BY.subn("<dc:title>matplotlib 3.8.0</dc:title>", figure.read_text())
    assert changed == 1
    figure.write_text(other.replace("stroke-width", "stroke-Width"))
    assert stale(suite, results) == []
    figure.write_text(NUMBERS.sub("numbers 0123456789abcdef", other))
    assert stale(suite, results) == ["increase.tiny.svg"]


def test_the_same_records_give_the_same_bytes(measured):
    suite, results = Suite.load(measured / "tiny.toml"), Results(measured / "results")
    first, second = report.regenerate(suite, results), report.regenerate(suite, results)
    assert first == second
    assert list(first) == FILES
    assert not [name for name, text in first.items() if name.endswith(".svg") and "<dc:date>" in text]


def test_the_page_says_what_was_recorded(measured):
    suite, results = Suite.load(measured / "tiny.toml"), Results(measured / "results")
    page = report.regenerate(suite, results)["README.md"]
    dense, joint = (results.read("tiny", f"{row}.zero.tiny_s0") for row in ("dense", "joint.params0.5"))
    line = next(line for line in page.splitlines() if line.startswith("| `joint.params0.5` | zero"))
    increase = joint["test"]["wrong"] / dense["test"]["wrong"] - 1
    assert f"{100 * increase:+.2f} %" in line
    assert f"{100 * (1 - joint['test']['wrong'] / joint['test']['total']):.2f} %" in line
    assert f"{100 * joint['params'] / joint['dense']['params']:.2f} %" in line
    assert "taken" in page
    assert "zeroed only" in page  # VTP's gates on what cannot be cut
    assert "have not been measured" not in page


def test_a_missing_cell_is_told(measured, tmp_path):
    results = Results(tmp_path / "results")
    shutil.copytree(measured / "results", results.root)
    suite = Suite.load(measured / "tiny.toml")
    results.path("tiny", "sweep-lr.lr0.001.recovered.tiny_s0").unlink()
    page = report.regenerate(suite, results)["README.md"]
    assert "1 of 6 cells have not been measured" in page
    assert "(not complete)" in page
    assert "taken" not in page


def test_bits_that_do_not_fit_their_count_stop_the_report(measured, tmp_path):
    results = Results(tmp_path / "results")
    shutil.copytree(measured / "results", results.root)
    path = results.path("tiny", "dense.zero.tiny_s0")
    record = json.loads(path.read_text())
    record["test"]["wrong"] += 1
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="the bits say"):
        report.regenerate(Suite.load(measured / "tiny.toml"), results)
