"""What was tried once: attentions whose parts shrink apart, and streams of fewer dims, are the functions that they claim to be."""

from __future__ import annotations

import copy

import pytest
import torch
from builders import close, images, problem_of
from experiments import halves
from experiments.freer_attention import freed
from experiments.narrower_stream import Narrower
from experiments.page import page
from experiments.starts import NAME, RESULTS
from experiments.streams import NarrowFamily, narrow, narrowed, read, write_within
from records import Results

from toolchain.compress.branches import first_residual
from toolchain.compress.choices import key_of
from toolchain.compress.reductions import REDUCTIONS, AttentionReduction
from toolchain.compress.sensitivity import Teacher, sensitivities
from toolchain.compress.sequential import Pass, reduce_sequentially
from toolchain.cost import trace
from toolchain.likelihood import CATEGORICAL
from toolchain.model import TimmModel


class Noise(torch.utils.data.Dataset):
    def __init__(self, model: TimmModel, count: int) -> None:
        self.images = images(model, count)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], -1


@pytest.fixture
def parts(register):
    """The closed form can cut parts until the test ends."""
    for each in halves.PARTS:
        register(REDUCTIONS, each)


def teacher_of(model: TimmModel, seen: Noise) -> Teacher:
    cares = sensitivities(model.module, model.family, seen, 0, CATEGORICAL)
    return Teacher(model.module, model.family, CATEGORICAL, cares)


def reduced(model: TimmModel, form: str, share: float, **how: bool) -> torch.nn.Module:
    problem, seen = freed(problem_of(model), form, 1.0), Noise(model, 16)
    module = copy.deepcopy(model.module)
    widths = {key_of(site): problem.choices.kept(site, share * site.total) for site in problem.sites}
    reduce_sequentially(teacher_of(model, seen), module, problem.sites, widths, seen, Pass(0.0, **how))
    return module


@pytest.mark.parametrize("form", halves.FORMS)
@pytest.mark.usefixtures("parts")
def test_nothing_reduced_changes_nothing(tiny, form):
    x = images(tiny)
    with torch.no_grad():
        assert close(reduced(tiny, form, 1.0)(x), tiny.module(x))


@pytest.mark.usefixtures("parts")
def test_two_ranks_that_are_equal_are_the_tied_one(tiny):
    whole = next(group for group in tiny.groups if group.unit == "head_dim")
    branch, seen = tiny.family.branches(tiny.module)[0], Noise(tiny, 16)
    care, stream = teacher_of(tiny, seen).cares[branch.module], first_residual(tiny.module, "blocks.0", seen)
    tied, apart = copy.deepcopy(tiny.module), copy.deepcopy(tiny.module)
    AttentionReduction(tied, branch, whole, stream, care).apply(whole.total // 2)
    for part in halves.parts_of(whole)[1::-1]:  # values first: their moments do not feel what queries lose
        REDUCTIONS[part.unit](apart, branch, part, stream, care).apply(whole.total // 2)
    with torch.no_grad():
        assert close(branch.run(apart, stream[0]), branch.run(tied, stream[0]), 1e-4)
        assert not close(branch.run(apart, stream[0]), branch.run(tiny.module, stream[0]), 1e-3)


@pytest.mark.parametrize("form", halves.FORMS)
@pytest.mark.usefixtures("parts")
def test_costs_count_the_rows_and_columns_that_are_left(tiny, form):
    module = reduced(tiny, form, 0.5, refit=False)
    problem = freed(problem_of(tiny), form, 1.0)
    kept = {key_of(site): problem.choices.kept(site, 0.5 * site.total) for site in problem.sites}
    left = problem.costs.shape(problem.choices.widths(kept)).linears
    for name in left:
        if name.endswith(("attn.qkv", "attn.proj")):
            weight, axis = module.get_submodule(name).weight, 1 if name.endswith("qkv") else 0
            rows = int((weight.abs().sum(axis) > 0).sum())
            assert rows == (left[name].out_features if axis else left[name].in_features)


@pytest.mark.usefixtures("parts")
def test_heads_go_as_a_whole(tiny):
    module = reduced(tiny, "whole heads", 0.5, refit=False)
    whole = next(group for group in tiny.groups if group.unit == "head_dim")
    columns = module.get_submodule("blocks.0.attn.proj").weight.abs().sum(0).reshape(whole.partitions, whole.total)
    assert sorted((columns > 0).sum(1).unique().tolist()) == [0, whole.total]


def test_units_of_every_form_cost_what_attention_costs(tiny):
    dense = problem_of(tiny).shape
    for form in halves.FORMS:
        problem = freed(problem_of(tiny), form, 1.0)
        for group in (each for each in problem.choices.groups if each.unit != "mlp_hidden"):
            assert all(span.offset + group.partitions * span.width <= 3 * 48 for span in group.spans)
        half = problem.costs.shape(problem.choices.uniform(0.5))
        assert half.params < dense.params


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("width", [48, 36])
def test_a_narrower_stream_is_a_stock_model(tiny, width, weighed):
    stream = narrow(read(tiny.module, Noise(tiny, 8), CATEGORICAL, 0), width, weighed=weighed)
    module, x = copy.deepcopy(tiny.module), images(tiny)
    write_within(module, stream)
    made = narrowed(module, stream)
    with torch.no_grad():
        assert close(made(x), module(x))
        assert close(module(x), tiny.module(x)) == (width == 48)
    assert stream.width == width
    assert trace(made, tiny.family, tiny.preprocess.input_size).params == sum(p.numel() for p in made.parameters())


def test_the_pass_stays_within_the_stream(tiny):
    seen, problem = Noise(tiny, 16), problem_of(tiny)
    stream = narrow(read(tiny.module, seen, CATEGORICAL, 0), 36)
    narrower = Narrower.of(problem, stream)
    cares = teacher_of(tiny, seen).cares
    teacher = Teacher(tiny.module, NarrowFamily(tiny.module, stream), CATEGORICAL, cares)
    widths = {key_of(site): site.total // 2 for site in problem.sites}
    reduce_sequentially(teacher, narrower.module, problem.sites, widths, seen, Pass(0.5))
    with torch.no_grad():
        assert close(narrowed(narrower.module, stream)(seen.images), narrower.module(seen.images), 1e-4)


def test_the_page_is_what_its_records_say():
    assert page(Results(RESULTS)) == (RESULTS / NAME / "README.md").read_text(encoding="utf-8")
