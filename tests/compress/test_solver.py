"""The knapsack: never above a limit, as good as brute force, and nothing of the budget is left lying about."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from builders import TINY, candidates_of, choices_of, costs_of, dense_model, shapes_of, table_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sweeps import swept

from toolchain.compress.choices import Budget, Choices, Costs
from toolchain.compress.solver import Candidate, Damages, choose, interpolate, narrowest, solve_uniform
from toolchain.cost import RANK, Widths, trace
from toolchain.errors import BudgetError
from toolchain.recipe import BudgetSection, CompressSection

JOINT = CompressSection()
SPLIT = CompressSection(attention="data_aware")


@pytest.fixture(scope="module")
def tiny_model():
    return dense_model(**TINY)


def chosen_of(candidates, choices, costs, budget):
    budget.require(narrowest(candidates, choices), costs)
    return choose(candidates, choices, costs, budget, solve_uniform(choices, costs, budget))


def total(candidates, choices, widths):
    return sum(Damages(candidates).all(choices.chosen(widths)).values())


@pytest.mark.parametrize("section", [JOINT, SPLIT], ids=["head dims", "ranks"])
@pytest.mark.parametrize(
    "most",
    [
        {"params": 0.8},
        {"macs": 0.75},
        {"latency.ort-cpu": 0.6},
        {"params": 0.85, "macs": 0.8, "size": 0.9, "latency.ort-cpu": 0.7},
        {"latency.ort-cpu": 0.7, "latency.eager": 0.7},
    ],
    ids=" and ".join,
)
@pytest.mark.parametrize("seed", swept([0, 1], [0]))
def test_no_choice_of_candidates_within_the_limits_does_less_damage(tiny_model, section, most, seed):
    choices = choices_of(tiny_model, section, {"head_dim": 4, "mlp_hidden": 16, "rank": 4})
    costs = costs_of(tiny_model, (table_of(choices, 5), table_of(choices, 6, "eager")))
    whole = costs.of(Widths())
    limits = Budget({name: share * whole[name] for name, share in most.items()})
    candidates = candidates_of(choices, seed)
    keys = dict.fromkeys(c.key for c in candidates)
    feasible = [
        sum(c.damage for c in pick)
        for pick in itertools.product(*([c for c in candidates if c.key == key] for key in keys))
        if limits.met_by(costs.of(choices.widths({c.key: c.kept for c in pick})))
    ]
    found = chosen_of(candidates, choices, costs, limits)
    assert limits.met_by(costs.of(found))
    assert min(feasible) > 0, "the limits bind"
    assert total(candidates, choices, found) <= min(feasible) * (1 + 1e-3)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    shares=st.tuples(st.floats(0.72, 1.0), st.floats(0.72, 1.0), st.floats(0.5, 1.0)),
    multiple=st.sampled_from([1, 4, 8]),
    split=st.booleans(),
)
def test_limits_are_met_and_no_single_multiple_more_would_fit(tiny_model, seed, shares, multiple, split):
    """For the solver and for uniform alike."""
    section = SPLIT if split else JOINT
    choices = choices_of(tiny_model, section, dict.fromkeys(("head_dim", "mlp_hidden", "rank"), multiple))
    costs = costs_of(tiny_model, (table_of(choices, seed),))
    whole = costs.of(Widths())
    names = ("params", "macs", "latency.ort-cpu")
    limits = Budget({name: share * whole[name] for name, share in zip(names, shares, strict=True)})
    candidates = candidates_of(choices, seed)
    assume(limits.met_by(costs.of(narrowest(candidates, choices))))  # a drawn table can put a share out of reach
    for found in (chosen_of(candidates, choices, costs, limits), solve_uniform(choices, costs, limits)):
        assert limits.met_by(costs.of(found))
        chosen = choices.chosen(found)
        for key, kept in chosen.items():
            wider = choices.wider(key, kept)
            assert wider is None or not limits.met_by(costs.of(choices.widths({**chosen, key: wider}))), (key, kept)


@pytest.mark.parametrize("multiple", swept([1, 8, 16], [8]))
@pytest.mark.parametrize("section", [JOINT, SPLIT], ids=["head dims", "ranks"])
@pytest.mark.parametrize("budget", [{"params": 0.5}, {"macs": 0.6}, {"params": 0.8}, {"size": "55%"}], ids=str)
def test_a_full_size_model_uses_99_percent_of_the_budget(budget, section, multiple):
    model = shapes_of("deit_tiny_patch16_224")
    choices = choices_of(model, section, dict.fromkeys(("head_dim", "mlp_hidden", "rank"), multiple))
    costs = costs_of(model)
    limits = Budget.of(BudgetSection(**budget), costs)
    coarse = candidates_of(choices, 3, shares=(0.15, 0.3, 0.5, 0.75))
    for found in (chosen_of(coarse, choices, costs, limits), solve_uniform(choices, costs, limits)):
        cost = costs.of(found)
        for name, limit in limits.most.items():
            assert 0.99 * limit <= cost[name] <= limit


def test_what_a_coarse_ladder_leaves_of_the_budget_is_handed_out(tiny_model):
    choices, costs = choices_of(tiny_model), costs_of(tiny_model)
    coarse = candidates_of(choices, shares=(0.25,))  # a quarter of a unit or all of it
    limit = 0.8 * costs.dense.params
    found = chosen_of(coarse, choices, costs, Budget({"params": limit}))
    assert 0.99 * limit <= costs.of(found)["params"] <= limit


def test_uniform_differs_by_one_multiple_at_most(tiny_model):
    for multiple in (1, 8):
        choices = choices_of(tiny_model, JOINT, {"mlp_hidden": multiple, "head_dim": 4})
        costs = costs_of(tiny_model)
        found = solve_uniform(choices, costs, Budget({"params": 0.83 * costs.dense.params}))
        for unit, step in (("mlp_hidden", multiple), ("head_dim", 4)):
            kept = [count for key, count in found.kept.items() if key[1] == unit]
            assert max(kept) - min(kept) <= step


def test_a_fixed_share_of_attention_stays_fixed(tiny_model):
    section = JOINT.model_copy(update={"attention_share": 0.5})
    costs = costs_of(tiny_model)
    found = solve_uniform(choices_of(tiny_model, section), costs, Budget({"params": 0.8 * costs.dense.params}))
    assert {count for key, count in found.kept.items() if key[1] == "head_dim"} == {8}


def test_an_impossible_limit_names_its_range_in_its_own_unit(tiny_model):
    choices = choices_of(tiny_model)
    costs = costs_of(tiny_model, (table_of(choices),))
    candidates = candidates_of(choices)
    least = costs.of(narrowest(candidates, choices))["latency.ort-cpu"]
    with pytest.raises(BudgetError) as caught:
        chosen_of(candidates, choices, costs, Budget({"params": 10.0, "latency.ort-cpu": least - 0.01}))
    text = str(caught.value)
    assert "budget.params asks for 10 (0.000 of dense); reachable is " in text
    assert f"budget.latency.ort-cpu asks for {least - 0.01:.3f} ms" in text
    assert f"reachable is {least:.3f} ms … 4.000 ms" in text
    found = chosen_of(candidates, choices, costs, Budget({"latency.ort-cpu": least}))
    assert costs.of(found)["latency.ort-cpu"] <= least, "and its end can be reached"


def test_without_limits_nothing_is_reduced(tiny_model):
    choices = choices_of(tiny_model, SPLIT)
    found = chosen_of(candidates_of(choices), choices, costs_of(tiny_model), Budget())
    assert found == choices.widths(choices.chosen(Widths()))
    assert found.ranks == {}, "a linear of full rank is not split"


def test_a_measured_bump_is_no_reason_to_keep_less():
    bump = [Candidate(("m", "u"), 8, 0.5), Candidate(("m", "u"), 16, 0.7), Candidate(("m", "u"), 32, 0.0)]
    found = Damages(bump)
    assert [found.of(("m", "u"), kept) for kept in (8, 16, 32)] == [0.7, 0.7, 0.0]
    assert found.of(("m", "u"), 4) == 0.7, "below what was measured nothing is made up"


def test_interpolation_keeps_what_was_measured_and_adds_ranks(tiny_model):
    choices = choices_of(tiny_model, SPLIT, {"rank": 4})
    linear = next(i for i in tiny_model.family.factorizable(tiny_model.module) if i.linear in choices.linears)
    key = (linear.linear, RANK)
    measured = [Candidate(key, 8, 1.0), Candidate(key, 24, 0.01), Candidate(key, 48, 0.0)]
    finer = {c.kept: c.damage for c in interpolate(measured, [linear], choices, (0.1, 0.45, 0.7))}
    assert {8: 1.0, 24: 0.01, 48: 0.0}.items() <= finer.items()
    assert finer[16] == pytest.approx(0.1, rel=1e-6)
    assert min(finer) == 8


def test_widths_and_choices_are_inverse(tiny_model):
    choices = choices_of(tiny_model, SPLIT, {"rank": 4, "mlp_hidden": 8})
    assert isinstance(choices, Choices)
    widths = choices.uniform(0.5)
    assert choices.widths(choices.chosen(widths)) == widths
    name, (out, into) = next(iter(choices.linears.items()))
    assert choices.widths({(name, RANK): out * into // (out + into) + 1}).ranks == {}, "a pair that does not pay"


@pytest.mark.parametrize("steepness", [12.0, 20.0, 30.0])
@pytest.mark.parametrize("share", [0.7, 0.9, 0.97])
def test_damages_of_many_orders_of_magnitude_are_told_apart(tiny, steepness, share):
    """Damage falls exponentially with width: what a mild budget can choose from lies far below the worst candidate."""
    groups = [g for g in tiny.groups if g.unit in ("head_dim", "mlp_hidden")]
    choices = Choices(groups, {}, {})
    costs = Costs(trace(tiny.module, tiny.family, tiny.preprocess.input_size), tiny.groups)
    generator, candidates = torch.Generator().manual_seed(0), []
    for group in groups:
        rate = steepness * (0.5 + float(torch.rand((), generator=generator)))
        for kept in sorted({choices.kept(group, step / 20 * group.total) for step in range(1, 21)}):
            damage = math.exp(-rate * kept / group.total) - math.exp(-rate)
            candidates.append(Candidate((group.module, group.unit), kept, damage))
    limits = Budget({"params": share * costs.dense.params})
    damages = Damages(candidates)

    def total(widths: Widths) -> float:
        return sum(damages.all(choices.chosen(widths)).values())

    found = chosen_of(candidates, choices, costs, limits)
    assert limits.met_by(costs.of(found))
    assert total(found) <= total(solve_uniform(choices, costs, limits))
    # Greedy ascent over single steps: no better choice is reachable by taking from one unit and giving to another.
    chosen = choices.chosen(found)
    ladders = {key: sorted(c.kept for c in candidates if c.key == key) for key in chosen}
    for give, take in itertools.permutations(chosen, 2):
        wider = [kept for kept in ladders[give] if kept > chosen[give]][:1]
        narrower = [kept for kept in ladders[take] if kept < chosen[take]][-1:]
        if wider and narrower:
            moved = choices.widths({**chosen, give: wider[0], take: narrower[0]})
            if limits.met_by(costs.of(moved)):
                assert total(moved) >= 0.98 * total(found) - 1e-10, (give, take)
