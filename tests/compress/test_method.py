"""allocation.json says what was decided, and what was planned where that differs."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from builders import problem_of, random_plan

from toolchain.compress.allocation import Allocation
from toolchain.compress.criteria import CRITERIA
from toolchain.compress.factorisations import FACTORISATIONS
from toolchain.compress.method import NONE, SWITCHES, Method
from toolchain.compress.solver import ALLOCATIONS
from toolchain.cost import Widths
from toolchain.errors import RecipeError
from toolchain.plan import CompressionPlan, Keep, LowRank
from toolchain.recipe import BudgetSection, CompressSection


@pytest.fixture
def planned(tiny):
    section = CompressSection(method="hybrid", allocation="uniform", neurons="magnitude")
    return Allocation.uniform(problem_of(tiny, section, BudgetSection(params=0.5)))


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_without_a_closed_form_is_refused(name):
    for method in ({"method": "vtp"}, {"method": "hybrid"}, {"attention": "svd", "neurons": "taylor"}):
        section = {**method, "allocation": "uniform"}
        Method.of(CompressSection(**section))
        with pytest.raises(
            RecipeError, match=rf"compress\.{name} = false .*attention 'joint' or 'data_aware'.*remove it"
        ):
            Method.of(CompressSection(**section, **{name: False}))
    for section in ({}, {"method": "vtp", "neurons": "obs", "allocation": "uniform"}, {"attention": "data_aware"}):
        Method.of(CompressSection(**section, **{name: False}))


@pytest.mark.parametrize("attention", [*FACTORISATIONS, NONE])
@pytest.mark.parametrize("neurons", [*CRITERIA, NONE])
def test_an_allocation_that_is_refused_is_followed_by_all_that_are_not(attention, neurons):
    works, advised = set(), []
    for allocation in ALLOCATIONS:
        try:
            Method.of(CompressSection(attention=attention, neurons=neurons, allocation=allocation))
            works.add(allocation)
        except RecipeError as error:
            advised.append(set(re.findall(r"'(\w+)'", str(error).rpartition("; use ")[2])))
    assert "uniform" in works
    assert all(names == works for names in advised)


def plan_of(model, widths):
    keeps = [
        Keep(module=module, unit=unit, total=192, indices=(tuple(range(kept)),))
        for (module, unit), kept in widths.kept.items()
    ]
    lows = []
    for name, rank in widths.ranks.items():
        out, into = model.module.get_submodule(name).weight.shape
        lows.append(LowRank(module=name, shape=(out, into), rank=rank))
    return CompressionPlan(model=model.ref, keeps=tuple(keeps), low_ranks=tuple(lows), provenance={})


def test_a_plan_that_does_what_was_planned_changes_nothing(tiny, planned):
    plan = plan_of(tiny, planned.widths)
    assert planned.decided(plan) is planned
    assert "planned" not in planned.to_dict()


def test_another_decision_is_written_and_the_plan_before_it_kept(tiny, planned):
    plan = random_plan(tiny, share=0.3)
    decided = planned.decided(plan).to_dict()
    before = planned.to_dict()
    cost = planned.problem.costs.shape(Widths.of(plan))
    assert (decided["predicted"]["params"], decided["predicted"]["macs"]) == (cost.params, cost.macs)
    assert decided["ratio"]["params"] == cost.params / planned.problem.shape.params
    assert {(row["module"], row["unit"]): row["kept"] for row in decided["widths"]} == dict(Widths.of(plan).kept)
    assert decided["planned"] == {key: before[key] for key in ("predicted", "ratio", "widths", "ranks")}


def test_what_is_only_zeroed_does_not_undo_a_measurement(tiny, planned):
    timed = replace(planned, settled=replace(planned.settled, measured={"ort-cpu": 0.5}))
    plan = plan_of(tiny, planned.widths)
    zeroed = Keep(module="blocks.0.attn", unit="attn_in", total=48, indices=(tuple(range(20)),))
    same = timed.decided(plan.model_copy(update={"keeps": (*plan.keeps, zeroed)}))
    assert (same.planned, same.settled.measured) == (timed, {"ort-cpu": 0.5})
    assert timed.decided(random_plan(tiny, share=0.3)).settled.measured == {}


def test_what_a_plan_leaves_whole_is_listed_whole(tiny, planned):
    widths = Widths({("blocks.0.mlp", "mlp_hidden"): 10}, planned.widths.ranks)
    decided = planned.decided(plan_of(tiny, widths))
    assert decided.widths.kept == {("blocks.0.mlp", "mlp_hidden"): 10, ("blocks.1.mlp", "mlp_hidden"): 192}
    assert decided.planned is planned
