"""Budget → widths: every budget is met, hardly anything of it is wasted, and more budget never means less model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import TINY, choices_of, dense_model
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.compress.allocation import Allocation
from toolchain.compress.choices import Budget, Choices, Costs
from toolchain.compress.method import Method
from toolchain.compress.problem import Problem
from toolchain.compress.solver import largest, solve_global, solve_uniform, top_indices
from toolchain.cost import LinearShape, ModelShape, Widths, trace
from toolchain.errors import BudgetError, RecipeError
from toolchain.families import Span, UnitGroup
from toolchain.model import TimmModel
from toolchain.plan import BYTES_PER_PARAM
from toolchain.recipe import BudgetSection, CompressSection

Case = tuple[TimmModel, ModelShape]
BOTH = CompressSection(method="hybrid", neurons="magnitude")
NEURONS = CompressSection(method="vtp", neurons="magnitude")
MULTIPLES = {"mlp_hidden": 8, "rank": 8}


@pytest.fixture(scope="module")
def deit() -> Case:
    """deit_tiny at full size; its weights do not matter here."""
    model = dense_model("deit_tiny_patch16_224", num_classes=1000)
    return model, trace(model.module, model.family, model.preprocess.input_size)


@pytest.fixture(scope="module")
def small() -> Case:
    model = dense_model()
    return model, trace(model.module, model.family, model.preprocess.input_size)


def allocate(*problem: object) -> Allocation:
    """As shapes alone tell."""
    return Allocation.uniform(Problem.of(*problem))


def noise(chosen: Choices, seed: int = 0) -> dict[tuple[str, str], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {(g.module, g.unit): torch.rand(g.total, generator=generator) for g in chosen.groups}


# The whole


def test_a_share_is_of_the_dense_model_with_its_layer_scales():
    """What ships has them folded away: a share of 1 is reached with nothing reduced, and half is half of the dense."""
    model = dense_model(**TINY, init_values=0.1)
    dense = trace(model.module, model.family, model.preprocess.input_size)
    assert dense.scale_params > 0
    assert dense.params == sum(p.numel() for p in model.module.parameters())
    costs = Costs(dense, model.groups)
    for share in (0.5, 1.0):
        limits = Budget.of(BudgetSection(params=share, size=f"{100 * share:g}%"), costs)
        assert limits.most == {"params": int(share * dense.params), "size": int(share * dense.size_bytes)}
    whole = allocate(model, NEURONS, BudgetSection(params=1.0, macs=1.0, size="100%"), {}).widths
    assert all(kept == 192 for kept in whole.kept.values())
    half = allocate(model, NEURONS, BudgetSection(params=0.7), {})
    record = half.to_dict()
    assert record["dense"]["params"] == dense.params
    finest = (2 * 48 + 1) / dense.params
    assert 0.7 - finest <= record["ratio"]["params"] <= 0.7
    with pytest.raises(BudgetError, match=rf"\(0\.010 of dense\); reachable is .* … {dense.params:,} "):
        allocate(model, NEURONS, BudgetSection(params=0.01), {})


# Uniform


@pytest.mark.parametrize("section", [BOTH, NEURONS], ids=["attention and neurons", "neurons"])
@pytest.mark.parametrize("params", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("multiples", [{}, MULTIPLES], ids=["any", "multiples"])
def test_a_params_budget_is_met_within_one_percent(deit, section, params, multiples):
    model, dense = deit
    found = allocate(model, section, BudgetSection(params=params), multiples).predicted
    assert found.params <= params * dense.params
    assert found.params >= (params - 0.01) * dense.params, "more was removed than asked for"


@pytest.mark.parametrize("macs", [0.5, 0.7, 0.95])
def test_a_macs_budget_is_met_within_one_percent(deit, macs):
    model, dense = deit
    found = allocate(model, BOTH, BudgetSection(macs=macs), {}).predicted
    assert (macs - 0.01) * dense.macs <= found.macs <= macs * dense.macs


@pytest.mark.parametrize(("size", "limit_bytes"), [("12 MB", 12e6), ("12000 kB", 12e6), ("60%", None)])
def test_a_size_budget_is_met_within_one_percent(deit, size, limit_bytes):
    model, dense = deit
    limit = limit_bytes or 0.6 * dense.params * BYTES_PER_PARAM
    found = allocate(model, BOTH, BudgetSection(size=size), {}).predicted
    assert 0.99 * limit <= found.size_bytes <= limit


def test_several_budgets_hold_together_and_the_strictest_binds(deit):
    model, dense = deit
    found = allocate(model, BOTH, BudgetSection(params=0.7, macs=0.6, size="90%"), {}).predicted
    assert found.params <= 0.7 * dense.params
    assert 0.59 * dense.macs <= found.macs <= 0.6 * dense.macs
    alone = allocate(model, BOTH, BudgetSection(macs=0.6), {}).predicted
    assert alone == found
    assert allocate(model, BOTH, BudgetSection(params=0.5, macs=1.0), {}).predicted.params <= 0.5 * dense.params


@pytest.mark.parametrize("method", ["uniform", "global"])
def test_an_impossible_budget_names_the_reachable_range(deit, method):
    """And the range is true: its end can be reached, less cannot."""
    model, dense = deit
    section = NEURONS.model_copy(update={"neurons": "vtp", "allocation": method})
    with pytest.raises(BudgetError) as caught:
        allocate(model, section, BudgetSection(params=0.05, macs=0.9), {})
    text = str(caught.value)
    assert text.startswith(f"the budget cannot be met: budget.params asks for {int(0.05 * dense.params):,} (0.050 of")
    assert "macs" not in text, "that one can be met"
    least = int(text.partition("reachable is ")[2].partition(" …")[0].replace(",", ""))
    assert f"{least:,} … {dense.params:,} ({least / dense.params:.3f} … 1)" in text
    reached = allocate(model, section, BudgetSection(size=f"{least * BYTES_PER_PARAM} B"), {}).predicted
    assert reached.params == least
    with pytest.raises(BudgetError, match=r"budget\.size"):
        allocate(model, section, BudgetSection(size=f"{least * BYTES_PER_PARAM - 1} B"), {})
    assert caught.value.exit_code == 2


def test_two_impossible_budgets_are_both_named(small):
    with pytest.raises(BudgetError, match=r"budget\.params asks .*; budget\.macs asks "):
        allocate(small[0], NEURONS, BudgetSection(params=0.01, macs=0.01), {})


def test_the_floor_of_vtp_is_held(deit):
    section = NEURONS.model_copy(update={"neurons": "vtp"})
    chosen = choices_of(deit[0], section)
    widths = chosen.uniform(0.0)
    assert set(widths.kept.values()) == {77}  # ⌈(1 − 0.9)·768⌉
    assert set(choices_of(deit[0], NEURONS).uniform(0.0).kept.values()) == {1}


@pytest.mark.parametrize("section", [BOTH, NEURONS], ids=["attention and neurons", "neurons"])
def test_multiples_are_respected(deit, section):
    found = allocate(deit[0], section, BudgetSection(params=0.63), {"mlp_hidden": 16, "rank": 8}).widths
    assert {kept % 16 for kept in found.kept.values()} == {0}
    assert {rank % 8 for rank in found.ranks.values()} == ({0} if section is BOTH else set())
    assert bool(found.ranks) == (section is BOTH)


def test_a_total_that_is_no_multiple_can_be_kept_whole(small):
    group = small[0].groups[-1]
    odd = replace(group, total=30)
    chosen = Choices([odd], {}, {group.unit: 8})
    assert [chosen.kept(odd, count) for count in (0, 7.9, 8, 29.9, 30, 99)] == [8, 8, 8, 24, 30, 30]


def test_attention_share_fixes_the_ranks(deit):
    section = BOTH.model_copy(update={"attention_share": 0.4})
    for params in (0.5, 0.8):
        found = allocate(deit[0], section, BudgetSection(params=params), {})
        for name, rank in found.widths.ranks.items():
            out, into = deit[0].module.get_submodule(name).weight.shape
            assert rank == int(0.4 * out * into / (out + into))
    assert (
        allocate(deit[0], section, BudgetSection(params=0.5), {}).predicted.params <= 0.5 * found.problem.shape.params
    )


def test_nothing_is_factorised_at_a_full_budget(deit):
    found = allocate(deit[0], BOTH, BudgetSection(params=1.0), {})
    assert found.widths.ranks == {}
    assert found.predicted == found.problem.shape
    assert found.to_dict()["ratio"] == {"params": 1.0, "macs": 1.0, "bytes": 1.0}


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    params=st.tuples(st.floats(0.7, 1.0), st.floats(0.7, 1.0)).map(sorted),
    multiple=st.sampled_from([1, 4, 8]),
    attention=st.booleans(),
)
def test_uniform_is_monotone_in_the_budget(small, params, multiple, attention):
    model, dense = small
    section = BOTH if attention else NEURONS
    multiples = {"mlp_hidden": multiple, "rank": multiple}
    less, more = (allocate(model, section, BudgetSection(params=share), multiples).predicted for share in params)
    assert less.params <= more.params
    assert less.params <= params[0] * dense.params
    assert more.params <= params[1] * dense.params


# Global threshold


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    params=st.tuples(st.floats(0.7, 1.0), st.floats(0.7, 1.0)).map(sorted),
    multiple=st.sampled_from([1, 4, 8]),
)
def test_global_meets_the_budget_and_is_monotone(small, seed, params, multiple):
    model, dense = small
    costs = Costs(dense, model.groups)
    chosen = choices_of(model, NEURONS, {"mlp_hidden": multiple})
    scores = noise(chosen, seed)
    found = []
    for share in params:
        limits = Budget.of(BudgetSection(params=share), costs)
        widths, _ = solve_global(chosen, costs, limits, scores, Widths())
        shape = dense.shrunk(widths, model.groups)
        assert limits.met_by(costs.of(widths))
        step = multiple * max(2 * 48 + 1, 1)  # parameters of the finest step: rows, columns and biases of neurons
        assert share == 1.0 or shape.params == dense.params or shape.params > limits.most["params"] - step
        assert all(kept % multiple == 0 for kept in widths.kept.values())
        found.append(shape.params)
    assert found[0] <= found[1]


def test_global_keeps_the_highest_scores(deit):
    """Without rounding, what is kept scores at least as high as all that is removed, over all layers."""
    model, dense = deit
    costs = Costs(dense, model.groups)
    chosen = choices_of(model, NEURONS)
    scores = noise(chosen)
    scores = {key: value * (1 + index) for index, (key, value) in enumerate(scores.items())}  # layers differ
    limits = Budget.of(BudgetSection(params=0.6), costs)
    widths, threshold = solve_global(chosen, costs, limits, scores, Widths())
    ordered = {key: value.sort(descending=True).values for key, value in scores.items()}
    kept = min(float(ordered[key][count - 1]) for key, count in widths.kept.items() if count > 1)
    removed = max(float(ordered[key][count]) for key, count in widths.kept.items() if count < len(ordered[key]))
    assert kept >= removed
    assert removed <= threshold
    assert len(set(widths.kept.values())) > 4, "layers of different scores must get different widths"
    assert dense.shrunk(widths, model.groups).params >= 0.59 * dense.params


def test_global_respects_the_cap_on_pruning(deit):
    model, dense = deit
    costs = Costs(dense, model.groups)
    chosen = choices_of(model, NEURONS.model_copy(update={"neurons": "vtp"}))
    scores = noise(chosen)
    worthless = (chosen.groups[3].module, chosen.groups[3].unit)
    scores[worthless] = scores[worthless] * 1e-6
    widths, _ = solve_global(chosen, costs, Budget.of(BudgetSection(params=0.6), costs), scores, Widths())
    assert widths.kept[worthless] == 77


def test_global_with_equal_scores_still_meets_the_budget(small):
    model, dense = small
    costs = Costs(dense, model.groups)
    chosen = choices_of(model, NEURONS)
    scores = {key: torch.ones_like(value) for key, value in noise(chosen).items()}
    limits = Budget.of(BudgetSection(params=0.7), costs)
    widths, _ = solve_global(chosen, costs, limits, scores, Widths())
    found = dense.shrunk(widths, model.groups).params
    assert 0.99 * limits.most["params"] <= found <= limits.most["params"]


def test_global_takes_the_given_ranks_into_account(deit):
    model, dense = deit
    costs = Costs(dense, model.groups)
    chosen = choices_of(model, BOTH)
    ranks = chosen.ranks(0.5)
    limits = Budget.of(BudgetSection(params=0.5), costs)
    widths, _ = solve_global(chosen, costs, limits, noise(chosen), Widths(ranks=ranks))
    assert widths.ranks == ranks
    assert 0.49 * dense.params <= dense.shrunk(widths, model.groups).params <= 0.5 * dense.params


def test_global_hands_what_is_left_to_a_cheaper_layer():
    """The next neuron of the expensive layer no longer fits; three of the cheap one, which score less, do."""
    linears, groups = {}, []
    for name, width in (("wide", 100), ("thin", 10)):
        linears[f"{name}.fc1"] = LinearShape(16, width, bias=False, rows=1)
        linears[f"{name}.fc2"] = LinearShape(width, 16, bias=False, rows=1)
        groups.append(UnitGroup(name, "mlp_hidden", 16, (Span(f"{name}.fc1", 0, 0, 16), Span(f"{name}.fc2", 1, 0, 16))))
    dense = ModelShape(linears, {}, 0, 0)
    scores = {("wide", "mlp_hidden"): torch.arange(16) + 100, ("thin", "mlp_hidden"): torch.arange(16)}
    limits = Budget({"params": 200 * 5 + 20 * 1 + 70})
    widths, threshold = solve_global(Choices(groups, {}, {}), Costs(dense, tuple(groups)), limits, scores, Widths())
    assert widths.kept == {("wide", "mlp_hidden"): 5, ("thin", "mlp_hidden"): 4}
    assert threshold == 111


def test_global_names_the_range_too(small):
    model, dense = small
    costs = Costs(dense, model.groups)
    chosen = choices_of(model, NEURONS)
    limits = Budget.of(BudgetSection(params=0.01), costs)
    with pytest.raises(BudgetError, match=r"reachable is [0-9,]+ … [0-9,]+"):
        solve_global(chosen, costs, limits, noise(chosen), Widths())


# Parts


def test_solve_uniform_follows_the_limits_it_is_given(small):
    model, dense = small
    chosen = choices_of(model, NEURONS)
    costs = Costs(dense, model.groups)
    widths = solve_uniform(chosen, costs, Budget({"params": dense.params - 1}))
    assert list(widths.kept.values()) == [192, 191], "what rounding leaves goes to one layer"
    assert solve_uniform(chosen, costs, Budget()) == Widths({(g.module, g.unit): g.total for g in chosen.groups})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(edge=st.floats(-0.5, 1.5))
def test_largest_finds_the_edge(edge):
    found = largest(0.0, 1.0, lambda x: x <= edge)
    if edge < 0:
        assert found is None
    else:
        assert found is not None
        assert found <= edge
        assert found >= min(1.0, edge) - 2e-6


@settings(max_examples=60, deadline=None, derandomize=True)
@given(scores=st.lists(st.integers(0, 5), min_size=1, max_size=12), data=st.data())
def test_top_indices_keep_the_highest_and_break_ties_downwards(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    found = top_indices(torch.tensor(scores, dtype=torch.float32), count)
    best = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:count]
    assert found == tuple(sorted(best))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"neurons": "obd"}, "compress.neurons = 'obd'.*it has .*magnitude"),
        ({"attention": "cur"}, "compress.attention = 'cur'.*it has .*svd"),
        ({"allocation": "random"}, "compress.allocation = 'random'.*it has .*uniform"),
        ({"allocation": "solver"}, "'solver' weighs closed-form reductions"),
        ({"neurons": "obs", "allocation": "global"}, "use 'uniform'$"),
    ],
)
def test_a_method_that_is_not_there_is_named_with_those_that_are(small, change, words):
    section = BOTH.model_copy(update=change)
    with pytest.raises(RecipeError, match=words):
        Method.of(section)
    with pytest.raises(RecipeError):
        allocate(small[0], section, BudgetSection(params=0.9), {})
    Method.of(BOTH)


def test_reducing_nothing_is_refused(small):
    section = BOTH.model_copy(update={"attention": "none", "neurons": "none"})
    with pytest.raises(BudgetError, match=r"reachable is .* \(1\.000 … 1\)"):
        allocate(small[0], section, BudgetSection(params=0.5), {})


def test_a_synthetic_source_turns_learning_off():
    section = CompressSection(method="hybrid")
    assert Method.of(section).section == section
    turned = Method.of(section, synthetic=True).section
    assert (turned.attention, turned.neurons, turned.allocation) == ("svd", "magnitude", "uniform")
    none = CompressSection(method="none")
    assert Method.of(none, synthetic=True).section == none
    only = section.model_copy(update={"neurons": "none"})
    assert Method.of(only, synthetic=True).section.neurons == "none"
    for neurons, there in (("vtp", "magnitude"), ("taylor", "magnitude"), ("random", "random"), ("obs", "obs")):
        kept = Method.of(section.model_copy(update={"neurons": neurons, "allocation": "uniform"}), synthetic=True)
        assert (kept.section.neurons, kept.criterion.name) == (there, there)


def test_allocation_as_json_adds_up(deit):
    found = allocate(deit[0], BOTH, BudgetSection(params=0.5), {}).to_dict()
    assert found["schema"] == "slimvit.allocation/1"
    assert found["predicted"]["bytes"] == 4 * found["predicted"]["params"]
    assert found["ratio"]["params"] == found["predicted"]["params"] / found["dense"]["params"]
    assert found["reachable"]["params"][0] <= found["ratio"]["params"] <= found["reachable"]["params"][1] == 1.0
    assert len(found["widths"]) == 12
    assert len(found["ranks"]) == 24
    assert found["learned"] is True


def test_only_sliceable_neurons_and_attention_linears_are_chosen(small):
    chosen = choices_of(small[0], BOTH)
    assert [(g.module, g.unit) for g in chosen.groups] == [(f"blocks.{b}.mlp", "mlp_hidden") for b in range(2)]
    assert all(isinstance(g, UnitGroup) and g.sliceable for g in chosen.groups)
    assert list(chosen.linears) == [f"blocks.{b}.attn.{n}" for b in range(2) for n in ("qkv", "proj")]
    assert chosen.linears["blocks.0.attn.qkv"] == (144, 48)


def test_reducing_nothing_is_judged_by_the_budget_like_everything_else(small):
    model = small[0]
    nothing = CompressSection(method="none")
    assert allocate(model, nothing, BudgetSection(), {}).widths == Widths()
    with pytest.raises(BudgetError, match="reachable"):
        allocate(model, nothing, BudgetSection(params=0.5), {})


def test_a_preset_is_only_a_default(small):
    section = CompressSection(method="none", neurons="magnitude", allocation="uniform")
    found = allocate(small[0], section, BudgetSection(params=0.8), {})
    assert found.predicted.params <= 0.8 * found.problem.shape.params
