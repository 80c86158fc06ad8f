from __future__ import annotations

from pathlib import Path

import pytest
from kinds import KINDS
from kinds.compression import CompressionCell, best_try, epochs
from kinds.torch_pruning import Settings
from pages import page_of
from records import Results
from suite import Suite

from toolchain.compress.method import Method
from toolchain.errors import RecipeError

ROOT = Path(__file__).resolve().parents[2]
SUITES = sorted((ROOT / "benchmarks" / "suites").glob("*.toml"))


def loaded(path: Path) -> Suite:
    return Suite.load(path)


def runs(suite: Suite) -> list[CompressionCell]:
    """The compression runs of a suite."""
    return [cell for cell in suite.cells if isinstance(cell, CompressionCell)]


def recipe_of(suite: Suite, cell: CompressionCell, chosen=None):
    return KINDS[cell.kind].recipe(cell, suite, chosen)


COMPRESSING = [path for path in SUITES if runs(loaded(path))]


def test_the_suites_are_there_with_a_command_each():
    assert [path.stem for path in SUITES] == [
        *("ablation", "floor", "formats", "latency", "paper", "peers"),
        *("real", "scale", "seeds", "sizes", "speed", "targets", "validity"),
    ]
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"$(call suite,{path.stem})" in rules for path in SUITES)


@pytest.mark.parametrize("path", COMPRESSING, ids=lambda path: path.stem)
def test_every_recipe_that_a_suite_implies_is_valid(path):
    suite = loaded(path)
    assert len(runs(suite)) > 5
    for cell in runs(suite):
        tried = {key: value for sweep in cell.best for key, value in suite.sweeps[sweep][0].tried.items()}
        for chosen in (None, tried):
            recipe = recipe_of(suite, cell, chosen)
            Method.of(recipe.compress)
            assert recipe.compress.seed == cell.seed
            assert (recipe.finetune.epochs > 0) == (cell.training == "recovered")
        if peer := KINDS[cell.kind].other_settings(cell, tried):
            assert Settings.of(peer).params == cell.settings["budget.params"]
    for reference, section in suite.file.references.items():
        for seed in section.seeds:
            assert suite.reference_recipe(reference, seed).train is not None


@pytest.mark.parametrize("path", [path for path in COMPRESSING if path.stem != "scale"], ids=lambda path: path.stem)
def test_every_dense_model_has_its_own_row(path):
    suite = loaded(path)
    dense = {(cell.reference, cell.seed) for cell in runs(suite) if (cell.row, cell.training) == ("dense", "zero")}
    assert dense >= {(cell.reference, cell.seed) for cell in runs(suite) if not cell.sweep}


def test_references_of_one_name_are_one_model():
    recipes: dict[str, object] = {}
    for path in SUITES:
        for name, reference in loaded(path).file.references.items():
            assert recipes.setdefault(name, reference.recipe) == reference.recipe


def test_sweeps_of_the_published_methods_have_at_least_as_many_tries():
    paper, peers = (loaded(ROOT / "benchmarks" / "suites" / f"{name}.toml") for name in ("paper", "peers"))
    ours = len(paper.sweeps["joint-lr"])
    assert all(len(paper.sweeps[name]) >= ours for name in ("vtp-recovery", "hybrid-recovery", "dense-lr"))
    for share in (50, 30):
        assert len(peers.sweeps[f"taylor{share}-lr"]) == len(peers.sweeps[f"joint{share}-lr"]) >= 3


def test_the_latency_suite_prunes_as_the_sweeps_of_the_peers_suite_found_best():
    timed, peers = (loaded(ROOT / "benchmarks" / "suites" / f"{name}.toml") for name in ("latency", "peers"))
    results = Results(ROOT / "benchmarks" / "results")
    for row in ("taylor50.params0.5", "taylor30.params0.3"):
        cell = next(cell for cell in runs(timed) if cell.row == row)
        sweep = next(c.best[0] for c in runs(peers) if (c.row, c.training, c.seed) == (row, "zero", 0))
        best = best_try([record for c in peers.sweeps[sweep] if (record := results.read("peers", c.name)) is not None])
        wanted = Settings.of(KINDS[cell.kind].other_settings(cell))
        assert {key: getattr(wanted, key.removeprefix("peer.")) for key in best.tried} == best.tried


