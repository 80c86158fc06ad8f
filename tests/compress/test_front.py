"""The front of choices: every point is the best of its cost, and all that could be chosen lies on one side of it."""

from __future__ import annotations

import itertools

import pytest
from builders import TINY, candidates_of, choices_of, costs_of, dense_model, problem_of
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.compress.allocation import allocate
from toolchain.compress.front import STEPS, front
from toolchain.compress.problem import Problem
from toolchain.compress.solver import Candidate
from toolchain.compress.stage import Compress, Weighing
from toolchain.cost import FileCost, Storage, Widths
from toolchain.errors import BudgetError, RecipeError
from toolchain.recipe import BudgetSection, CompressSection

MULTIPLES = {"head_dim": 4, "mlp_hidden": 16, "rank": 4}


@pytest.fixture(scope="module")
def model():
    return dense_model(**TINY)


@pytest.mark.slow
@pytest.mark.parametrize("section", [CompressSection(), CompressSection(attention="data_aware")], ids=["dims", "ranks"])
@pytest.mark.parametrize("name", ["params", "macs"])
@settings(max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_nothing_that_costs_no_more_does_less_damage(model, section, name, seed):
    choices = choices_of(model, section, MULTIPLES)
    costs, candidates = costs_of(model), candidates_of(choices, seed)
    keys = dict.fromkeys(each.key for each in candidates)
    picks = itertools.product(*([each for each in candidates if each.key == key] for key in keys))
    whole = costs.whole[name]
    every = [
        (costs.of(choices.widths({each.key: each.kept for each in pick}))[name] / whole, sum(e.damage for e in pick))
        for pick in picks
    ]
    points = front(candidates, choices, costs, name)
    for point in points:
        cheaper = [damage for cost, damage in every if cost <= point.ratio[name] + 1e-12]
        assert point.damage <= min(cheaper, default=float("inf")) + 1e-12
    assert [point.ratio[name] for point in points] == sorted(point.ratio[name] for point in points)
    assert [point.damage for point in points] == sorted((point.damage for point in points), reverse=True)
    assert points[-1].damage == 0  # the whole model
    assert len(points) <= STEPS


def test_widths_that_cost_more_and_do_more_damage_are_never_on_it(model):
    choices = choices_of(model, None, MULTIPLES)
    key = next(iter(choices.chosen(choices.uniform(1.0))))
    total = choices.chosen(choices.uniform(1.0))[key]
    candidates = [Candidate(key, total // 4, 1.0), Candidate(key, total // 2, 2.0), Candidate(key, total, 0.0)]
    points = front(candidates, choices, costs_of(model), "params")
    assert [point.damage for point in points] == [1.0, 0.0]


def test_nothing_was_measured(model):
    assert front([], choices_of(model), costs_of(model), "params") == ()


def test_an_allocation_carries_the_front_of_its_first_budget(model):
    problem = problem_of(model, None, BudgetSection(macs=0.6), MULTIPLES)
    found = allocate(problem, candidates_of(problem.choices))
    assert found.front[0].ratio["macs"] < 0.6 < found.front[-1].ratio["macs"]
    own = sum(found.damage.values())
    assert min(point.damage for point in found.front if point.ratio["macs"] <= 0.6) >= own - 1e-12
    assert found.to_dict()["front"][0] == {"ratio": dict(found.front[0].ratio), "damage": found.front[0].damage}


# Files of other precisions


EIGHT = FileCost("int8", Storage(weight=1, output=5), rest=5000, damage=0.002)
FOUR = FileCost("int4", Storage(weight=0.5, output=5, other=2), rest=5000, damage=0.03)


def asked(model, size, files, **budget):
    return Problem.of(model, CompressSection(), BudgetSection(size=size, **budget), MULTIPLES, files=files)


def middle(model, file):
    """A size between that of the narrowest and of the whole model."""
    problem = problem_of(model, None, BudgetSection(), MULTIPLES)
    least, most = (file.bytes_of(problem.costs.shape(widths)) for widths in (problem.narrowest, Widths()))
    return f"{(least + most) / 2 / 1000:.1f} kB", round((least + most) / 2, -2)


def test_the_file_of_a_precision_keeps_its_budget_and_hardly_anything_is_wasted(model):
    text, size = middle(model, EIGHT)
    problem = asked(model, {"int8": text}, [EIGHT])
    found = allocate(problem, candidates_of(problem.choices))
    (file,) = found.files
    assert (file.precision, file.requested, file.rounding) == ("int8", pytest.approx(size, abs=1), 0.002)
    assert 0.95 * size < file.predicted <= size
    assert file.predicted == pytest.approx(EIGHT.bytes_of(found.predicted), abs=1)
    assert file.reachable[0] < size < file.reachable[1]


def test_a_share_is_of_the_dense_weights_in_fp32(model):
    problem = asked(model, {"int8": "50%"}, [EIGHT])
    found = allocate(problem, candidates_of(problem.choices))
    assert found.files[0].predicted <= 0.5 * problem.shape.size_bytes < 1.1 * found.files[0].predicted


def test_several_files_are_limited_at_once(model):
    sizes = {file.precision: middle(model, file)[0] for file in (EIGHT, FOUR)}
    problem = asked(model, sizes, [EIGHT, FOUR], params=0.9)
    found = allocate(problem, candidates_of(problem.choices))
    assert all(file.predicted <= file.requested for file in found.files)


def test_an_open_precision_is_the_one_of_least_damage_in_all(model):
    """Widths and rounding together: four bits leave wider layers, and that pays only where rounding takes less than it gives."""

    size, _ = middle(model, EIGHT)

    def chosen(rounding):
        problem = asked(model, {"any": size}, [EIGHT, FileCost("int4", FOUR.storage, 5000, damage=rounding)])
        candidates = candidates_of(problem.choices)
        each = {one.file: allocate(one, candidates) for one in problem.options}
        decided, _ = Compress(None, weighing=Weighing(candidates)).decide(problem)
        assert decided.total == min(one.total for one in each.values())
        assert [file.precision for file in decided.files if file.requested is not None] == [decided.problem.file]
        return decided.problem.file, each

    file, each = chosen(0.0)
    assert file == "int4"
    assert each["int4"].predicted.params > each["int8"].predicted.params
    worth = sum(each["int8"].damage.values()) + 0.002 - sum(each["int4"].damage.values())
    assert chosen(worth * 0.99)[0] == "int4"
    assert chosen(worth * 1.01)[0] == "int8"


def test_where_no_measured_width_fits_the_widest_option_is_taken(model):
    """Damage is held below the narrowest measured width, so it says nothing of widths there, and rounding would decide alone."""
    candidates = candidates_of(problem_of(model, None, BudgetSection(), MULTIPLES).choices, shares=(0.9,))
    files = [EIGHT, FileCost("int4", FOUR.storage, 5000, damage=10.0)]
    size = middle(model, files[1])[0]
    problem = asked(model, {"any": size}, files)
    assert [one.file for one in problem.options] == ["int4"] or len(problem.options) == 2
    decided, _ = Compress(None, weighing=Weighing(candidates)).decide(problem)
    widest = max(problem.options, key=lambda one: one.costs.of(one.uniform)["params"])
    assert decided.problem.file == widest.file == "int4"


def test_a_file_that_was_not_measured_is_not_compressed_for(model):
    for size in ({"int8": "50%"}, {"any": "50%"}):
        problem = asked(model, size, [FileCost("int8", EIGHT.storage)])
        with pytest.raises(RecipeError, match=r"budget\.size\.(int8|any) needs the files of the dense model"):
            Compress(None, weighing=Weighing()).decide(problem)
    with pytest.raises(RecipeError, match=r"budget\.size\.any needs what files"):
        asked(model, {"any": "50%"}, [])


def test_linears_that_stay_in_fp32_shrink_as_such(model):
    shape = problem_of(model, None, BudgetSection(), MULTIPLES).shape
    name = next(each for each in shape.linears if each.endswith("fc2"))
    own = shape.linears[name]
    plain, whole = (EIGHT.measured(shape, 100_000, left, None) for left in ((), (name,)))
    assert plain.bytes_of(shape) == whole.bytes_of(shape) >= 100_000
    half = shape.shrunk(Widths({(name.removesuffix(".fc2"), "mlp_hidden"): own.in_features // 2}), model.groups)
    saved = whole.bytes_of(half) - plain.bytes_of(half)
    assert saved == -3 * own.out_features * (own.in_features - own.in_features // 2), (
        "three bytes more a weight that goes"
    )


def test_a_precision_that_cannot_meet_it_is_no_option(model):
    problem = asked(model, {"any": middle(model, FOUR)[0]}, [EIGHT, FOUR])
    assert [one.file for one in problem.options] == ["int4"]


def test_a_budget_of_a_file_that_is_out_of_reach_names_the_range(model):
    with pytest.raises(BudgetError, match=r"budget\.size\.int8 asks for 5,000 .* reachable is [\d,]+ … [\d,]+"):
        asked(model, {"int8": "5 kB"}, [EIGHT])
    with pytest.raises(BudgetError, match=r"no file .* budget\.size\.int4"):
        asked(model, {"any": "5 kB"}, [EIGHT, FOUR])
