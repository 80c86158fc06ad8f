"""A budget that speaks of a file: what is known before widths are chosen, and what comes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_up_reports import a_report
from onnx import numpy_helper

from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.compress.outcome import SizeBudget
from toolchain.errors import BudgetError, RecipeError
from toolchain.export.precision import PRECISIONS
from toolchain.files import read_json
from toolchain.pipeline.job import prepare
from toolchain.pipeline.preview import from_shapes, preview
from toolchain.pipeline.run import run
from toolchain.pipeline.stages.rounding import RoundingFacts, sized
from toolchain.progress import Nobody, Progress
from toolchain.recipe import Recipe
from toolchain.report.sections import SECTIONS

MODEL = {
    "name": "vit_tiny_patch16_224",
    "kwargs": {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
    | {"embed_dim": 64, "depth": 2, "num_heads": 2},
    "pretrained": False,
}
OPEN = {
    "model": MODEL,
    "data": {"source": "digits", "calibration_images": 64},
    "train": {"epochs": 1},
    "budget": {"size": {"any": "12%"}},
    "export": {"precisions": ["fp32", "int8-dynamic", "int4"]},
}
NOISE = {**OPEN, "data": {"source": "none"}, "budget": {"size": {"int8-dynamic": "24%"}}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path / "cache"))


class Stages(Nobody):
    """Who hears which stages were done now."""

    def __init__(self):
        self.done_now = []

    def done(self, name, seconds, *, reused):
        self.done_now += [] if reused else [name]


@pytest.mark.slow
def test_the_file_that_a_budget_leaves_open_is_chosen_kept_and_told(tmp_path):
    recipe, stages = Recipe.from_dict(OPEN), Stages()
    report = run(recipe, tmp_path / "run", progress=Progress(stages))
    (size,) = (row for row in report.size_budget if row.requested is not None)
    file = tmp_path / "run" / "onnx" / f"compressed.{size.precision}.onnx"
    assert size.bytes == OnnxFile(file).size_bytes
    assert 0.9 * size.requested < size.bytes <= size.requested
    assert size.met
    dense = report.stages[0].params
    assert size.requested == pytest.approx(0.12 * 4 * dense, abs=2)
    assert size.rounding > 0, "what it rounds moves outputs"
    text = (tmp_path / "run" / "report.md").read_text()
    assert f"Size budget of the {size.precision} file: " in text
    assert "missed" not in text
    assert "size.any 12%" in text.splitlines()[0]
    assert "## What other budgets would do" in text
    assert "What other budgets would do" in (tmp_path / "run" / "report.html").read_text()
    allocation = read_json(tmp_path / "run" / "allocation.json")
    assert [each["precision"] for each in allocation["files"] if each["requested"]] == [size.precision]
    assert [point.damage for point in report.front] == [point["damage"] for point in allocation["front"]]
    assert {name for name in stages.done_now if name.startswith("rounding")} == {
        "rounding-fp32",
        "rounding-int8-dynamic",
        "rounding-int4",
    }
    planned = preview(recipe).allocation.to_dict()
    assert planned["widths"] == allocation["widths"], "the plan is what the run decides"
    assert planned["files"] == allocation["files"]

    again = Stages()
    run(recipe, tmp_path / "run", progress=Progress(again))
    assert again.done_now == []


@pytest.mark.slow
def test_without_images_a_named_file_is_limited_and_an_open_one_refused(tmp_path):
    report = run(Recipe.from_dict(NOISE), tmp_path / "run")
    (size,) = report.size_budget
    assert (size.precision, size.rounding, size.met) == ("int8-dynamic", None, True)
    assert report.front == ()
    open_one = {**NOISE, "budget": {"size": {"any": "24%"}}}
    with pytest.raises(RecipeError, match=r"none is measured .* name one: budget\.size\.int4"):
        prepare(Recipe.from_dict(open_one))


def test_shapes_alone_tell_roughly():
    shown = from_shapes(prepare(Recipe.from_dict(OPEN), fetch=False))
    assert "the rest is measured later" in shown.note
    assert shown.allocation.files


@pytest.mark.parametrize(
    ("budget", "precisions", "error", "message"),
    [
        (
            {"size": {"int4": "8%"}},
            ["fp32"],
            RecipeError,
            r"the recipe makes no such file; add 'int4' to export\.precisions",
        ),
        ({"size": {"in4": "8%"}}, ["fp32", "int4"], RecipeError, "unknown precision 'in4'"),
        ({"size": {"int4": "0.01%"}}, ["int4"], BudgetError, r"budget\.size\.int4 asks for .* reachable is"),
        (
            {"size": {"any": "0.01%"}},
            ["fp32", "int4"],
            BudgetError,
            r"no file of .* keeps budget\.size\.any; .*budget\.size\.int4 asks for",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(budget, precisions, error, message):
    with pytest.raises(error, match=message):
        prepare(Recipe.from_dict({**OPEN, "budget": budget, "export": {"precisions": precisions}}))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"any": "8%", "int4": "8%"}, "keep 'any' alone"),
        ({"int4": "8 potatoes"}, "potatoes"),
        ({"int4": 8}, "as in { int4 = '3 MB' }"),
        (8, "expects"),
    ],
)
def test_a_table_of_sizes_is_read_strictly(size, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict({**OPEN, "budget": {"size": size}})


@pytest.mark.parametrize("order", [1, -1])
def test_what_names_one_kind_of_int8_says_more_than_what_names_both(order):
    sizes = dict([("int8-qdq", "20%"), ("int8", "30%")][::order])
    recipe = Recipe.from_dict({**OPEN, "budget": {"size": sizes}, "export": {"precisions": ["int8"]}})
    asked = prepare(recipe, shapes_only=True).problem.budget.asked
    assert asked["size.int8-dynamic"] == pytest.approx(1.5 * asked["size.int8-qdq"], abs=2)


def test_every_kind_of_int8_is_limited_by_one_word():
    recipe = Recipe.from_dict({**OPEN, "budget": {"size": {"int8": "30%"}}, "export": {"precisions": ["int8"]}})
    problem = prepare(recipe, shapes_only=True).problem
    assert {"size.int8-dynamic", "size.int8-qdq"} == set(problem.budget.most)


def test_a_file_above_its_budget_is_told():
    row = SizeBudget(
        precision="int8-qdq", requested=100_000, predicted=99_000, reachable=(1, 2), rounding=0.1, bytes=101_234
    )
    part = SECTIONS["notes"].draw(a_report().model_copy(update={"size_budget": (row,)}))
    assert any(
        "int8-qdq file is missed: it has 101,234 bytes, and 100,000 were asked for." in each for each in part.cautions
    )
    met = SECTIONS["notes"].draw(
        a_report().model_copy(update={"size_budget": (row.model_copy(update={"bytes": 99_999}),)})
    )
    assert not any("int8-qdq" in each for each in met.cautions)


@pytest.mark.slow
def test_a_precision_that_is_another_model_is_no_option_and_an_error_if_named(tmp_path, register):
    honest = PRECISIONS["int4"]

    def broken(model, images):
        made = honest.convert(model, images)
        scale = next(each for each in made.model.graph.initializer if each.name.endswith("_scale"))
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 2, scale.name))
        return made

    register(PRECISIONS, replace(honest, convert=broken))
    noise = {**NOISE, "budget": {"size": {"int4": "24%"}}}
    with pytest.raises(BudgetError, match=r"budget\.size\.int4 cannot be met: .*weights"):
        run(Recipe.from_dict(noise), tmp_path / "named")
    report = run(Recipe.from_dict({**OPEN, "export": {"precisions": ["int8-dynamic", "int4"]}}), tmp_path / "open")
    assert [row.precision for row in report.size_budget if row.requested is not None] == ["int8-dynamic"]
    assert [row.precision for row in report.artifacts if row.refused is not None] == ["int4"]

    job = prepare(Recipe.from_dict(OPEN), shapes_only=True)
    good = RoundingFacts(precision="int8-dynamic", bytes=90_000, damage=0.1)
    bad = RoundingFacts(precision="int4", bytes=None, damage=None, refused="it is another model")
    assert [file.precision for file in sized(job, [good, bad])] == ["int8-dynamic"]
    with pytest.raises(BudgetError, match=r"budget\.size\.any cannot be met: it is another model"):
        sized(job, [bad])
