"""What every way to compress owes, whichever it is: parametrised over the tables, so a new entry is tested at once."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from builders import TWINS, dense_model, problem_of, variant
from sweeps import swept

from toolchain.compress.criteria import CRITERIA
from toolchain.compress.factorisations import FACTORISATIONS
from toolchain.compress.method import Method
from toolchain.compress.solver import ALLOCATIONS
from toolchain.compress.stage import Compress
from toolchain.cost import Widths, trace
from toolchain.data import DataSource, open_source
from toolchain.data.transforms import Wanted
from toolchain.errors import RecipeError
from toolchain.model import MaskedModel, TimmModel, run_stage
from toolchain.plan import CompressionPlan
from toolchain.recipe import BudgetSection, CompressSection, VtpSection
from toolchain.surgery.mask import baked, mask_model
from toolchain.surgery.replay import load_model, rebuild, save_model
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split

DIGITS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
SHARE = 0.72
NEURONS = (*CRITERIA, "none")
ATTENTION = (*FACTORISATIONS, "none")


def goes_together(way: tuple[str, str, str]) -> bool:
    """Whether a recipe may ask for it."""
    attention, neurons, allocation = way
    try:
        Method.of(CompressSection(attention=attention, neurons=neurons, allocation=allocation))
    except RecipeError:
        return False
    return (attention, neurons) != ("none", "none")


WAYS = [
    (attention, neurons, allocation)
    for attention in ATTENTION
    for neurons in NEURONS
    for allocation in ALLOCATIONS
    if goes_together((attention, neurons, allocation))
]


def covering(ways: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The first ways in which each entry of a table is met: as many as are needed where entries do not know each other."""
    seen: set[tuple[int, str]] = set()
    chosen = []
    for way in ways:
        if not seen.issuperset(enumerate(way)):
            seen.update(enumerate(way))
            chosen.append(way)
    return chosen


EVERY_WAY = pytest.mark.parametrize("way", swept(WAYS, covering(WAYS)), ids="-".join)


@cache
def digits() -> DataSource:
    """Few to train on."""
    opened = open_source("digits", Wanted((1, 8, 8), {}, calibration_images=32))
    return replace(opened, splits={**opened.splits, "train": opened.split("train").take(torch.arange(64))})


@cache
def dense() -> TimmModel:
    return dense_model("vit_tiny_patch16_224", **DIGITS)


@cache
def compressed(way: tuple[str, str, str]) -> MaskedModel:
    """Made once for all tests, which do not change it."""
    attention, neurons, allocation = way
    section = CompressSection(
        method="hybrid",
        attention=attention,
        neurons=neurons,
        allocation=allocation,
        vtp=VtpSection(epochs=1, gate_lr=0.05, batch_size=32),
    )
    problem = problem_of(dense(), section, BudgetSection(params=share(way)))
    return run_stage(Compress(digits()), problem).artifact


def share(way: tuple[str, str, str]) -> float:
    """Attention alone is a smaller part of the model."""
    return 0.88 if way[1] == "none" else SHARE


def images(count: int = 5) -> torch.Tensor:
    return torch.stack([digits().split("test")[index][0] for index in range(count)])


@EVERY_WAY
def test_the_budget_is_met_and_used(way):
    masked = compressed(way)
    deploy = run_stage(Split(), run_stage(Slice(), masked).artifact).artifact
    left = sum(p.numel() for p in deploy.module.parameters())
    whole = sum(p.numel() for p in dense().module.parameters())
    assert 0.99 * share(way) * whole <= left <= share(way) * whole
    shape = trace(dense().module, dense().family, dense().preprocess.input_size)
    assert shape.shrunk(Widths.of(masked.plan), masked.groups).params == left


def reproduced(model: TimmModel, section: CompressSection, source: DataSource) -> None:
    """Asserts that the whole stage, asked to leave everything, gives the dense model; little is measured, it decides nothing."""
    held_out = source.split("validation").take(torch.arange(16))
    source = replace(source, splits={**source.splits, "validation": held_out})
    whole = run_stage(Compress(source), problem_of(model, section, BudgetSection(params=1.0))).artifact
    deploy = run_stage(Split(), run_stage(Slice(), whole).artifact).artifact
    left, before = (sum(p.numel() for p in each.module.parameters()) for each in (deploy, model))
    assert left >= 0.97 * before, "biases and scales that are folded away are all that may go"
    x = torch.stack([source.split("test")[index][0] for index in range(5)])
    with torch.no_grad():
        expected, got = model.module(x), deploy.module(x)
    assert (expected - got).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


