"""Budgets of bytes: what is recorded of real runs of a tiny model, and the page that follows from it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from benching import TINY, carry_out, changed
from kinds.compression import pack, unpack
from pages.sizes import alike, more, page, total
from records import Results
from suite import HERE, Suite

from toolchain.errors import ArtifactError, RecipeError
from toolchain.training.evaluate import Accuracy

pytestmark = pytest.mark.slow

REFERENCE = TINY[TINY.index("[references.tiny]") : TINY.index("[recovery]")]
CELLS = """\
[[cells]]
reference = "tiny"
sizes = ["90KB", "1%"]
precisions = ["int8-dynamic"]
calibration_images = 64
"""
HEAD = 'title = "Sizes"\nkind = "sizes"\npage = "sizes"\n'


def packed(right):
    """Which images were right, as a record has it."""
    return pack(Accuracy(torch.from_numpy(right).long(), torch.ones(len(right), dtype=torch.long)))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(the suite, its results), carried out."""
    path = tmp_path_factory.mktemp("sizes") / "small.toml"
    path.write_text(HEAD + REFERENCE + CELLS)
    assert carry_out(path) == 0
    return Suite.load(path), Results(path.parent / "results")


@pytest.fixture
def results(measured, tmp_path):
    """A copy of the results that a test may change."""
    suite, whole = measured
    copied = Results(tmp_path / "results")
    for cell in suite.cells:
        copied.save(whole.read(suite.name, cell.name))
    return copied


def test_each_budget_is_met_by_a_file_or_recorded_with_what_the_tool_says(measured):
    suite, results = measured
    records = {cell: results.read("small", cell.name) for cell in suite.cells}
    assert [cell.name for cell in records] == [
        f"{precision}.{size}.tiny_s0" for size in ("90KB", "1pct") for precision in ("int8-dynamic", "any")
    ]
    for cell, record in records.items():
        assert bool(record.result["out_of_reach"]) == (cell.size == "1%")
        if cell.size == "1%":
            assert "reachable is" in record.result["out_of_reach"]
            continue
        result = record.result
        assert result["reachable"][0] <= result["bytes"] <= result["budget"] == 90_000
        assert result["bytes"] == pytest.approx(result["predicted"], rel=0.05)
        assert result["damage"]["rounding"] >= 0
        assert result["params"] <= result["dense"]["params"]
        row = next(
            r for r in result["artifacts"] if (r["model"], r["precision"]) == ("compressed", result["precision"])
        )
        assert (~unpack(result["test"])).sum() == row["wrong"]


def test_any_takes_the_precision_of_least_predicted_damage(measured):
    _, results = measured
    named, free = (results.read("small", f"{precision}.90KB.tiny_s0") for precision in ("int8-dynamic", "any"))
    assert free.result["precision"] in ("fp32", "int8-dynamic")
    assert total(free) <= total(named)
    if free.result["precision"] == "int8-dynamic":
        assert np.array_equal(unpack(free.result["test"]), unpack(named.result["test"]))


def test_what_is_recorded_is_not_carried_out_again_and_a_record_knows_its_weights(measured):
    suite, results = measured
    before = list(results.all())
    assert carry_out(suite.path) == 0
    assert list(results.all()) == before


def test_the_page_tells_files_budgets_and_what_is_out_of_reach(measured):
    suite, results = measured
    text = page(suite, results)["README.md"]
    record = results.read("small", "int8-dynamic.90KB.tiny_s0")
    assert f"{record.result['bytes']:,} of 90,000" in text
    assert f"{record.result['test']['wrong']} of {record.result['test']['total']:,}" in text
    assert "None of 2 files has more bytes than its budget" in text
    assert text.count("reachable is") == 2
    assert "have not been measured" not in text


def test_a_line_is_drawn_where_a_precision_has_files_of_several_budgets(measured, results):
    suite, _ = measured
    assert set(page(suite, results)) == {"README.md"}
    record = results.read("small", "int8-dynamic.90KB.tiny_s0")
    results.save(dataclasses.replace(changed(record, bytes=80_000), cell="int8-dynamic.1pct.tiny_s0"))
    files = page(suite, results)
    assert set(files) == {"README.md", "errors.svg"}
    assert "](errors.svg)" in files["README.md"]
    assert ">int8-dynamic<" in files["errors.svg"]


def test_a_file_above_its_budget_stops_the_page(measured, results):
    suite, _ = measured
    record = results.read("small", "any.90KB.tiny_s0")
    results.save(changed(record, bytes=90_001))
    with pytest.raises(ArtifactError, match=r"any\.90KB\.tiny_s0: the file has 90,001 bytes"):
        page(suite, results)


def test_a_difference_from_the_best_file_is_told_with_its_interval(measured, results):
    suite, _ = measured
    named, free = (results.read("small", f"{precision}.90KB.tiny_s0") for precision in ("int8-dynamic", "any"))
    right = unpack(named.result["test"])

    def said(lost: int) -> str:
        fewer = right.copy()
        fewer[np.flatnonzero(right)[:lost]] = False
        results.save(changed(free, test=packed(fewer)))
        return page(suite, results)["README.md"]

    assert "At 1 of 1 budgets no other file errs less than the one that `any` gives." in said(0)
    assert "At 0 of 1 budgets no other file errs less than the one that `any` gives, at 1 the difference" in said(1)
    assert "At 0 of 1 budgets no other file errs less than the one that `any` gives, at 1 it is not." in said(50)


def test_a_page_names_the_cells_that_are_missing(measured, results):
    suite, _ = measured
    results.path("small", "any.90KB.tiny_s0").unlink()
    text = page(suite, results)["README.md"]
    assert "1 of 4 cells have not been measured. They are any.90KB.tiny_s0." in text


def test_a_group_of_an_unknown_model_is_refused(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(HEAD + REFERENCE + CELLS.replace('"tiny"', '"huge"'))
    with pytest.raises(RecipeError, match="no reference 'huge'; known: tiny"):
        Suite.load(path)


def test_what_is_claimed_of_any_is_what_was_recorded():
    """No file has more bytes than its budget, and none errs less than that of `any` by more than noise."""
    suite, results = Suite.load(HERE / "suites" / "sizes.toml"), Results(HERE / "results")
    every = {cell: record for cell in suite.cells if (record := results.read(suite.name, cell.name)) is not None}
    known = {cell: record for cell, record in every.items() if not record.result["out_of_reach"]}
    assert known
    for cell, record in known.items():
        others, free = alike(cell, known)
        assert record.result["bytes"] <= record.result["budget"]
        if free is not None and cell in others:
            apart = more(record, free)
            assert apart.point >= 0 or not apart.excludes_zero, cell.name
            assert total(free) <= total(record)
