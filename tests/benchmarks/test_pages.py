"""Pages follow from records alone, and the committed ones from the committed records."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import shutil

import pytest
import report
from benching import changed
from records import SUFFIX, Results, read_record
from suite import HERE, Suite
from sweeps import swept

from toolchain.errors import ArtifactError
from toolchain.measure.verify import verify

FILES = ["README.md", "increase.tiny.svg", "widths.tiny.svg", "pruned.tiny.svg"]
SUITES = sorted(path.stem for path in (HERE / "suites").glob("*.toml"))
CARRIED_OUT = [name for name in SUITES if (HERE / "results" / name).is_dir()]


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


@pytest.mark.slow
@pytest.mark.parametrize("name", swept(SUITES, {*SUITES} - {"validity", "paper", "speed"}))
def test_committed_pages_follow_from_the_committed_records(name):
    assert stale(Suite.load(HERE / "suites" / f"{name}.toml"), Results(HERE / "results")) == []


@pytest.mark.parametrize("name", CARRIED_OUT)
def test_every_committed_record_is_of_a_cell_or_beside_one(name):
    suite, results = Suite.load(HERE / "suites" / f"{name}.toml"), Results(HERE / "results")
    names = {cell.name for cell in suite.cells}
    for cell in suite.cells:
        names |= {record.cell for record in results.below(name, cell.name)}
    files = {path.name.removesuffix(SUFFIX) for path in (results.root / name / "records").iterdir()}
    assert files == names


@pytest.fixture
def written(suite, results) -> tuple[Suite, Results]:
    """The tiny suite with its pages, in a folder that a test may change."""
    assert stale(suite, results) == sorted(FILES, key=FILES.index)
    for name, text in report.regenerate(suite, results).items():
        (results.root / "tiny" / name).write_text(text)
    assert stale(suite, results) == []
    return suite, results


def test_that_check_notices_a_number_that_was_changed(written):
    suite, results = written
    page = results.root / "tiny" / "README.md"
    page.write_text(page.read_text().replace("50.00 %", "50.01 %", 1))
    assert stale(suite, results) == ["README.md"]


@pytest.mark.slow
def test_that_check_notices_figures_that_were_changed_forgotten_or_left_over(written):
    suite, results = written
    folder = results.root / "tiny"
    (folder / "widths.tiny.svg").unlink()
    (folder / "old.svg").write_text("<svg/>")
    figure = folder / "pruned.tiny.svg"
    figure.write_text(figure.read_text().replace("zeroed only", "cut", 1))
    assert set(stale(suite, results)) == {"widths.tiny.svg", "old.svg", "pruned.tiny.svg"}


@pytest.mark.slow
def test_a_figure_of_another_matplotlib_is_judged_by_its_numbers(written):
    suite, results = written
    figure = results.root / "tiny" / "increase.tiny.svg"
    other, count = DRAWN_BY.subn("<dc:title>matplotlib 3.8.0</dc:title>", figure.read_text())
    assert count == 1
    figure.write_text(other.replace("stroke-width", "stroke-Width"))
    assert stale(suite, results) == []
    figure.write_text(NUMBERS.sub("numbers 0123456789abcdef", other))
    assert stale(suite, results) == ["increase.tiny.svg"]


def test_the_same_records_give_the_same_bytes(suite, results):
    first, second = report.regenerate(suite, results), report.regenerate(suite, results)
    assert first == second
    assert list(first) == FILES
    assert not [name for name, text in first.items() if name.endswith(".svg") and "<dc:date>" in text]


def test_the_page_says_what_was_recorded(suite, results):
    page = report.regenerate(suite, results)["README.md"]
    dense, joint = (results.read("tiny", f"{row}.zero.tiny_s0").result for row in ("dense", "joint.params0.5"))
    line = next(line for line in page.splitlines() if line.startswith("| `joint.params0.5` | zero"))
    increase = joint["test"]["wrong"] / dense["test"]["wrong"] - 1
    assert f"{100 * increase:+.2f} %" in line
    assert f"{100 * (1 - joint['test']['wrong'] / joint['test']['total']):.2f} %" in line
    assert f"{100 * joint['params'] / joint['dense']['params']:.2f} %" in line
    assert "taken" in page
    assert "zeroed only" in page  # VTP's gates on what cannot be cut
    assert "have not been measured" not in page


def test_a_page_says_the_instruction_set_where_the_record_knows_it(suite, results):
    assert "AVX2" in report.regenerate(suite, results)["README.md"].split("Measured on: ")[1]
    for record in list(results.all()):
        results.save(dataclasses.replace(record, machine={**record.machine, "flags": None}))
    where = report.regenerate(suite, results)["README.md"].split("Measured on: ")[1]
    assert "AVX2" not in where
    assert " with " not in where


def test_a_missing_cell_is_told(suite, results):
    results.path("tiny", "sweep-lr.lr0.001.recovered.tiny_s0").unlink()
    page = report.regenerate(suite, results)["README.md"]
    assert "1 of 6 cells have not been measured" in page
    assert "(not complete)" in page
    assert "taken" not in page


def test_bits_that_do_not_fit_their_count_stop_the_report(suite, results):
    record = results.read("tiny", "dense.zero.tiny_s0")
    test = {**record.result["test"], "wrong": record.result["test"]["wrong"] + 1}
    results.save(changed(record, test=test))
    with pytest.raises(ValueError, match="the bits say"):
        report.regenerate(suite, results)


@pytest.mark.parametrize("name", swept(["speed", "floor", "targets"], {"targets"}))
def test_a_recorded_statistic_that_does_not_follow_from_its_samples_stops_the_report(name, tmp_path):
    suite, results = Suite.load(HERE / "suites" / f"{name}.toml"), Results(tmp_path)
    shutil.copytree(HERE / "results" / name, tmp_path / name)
    record = next(each for each in results.all() if "tau_min" in each.result)
    results.save(changed(record, tau_min=record.result["tau_min"] * 1.01))
    with pytest.raises(ArtifactError, match="tau_min"):
        report.regenerate(suite, results)


def test_a_page_that_is_none_is_refused(suite_file, tmp_path, capsys):
    suite_file.write_text('page = "accurcy"\n' + suite_file.read_text())
    assert report.main([str(suite_file)], tmp_path / "results") == 2
    assert "there is no page 'accurcy': benchmarks/pages has no file accurcy.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path",
    [
        "speed/records/tiny.dense-fp32--joint50-fp32.ort-cpu.b1.t1",
        "latency/records/dense--joint.params0.5",
        "floor/records/base.dense-fp32--joint50-fp32.ort-cpu.b1.t1",
        "targets/records/deit_small.ort-cpu.int8-qdq.b1.t1",
    ],
)
def test_bench_verify_reads_a_compressed_record_as_it_reads_json(path, tmp_path):
    file = HERE / "results" / f"{path}{SUFFIX}"
    result = read_record(file).result
    found = verify(file)
    assert found.to_dict()["tau_min"] == pytest.approx(result["tau_min"])
    edited = tmp_path / f"edited{SUFFIX}"
    stored = json.loads(gzip.decompress(file.read_bytes()))
    stored["result"]["tau_min"] *= 1.01
    edited.write_bytes(gzip.compress(json.dumps(stored).encode()))
    with pytest.raises(ArtifactError, match="tau_min"):
        verify(edited)
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps(result))
    assert verify(plain) == found


def test_bench_verify_says_what_it_cannot_verify():
    with pytest.raises(ArtifactError, match="has schema 'none'"):
        verify(HERE / "results" / "paper" / "records" / f"dense.zero.fm17_s0{SUFFIX}")
