"""Several variants of a recipe: which they are, what they share, and what is said of them side by side."""

from __future__ import annotations

import json
import re
import shlex
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, strategies
from made_up_reports import a_report, figures, timed
from recipes import tiny_recipe

from toolchain.data import open_source
from toolchain.data.transforms import Wanted
from toolchain.errors import BudgetError, FolderBusy, RecipeError, StorageError, TargetUnavailable
from toolchain.files import read_json, write_json, write_text
from toolchain.model import Made
from toolchain.pipeline import folder
from toolchain.pipeline.folder import Nothing, Workspace
from toolchain.pipeline.run import run
from toolchain.pipeline.sweep import sweep, variants
from toolchain.report.record import Data, Report
from toolchain.report.several import front, side_by_side

RECIPE = tiny_recipe("[train]\nepochs = 1\n[budget]\nparams = 0.5\n")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def report(params, wrong, **changes):
    return a_report().model_copy(update={"compressed": figures(params, wrong), **changes})


def alone(variant, folder, folders):
    return run(variant.recipe, folder, others=folders)


# Which variants there are


def test_every_combination_is_a_variant(recipe):
    settings = [
        "budget.params=0.7,0.5",
        "compress.method=joint, hybrid",
        "export.opset=20",
        'bench.targets=["ort-cpu", "eager"]',
    ]
    grid = variants(recipe, settings)
    assert [each.name for each in grid] == [
        "params-0.7_method-joint",
        "params-0.7_method-hybrid",
        "params-0.5_method-joint",
        "params-0.5_method-hybrid",
    ]
    assert {(each.recipe.budget.params, each.recipe.compress.method) for each in grid} == {
        (params, method) for params in (0.7, 0.5) for method in ("joint", "hybrid")
    }
    assert all(each.recipe.bench.targets == ("ort-cpu", "eager") and each.recipe.export.opset == 20 for each in grid)


def test_the_first_command_of_the_page_builds_nothing_where_the_page_says_so():
    page = (ROOT / "docs" / "sweep.md").read_text(encoding="utf-8")
    words = shlex.split(page.partition("```sh\n")[2].partition("\n")[0])
    settings = [value for option, value in pairwise(words) if option == "--set"]
    assert all(each.recipe.engine.targets == ("trt-rtx",) for each in variants(ROOT / words[2], settings))
    assert "takes `pip install 'slimvit[trt-rtx]'`" in page
    without = re.search(r"with `--set '(\S+)'` none is built", page)[1]
    assert all(each.recipe.engine.targets == () for each in variants(ROOT / words[2], [*settings, without]))


def test_settings_that_end_alike_have_their_whole_names(recipe):
    names = [each.name for each in variants(recipe, ["train.epochs=1,2", "finetune.epochs=0,3"])]
    assert names[0] == "train-epochs-1_finetune-epochs-0"
    assert len(set(names)) == 4


def test_values_that_differ_in_what_names_leave_out_or_are_long_have_folders_of_their_own(recipe):
    names = [each.name for each in variants(recipe, ["data.source=images:é/a,images:ü/a,images:" + "/b" * 300])]
    assert re.fullmatch(r"source-images-a-[0-9a-f]{8}", names[0])
    assert re.fullmatch(r"source-images-a-[0-9a-f]{8}", names[1])
    again = [each.name for each in variants(recipe, ["data.source=images:ü/a,images:é/a"])]
    assert again == [names[1], names[0]], "their order changes no folder"
    assert re.fullmatch(r"source-images(-b)+--?[0-9a-f]{8}", names[2])
    assert len(names[2]) < 255


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["budget.params=0.5"], "nothing is varied"),
        ([], "nothing is varied"),
        (["budget.params=0.5,0.5"], "give each value once"),
        (
            ["budget.params=0.5,0.50"],
            r"two combinations of --set give the same recipe \(params-0.50\); give each value once",
        ),
        (["budget.params"], "not of the form"),
        (["budget.params=0.7,0.5", "budget.params=0.3"], "budget.params is given twice"),
        (["export.precisions=fp32,int4"], r'export.precisions is a list: write \["fp32"\]'),
        (["budget.params=0.5,1.5"], "above 0 and at most 1"),
        (["budgets.params=0.5,0.4"], "budgets"),
    ],
)
def test_what_is_no_grid_is_refused(recipe, settings, words):
    with pytest.raises(RecipeError, match=words):
        variants(recipe, settings)


# What they share


