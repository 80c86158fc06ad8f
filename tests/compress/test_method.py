"""allocation.json says what was decided, and what was planned where that differs."""

from __future__ import annotations

import pytest
from builders import random_plan

from toolchain.compress.method import allocate
from toolchain.cost import Widths
from toolchain.plan import CompressionPlan, Keep, LowRank
from toolchain.recipe import BudgetSection, CompressSection


@pytest.fixture
def planned(tiny):
    section = CompressSection(method="hybrid", allocation="uniform", neurons="magnitude")
    return allocate(tiny, section, BudgetSection(params=0.5), {})


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
    assert planned.decided(plan, tiny.groups) is planned
    assert "planned" not in planned.to_dict()


def test_another_decision_is_written_and_the_plan_before_it_kept(tiny, planned):
    plan = random_plan(tiny, share=0.3)
    decided = planned.decided(plan, tiny.groups).to_dict()
    before = planned.to_dict()
    cost = planned.dense.shrunk(Widths.of(plan), tiny.groups)
    assert (decided["predicted"]["params"], decided["predicted"]["macs"]) == (cost.params, cost.macs)
    assert decided["ratio"]["params"] == cost.params / planned.dense.params
    assert {(row["module"], row["unit"]): row["kept"] for row in decided["widths"]} == dict(Widths.of(plan).kept)
    assert decided["planned"] == {key: before[key] for key in ("predicted", "ratio", "widths", "ranks")}


def test_what_a_plan_leaves_whole_is_listed_whole(tiny, planned):
    widths = Widths({("blocks.0.mlp", "mlp_hidden"): 10}, planned.widths.ranks)
    decided = planned.decided(plan_of(tiny, widths), tiny.groups)
    assert decided.widths.kept == {("blocks.0.mlp", "mlp_hidden"): 10, ("blocks.1.mlp", "mlp_hidden"): 192}
    assert decided.planned is planned
