"""Runs side by side whose budgets speak of files: each stands by the file that was made for its budget."""

from __future__ import annotations

import pytest
from made_up_reports import a_report

from toolchain.compress.outcome import SizeBudget
from toolchain.report.record import Listed
from toolchain.report.several import DENSE_WEIGHTS, file_of, front, side_by_side


def limited(precision, size, wrong):
    """A report whose budget speaks of the file of a precision."""
    report = a_report()
    whole = next(row for row in report.artifacts if row.model == "compressed" and row.refused is None)
    row = whole.model_copy(
        update={"precision": precision, "bytes": size, "wrong": wrong, "total": 100, "error": None, "features": None}
    )
    budget = SizeBudget(
        precision=precision, requested=size, predicted=size, reachable=(1, size), rounding=0.0, bytes=size
    )
    others = tuple(each for each in report.artifacts if each.precision != precision or each.model == "dense")
    return report.model_copy(update={"artifacts": (*others, row), "size_budget": (budget,)})


def test_a_run_stands_by_the_file_that_its_budget_limits():
    report = limited("int4", 1000, 7)
    assert (file_of(report).precision, file_of(report).bytes, file_of(report).loss) == ("int4", 1000, 0.07)
    plain = a_report()
    assert (file_of(plain).precision, file_of(plain).bytes) == ("fp32", plain.compressed.bytes)


@pytest.mark.parametrize("change", ["several", "refused"])
def test_else_by_its_fp32_file(change):
    report = limited("int4", 1000, 7)
    (own,) = report.size_budget
    if change == "several":
        report = report.model_copy(update={"size_budget": (own, own.model_copy(update={"precision": "int8-qdq"}))})
    else:
        rows = [row.model_copy(update={"bytes": None}) if row.precision == "int4" else row for row in report.artifacts]
        report = report.model_copy(update={"artifacts": tuple(rows)})
    assert file_of(report).precision == "fp32"


def test_the_front_and_the_table_are_of_these_files():
    reports = {
        "small": limited("int4", 1000, 9),
        "large": limited("int8-dynamic", 2000, 5),
        "bad": limited("int4", 2500, 6),
    }
    assert front(reports).names == ("small", "large")
    table = side_by_side(reports).table
    assert table.header[3] == "ONNX"
    assert [row[3] for row in table.rows] == ["1.0 kB, int4", "2.0 kB, int8-dynamic", "2.5 kB, int4"]
    assert "9 of 100 wrong" in table.rows[0][4]
    assert side_by_side({"a": reports["small"], "b": reports["bad"]}).table.header[3] == "ONNX, int4"


def test_no_front_joins_errors_that_are_relative_to_different_models():
    """Half of one model's error may be more than the whole of another's; images that are wrong count alike for both."""

    def relative_to(digest, error):
        report = a_report()
        counts = {"accuracy": None, "wrong": None, "total": None, "error": error}
        rows = [row.model_copy(update=counts) for row in report.artifacts]
        compressed = report.compressed.model_copy(update=counts)
        dense = Listed(path=DENSE_WEIGHTS, bytes=1, sha256=digest)
        return report.model_copy(update={"artifacts": tuple(rows), "compressed": compressed, "files": (dense,)})

    assert front({"a": relative_to("1", 0.1), "b": relative_to("1", 0.2)}).names == ("a",)
    assert front({"a": relative_to("1", 0.1), "b": relative_to("2", 0.2)}).names == ()
    counted = a_report()
    other = counted.model_copy(update={"files": (Listed(path=DENSE_WEIGHTS, bytes=1, sha256="2"),)})
    assert front({"a": counted, "b": other}).names