# Gates train the weights too. The solver decides nothing where everything is left; its one way is the default.
EXACT = [way for way in WAYS if "vtp" not in way and ("solver" not in way or way[:2] == ("joint", "obs"))]


@pytest.mark.parametrize("way", covering(EXACT), ids="-".join)
def test_leaving_everything_reproduces_the_dense_model(way):
    attention, neurons, allocation = way
    section = CompressSection(method="hybrid", attention=attention, neurons=neurons, allocation=allocation)
    reproduced(dense(), section, digits())


@pytest.mark.parametrize("case", ["classic", "EVA", "Swin", "Swin V2", "NaFlex", *TWINS])
def test_leaving_everything_reproduces_a_model_of_every_family(case):
    """What it calls is exact for every structure: tests/compress/test_closed_form.py."""
    model = variant(case)
    source = open_source("digits", Wanted(model.preprocess.input_size, {}, calibration_images=32))
    reproduced(model, CompressSection(allocation="uniform"), source)


@EVERY_WAY
def test_masked_sliced_and_split_agree(way):
    masked = compressed(way)
    sliced = run_stage(Slice(), masked).artifact
    deploy = run_stage(Split(), sliced).artifact
    x = images()
    with torch.no_grad():
        before, m, s, d = (part.module(x) for part in (dense(), masked, sliced, deploy))
    tolerance = 1e-5 * max(1.0, float(m.abs().max()))
    assert (m - s).abs().max() <= tolerance
    assert (s - d).abs().max() <= tolerance
    if "joint" in way or "obs" in way:  # what is left is re-fitted, almost perfectly on so small a model: look without
        bare = masked.plan.model_copy(update={"low_ranks": ()})
        with torch.no_grad():
            m = mask_model(dense(), copy.deepcopy(dense().module), bare).module(x)
    least = 2 * tolerance if "data_aware" in way else 1e-2 * before.std()  # it fits what it changes, all the more so
    assert (before - m).abs().max() >= least, "the plan changes nothing: vacuous"


@EVERY_WAY
def test_plan_and_weights_rebuild_the_model_bit_for_bit(way, tmp_path):
    masked = compressed(way)
    again = load_model(save_model(masked, tmp_path / "masked"))
    assert isinstance(again, MaskedModel)
    assert again.plan.to_json() == masked.plan.to_json()
    plan = CompressionPlan.from_json(masked.plan.to_json())
    state = baked(masked.module).state_dict()
    replayed = rebuild(masked.ref, "masked", plan, state, masked.preprocess, {})
    x = images()
    with torch.no_grad():
        expected = masked.module(x)
        assert torch.equal(again.module(x), expected)
        assert torch.equal(replayed.module(x), expected)


@EVERY_WAY
def test_the_plan_holds_what_was_asked_for_and_nothing_else(way):
    attention, neurons, allocation = way
    plan = compressed(way).plan
    factorised = attention in FACTORISATIONS and not FACTORISATIONS[attention].rotates
    assert bool(plan.low_ranks) == factorised or (factorised and allocation == "solver"), "a solver may leave it whole"
    units = {keep.unit for keep in plan.keeps} & {"head_dim", "mlp_hidden"}
    wanted = {unit for unit, asked in (("head_dim", attention == "joint"), ("mlp_hidden", neurons != "none")) if asked}
    assert units == wanted or (allocation == "solver" and units and units < wanted), "a solver may leave a unit whole"
    assert plan.provenance["method"]["allocation"] == allocation
    kept = [keep.kept for keep in plan.keeps if keep.unit == "mlp_hidden"]
    assert all(1 <= count < 192 for count in kept)
    if allocation == "uniform" and neurons != "none":
        assert max(kept) - min(kept) <= 1, "what rounding left is handed out one neuron at a time"


@pytest.mark.parametrize("way", covering(WAYS), ids="-".join)
def test_a_second_time_gives_the_same_bytes(way):
    """Under another global random state."""
    first = compressed(way).plan.to_json()
    torch.manual_seed(len(first))
    assert compressed.__wrapped__(way).plan.to_json() == first