def test_a_stage_of_the_same_key_is_taken_over_and_not_done_again(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    done = []

    def work(root):
        def write():
            done.append(root.name)
            write_text(
                root / "dense" / "x.txt", root.name
            )  # as every stage writes: in place of what is there, never into it
            return Made((root / "dense",), Nothing())

        return write

    with Workspace(first).open() as space:
        space.step("one", "key", Nothing, work(first))
    with Workspace(second, others=[first, second]).open() as space:
        assert space.step("one", "key", Nothing, work(second)).reused
        assert not space.step("two", "key", Nothing, work(second)).reused  # it wrote over what was taken over
    assert done == ["a", "b"]
    assert [(root / "dense" / "x.txt").read_text() for root in (first, second)] == ["a", "b"]


def test_a_take_over_that_breaks_off_leaves_nothing_of_it(tmp_path, monkeypatch):
    first, second = tmp_path / "a", tmp_path / "b"
    names = ("engines/e/a.bin", "engines/e/engine.json", "engines/e/z.bin")

    def work(root):
        for name in names:
            write_text(root / name, name)
        return Made((root / "engines" / "e",), Nothing())

    with Workspace(first).open() as space:
        space.step("one", "key", Nothing, lambda: work(first))
    put, seen = folder._put, []

    def breaks(source, to):
        seen.append(to.name)
        if to.name == "z.bin":
            raise FileNotFoundError(source)
        put(source, to)

    monkeypatch.setattr(folder, "_put", breaks)
    with Workspace(second, others=[first]).open() as space:
        assert space.recorded("one", "key", Nothing) is None
    assert seen == ["engine.json", "a.bin", "z.bin"], "a folder without its record belongs to nobody"
    assert not [path for path in (second / "engines").rglob("*") if path.is_file()]


def test_a_run_that_another_process_is_at_is_refused_before_anything_is_read(recipe, tmp_path):
    (variant, _) = variants(recipe, ["budget.params=0.6,0.5"])
    with Workspace(tmp_path / "run").open(), pytest.raises(FolderBusy):
        run(
            variant.recipe.model_copy(update={"model": variant.recipe.model.model_copy(update={"name": "no"})}),
            tmp_path / "run",
        )


def test_what_was_altered_in_the_other_run_is_not_taken_over(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"

    def work(root):
        (root / "x.txt").write_text("content")
        return Made((root / "x.txt",), Nothing())

    with Workspace(first).open() as space:
        space.step("one", "key", Nothing, lambda: work(first))
    (first / "x.txt").write_text("altered")
    with Workspace(second, others=[first]).open() as space:
        assert not space.step("one", "key", Nothing, lambda: work(second)).reused
    assert (second / "x.txt").read_text() == "content"


@pytest.mark.slow
def test_runs_that_differ_in_their_budget_share_training_and_damage_and_give_what_they_give_alone(recipe, tmp_path):
    grid = variants(recipe, ["budget.params=0.6,0.5"])
    outcome = sweep(grid, tmp_path / "out", alone)
    assert [*outcome.reports] == ["params-0.6", "params-0.5"]
    left = [each.ratio.params for each in outcome.reports.values()]
    assert left[0] > left[1]
    records = [read_json(tmp_path / "out" / variant.name / ".slimvit" / "weigh.json") for variant in grid]
    assert records[0] == records[1]
    plain = alone(grid[1], tmp_path / "alone", ())
    assert plain.compressed == outcome.reports["params-0.5"].compressed
    plans = [(tmp_path / folder / "plan.json").read_bytes() for folder in ("alone", "out/params-0.5")]
    assert plans[0] == plans[1]
    found = read_json(tmp_path / "out" / "sweep.json")
    assert [(each["name"], each["compressed"]["params"]) for each in found["runs"]] == [
        (name, each.compressed.params) for name, each in outcome.reports.items()
    ]
    again = sweep(grid, tmp_path / "out", alone)
    assert again.reports == outcome.reports


def test_another_process_that_does_a_stage_is_waited_for(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    started, times = threading.Event(), []

    def slow():
        times.append("a")
        started.set()
        threading.Event().wait(0.5)
        (first / "x.txt").write_text("x")
        return Made((first / "x.txt",), Nothing())

    def run_first():
        with Workspace(first, others=[second]).open() as space:
            space.step("one", "key", Nothing, slow)

    thread = threading.Thread(target=run_first)
    thread.start()
    started.wait(10)
    with Workspace(second, others=[first]).open() as space:
        assert space.step("one", "key", Nothing, lambda: times.append("b")).reused
    thread.join()
    assert times == ["a"]


# What comes of it


def test_a_variant_that_fails_ends_alone_and_one_that_is_busy_is_waited_for(recipe, tmp_path):
    grid, asked = variants(recipe, ["budget.params=0.7,0.5,0.001"]), []

    def carry_out(variant, folder, folders):
        asked.append(variant.name)
        assert folder in folders
        assert len(folders) == 3
        if variant.name == "params-0.001":
            raise BudgetError("out of reach")
        if variant.name == "params-0.7" and asked.count(variant.name) < 3:
            raise FolderBusy("another process is at it")
        return report(1000, 20)

    outcome = sweep(grid, tmp_path, carry_out, wait_s=0.0)
    assert [*outcome.reports] == ["params-0.7", "params-0.5"]
    assert {name: str(error) for name, error in outcome.failed.items()} == {"params-0.001": "out of reach"}
    assert asked == ["params-0.7", "params-0.5", "params-0.001", "params-0.7", "params-0.7"]
    assert read_json(tmp_path / "sweep.json")["failed"] == {"params-0.001": "out of reach"}
    for name in ("sweep.md", "sweep.html"):
        assert "params-0.001 has no report: out of reach" in (tmp_path / name).read_text()


def test_a_folder_that_cannot_be_written_ends_the_sweep(recipe, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(StorageError, match="is not a folder"):
        sweep(variants(recipe, ["budget.params=0.7,0.5"]), tmp_path / "out", alone)


def test_a_folder_of_runs_is_told_from_a_run(tmp_path):
    write_json(tmp_path / "a" / "report.json", {})
    with pytest.raises(StorageError, match=r"it has no report.json; runs lie in it, so give .*/a$"):
        Report.load(tmp_path)


def test_a_run_that_lost_a_device_keeps_its_report(recipe, tmp_path):
    grid = variants(recipe, ["budget.params=0.7,0.5"])

    def carry_out(variant, folder, _):
        found = report(1000, 20, recipe_digest=variant.recipe.digest)
        write_json(folder / "report.json", found.to_dict())
        if variant.name == "params-0.5":
            raise TargetUnavailable("board", "it dropped off")
        return found

    outcome = sweep(grid, tmp_path, carry_out)
    assert [*outcome.reports] == ["params-0.7", "params-0.5"]
    text = (tmp_path / "sweep.md").read_text()
    assert "params-0.5: target 'board' is unavailable: it dropped off" in text
    assert "has no report" not in text


@given(
    strategies.lists(strategies.tuples(strategies.integers(1, 50), strategies.integers(0, 50)), min_size=1, max_size=12)
)
def test_the_front_is_what_no_other_run_beats(points):
    reports = {f"r{index}": report(params, wrong) for index, (params, wrong) in enumerate(points)}
    best = front(reports)
    assert best.names
    where = dict(zip(reports, points, strict=True))
    for name, (params, wrong) in where.items():
        beaten = any(other[0] <= params and other[1] <= wrong and other != (params, wrong) for other in where.values())
        assert beaten != (name in best.names)
    assert best.knee is None or best.knee in best.names[1:-1]


def test_the_knee_is_where_the_front_bends_most():
    reports = {
        name: report(params, wrong)
        for name, params, wrong in [("s", 10, 100), ("m", 20, 20), ("l", 60, 16), ("xl", 100, 14)]
    }
    assert front(reports).knee == "m"
    straight = {str(step): report(10 * step, 100 - 10 * step) for step in range(1, 6)}
    assert front(straight).knee is None


def test_runs_are_shown_side_by_side_with_what_each_was_timed_at():
    fast = (timed("fp32", 0.4), timed("int8-dynamic", 0.1))
    part = side_by_side({"a": report(1000, 20, bench=fast), "b": report(900, 30, bench=())})
    rows = {row[0]: dict(zip(part.table.header, row, strict=True)) for row in part.table.rows}
    assert rows["a"]["ort-cpu, batch 1, 1 thread"] == "0.244 ms, 0.400 of dense"
    assert (rows["b"]["ort-cpu, batch 1, 1 thread"], rows["b"]["quality"][:15]) == ("–", "30 of 359 wrong")
    assert [dot.label for dot in part.figures[0].dots].count("dense") == 1
    assert len(part.figures[0].line) == len(front({"a": report(1000, 20), "b": report(900, 30)}).names) == 2


def test_runs_that_cannot_be_compared_have_no_front_and_machines_stand_apart():
    other = a_report().data.model_copy(update={"digest": "e" * 64})
    elsewhere = (timed("fp32", 0.4, environment={"cpu": "Other"}), timed("int8-dynamic", 0.1))
    doubtful = (timed("fp32", 0.9, verdict="invalid"),)
    part = side_by_side({"a": report(1000, 20, bench=elsewhere), "b": report(900, 30, data=other, bench=doubtful)})
    assert part.figures == ()
    assert any("no front" in line for line in part.lines)
    assert {row[-1] for row in part.table.rows} == {""}
    assert [name for name in part.table.header if "Some CPU" in name or "Other" in name] == [*part.table.header[5:7]]
    assert "invalid" in part.table.rows[1][6]


@pytest.mark.parametrize("change", [{"mirror": True}, {"calibration_images": 40}])
def test_runs_that_learn_from_pictures_otherwise_and_are_judged_on_the_same_have_a_front(change):
    reports = {}
    for name, wanted in (("a", Wanted((1, 8, 8), {})), ("b", replace(Wanted((1, 8, 8), {}), **change))):
        source = open_source("digits", wanted)
        data = Data(**source.identity, content=source.content, pictures={"test": source.pictures("test")})
        reports[name] = report(1000 if name == "a" else 900, 20 if name == "a" else 30, data=data)
    assert reports["a"].data.digest != reports["b"].data.digest
    assert set(front(reports).names) == {"a", "b"}
    other = reports["b"].data.model_copy(update={"pictures": {"test": "of others"}})
    assert not front({**reports, "b": reports["b"].model_copy(update={"data": other})}).names


def test_what_is_not_known_draws_nothing():
    blind = figures(1000, 0).model_copy(update={"accuracy": None, "wrong": None, "total": None})
    part = side_by_side({name: a_report().model_copy(update={"compressed": blind}) for name in "ab"})
    assert part.figures == ()
    json.dumps(part.table.rows)