def test_no_row_is_recovered_for_more_than_three_epochs_and_all_for_the_same():
    paper = loaded(ROOT / "benchmarks" / "suites" / "paper.toml")
    found = {}
    for cell in (cell for cell in runs(paper) if cell.training == "recovered"):
        long = "epochs3" in cell.row or cell.sweep == "joint3-lr"  # as long as the published methods train in all
        found.setdefault(long, set()).add(epochs(recipe_of(paper, cell))["recovery"])
    assert found == {False: {1}, True: {3}}


def test_a_grid_is_a_product_and_names_its_values(suite_file):
    text = suite_file.read_text() + (
        '\n[[cells]]\nname = "more"\nreference = "tiny"\ntraining = ["zero", "recovered"]\n'
        'settings = { "compress.method" = "joint" }\n'
        'grid = { "budget.params" = [0.5, 0.3], "compress.allocation" = ["uniform"], "finetune.distill" = [true, false] }\n'
    )
    suite_file.write_text(text)
    more = [cell for cell in Suite.load(suite_file).cells if cell.row.startswith("more")]
    assert len(more) == 2 * 1 * 2 * 2
    assert more[0].name == "more.params0.5.allocation_uniform.distill_on.zero.tiny_s0"
    assert more[0].tried == {"budget.params": 0.5, "compress.allocation": "uniform", "finetune.distill": True}
    assert len({cell.name for cell in more}) == len(more)


def test_a_cells_own_settings_win_over_a_sweeps_choice(suite_file):
    suite = Suite.load(suite_file)
    cell = next(cell for cell in runs(suite) if (cell.row, cell.training) == ("joint.params0.5", "recovered"))
    recipe = recipe_of(suite, cell, {"finetune.lr": 0.5, "budget.params": 0.9})
    assert (recipe.finetune.lr, recipe.budget.params) == (0.5, 0.5)


def test_training_keys_do_not_reach_a_cell_without_training(suite_file):
    suite = Suite.load(suite_file)
    cell = next(cell for cell in runs(suite) if (cell.row, cell.training) == ("joint.params0.5", "zero"))
    assert recipe_of(suite, cell, {"finetune.lr": 0.5}) == recipe_of(suite, cell, {"finetune.lr": 0.1})


def test_a_peers_cell_has_its_budget_and_leaves_compression_to_the_peer(suite_file):
    suite_file.write_text(
        suite_file.read_text()
        + '\n[[cells]]\nkind = "peer"\nname = "peer"\nreference = "tiny"\nsettings = { "budget.params" = 0.5, "peer.round_to" = 2 }\n'
    )
    suite = Suite.load(suite_file)
    cell = suite.cells[-1]
    assert KINDS["peer"].other_settings(cell) == {"round_to": 2, "params": 0.5}
    assert recipe_of(suite, cell).compress.method == "none"
    assert recipe_of(suite, cell).budget.is_empty


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ('name = "dense"\nreference = "tiny"\n', "two cells"),
        ('name = "x"\nreference = "huge"\n', "'huge'"),
        ('name = "x"\nreference = "tiny"\nseeds = [7]\n', "seeds"),
        ('name = "x"\nreference = "tiny"\nbest = ["none"]\n', "best of 'none'"),
        ('name = "x"\nreference = "tiny"\ngird = {}\n', "gird"),
    ],
)
def test_a_suite_that_contradicts_itself_is_refused(suite_file, added, said):
    settings = 'settings = { "compress.method" = "none" }\n'
    suite_file.write_text(f"{suite_file.read_text()}\n[[cells]]\n{added}{settings}")
    with pytest.raises(RecipeError, match=said):
        Suite.load(suite_file)


def test_a_comparison_of_an_unknown_row_is_refused(suite_file):
    suite_file.write_text(suite_file.read_text().replace('"vtp.params0.7"]]', '"vtp.params0.8"]]'))
    with pytest.raises(RecipeError, match=r"vtp\.params0\.8"):
        Suite.load(suite_file)


def test_every_suite_has_a_page_that_there_is():
    for path in SUITES:
        assert callable(page_of(loaded(path).file.page))
    with pytest.raises(RecipeError, match=r"no file plots\.py with a function page"):
        page_of("plots")


def test_another_tools_settings_are_no_keys_of_slimvits_own_recipe(suite_file):
    with suite_file.open("a") as file:
        file.write('\n[[cells]]\nname = "own"\nreference = "tiny"\nsettings = { "peer.round_to" = 2 }\n')
    suite = Suite.load(suite_file)
    with pytest.raises(RecipeError, match="peer"):
        recipe_of(suite, suite.cells[-1])
