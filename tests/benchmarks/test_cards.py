"""Cards of models/: every folder has one and a plan; the card follows from recipe and records, and the plan is one of its recipe's."""

from __future__ import annotations

import re

import cards
import pytest
from records import Results
from suite import HERE

from toolchain.plan import CompressionPlan
from toolchain.recipe import Recipe

RESULTS = Results(HERE / "results")
FOLDERS = sorted(path.parent for path in cards.MODELS.glob("*/recipe.toml"))
MEASURED = cards.MODELS / "fashion_mnist_vit"


def numbers(text):
    """Every number with a decimal point or in thousands: what is measured or counted, and nobody types."""
    return set(re.findall(r"\d[\d,]*\.\d+|\d{1,3}(?:,\d{3})+", text))


@pytest.fixture(scope="module")
def drawn():
    return cards.drawn(RESULTS)


def test_what_is_committed_follows_from_recipes_and_records(drawn):
    assert {path.parent for path in drawn} == set(FOLDERS) == {path for path in cards.MODELS.iterdir() if path.is_dir()}
    for path, text in drawn.items():
        assert path.read_text(encoding="utf-8") == text, "run `make bench-report`"


def test_every_recipe_takes_the_default_method():
    assert {Recipe.load(folder / "recipe.toml").compress.method for folder in FOLDERS} == {"joint"}


def test_a_card_without_records_has_no_measured_number_and_says_so(drawn, tmp_path):
    empty = cards.drawn(Results(tmp_path))
    for path, text in empty.items():
        assert "No record of [benchmarks/results]" in text
        assert f"slimvit run models/{path.parent.name}/recipe.toml" in text
        part = text[text.index("## Numbers") : text.index("## The plan")]
        assert numbers(part) == set()
    measured = drawn[MEASURED / "README.md"]
    assert len(numbers(measured)) > 30
    assert "No record" not in measured


def test_a_card_shows_only_what_is_of_its_model_method_and_budget():
    recipe = Recipe.load(MEASURED / "recipe.toml")
    assert cards.numbers(MEASURED, recipe, RESULTS)
    other = Recipe.load(MEASURED / "recipe.toml", ["budget.params=0.41"])
    assert cards.numbers(MEASURED, other, RESULTS) == []


def test_a_card_says_what_its_engines_need():
    assert cards.engines(["trt-rtx", "openvino-cpu"]).startswith(
        "trt-rtx, openvino-cpu: needs `pip install 'slimvit[trt-rtx,openvino]'`"
    )
    assert cards.engines([]) == "none"


def test_a_cards_text_is_its_recipes_header():
    text = "# A title.\n#\n#   slimvit run a.toml\n#\n# More `code`,\n# and more.\n\n[model]\n# not this\n"
    assert cards.header(text) == "A title.\n\n```sh\nslimvit run a.toml\n```\n\nMore `code`,\nand more."


def test_no_path_of_a_machine_is_in_a_card(drawn):
    assert not [path for path, text in drawn.items() if re.search(r"/(root|home|tmp)/", text)]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_plan_is_of_its_recipe_and_within_its_budget(folder, drawn):
    recipe, plan = Recipe.load(folder / "recipe.toml"), CompressionPlan.load(folder / cards.PLAN)
    assert (plan.model.name, plan.model.output) == (recipe.model.name, recipe.model.output)
    assert dict(recipe.model.kwargs).items() <= dict(plan.model.kwargs).items()
    assert plan.provenance["requested"] == recipe.compress.method
    assert plan.provenance["budget"]["params"] == recipe.budget.params
    dense = cards.shape_of(recipe)
    small = cards.planned(plan, dense)
    assert 0.95 * recipe.budget.params < small.params / dense.params <= recipe.budget.params
    assert f"{small.params:,} of {dense.params:,} parameters" in drawn[folder / "README.md"]
