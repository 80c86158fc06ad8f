"""What every family owes: branches that are the model, the linears that it computes with, and a reason for each refusal."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from builders import STRUCTURES, named, randomise, variant
from torch import nn

from toolchain.compress.branches import first_residual
from toolchain.families import Branch, adapt, family_of
from toolchain.plan import ModelRef
from toolchain.surgery.replay import create_dense


def meta(name: str, **kwargs: object) -> nn.Module:
    """A timm model without weights."""
    with torch.device("meta"):
        return create_dense(ModelRef(name=name, kwargs=kwargs))


def images(size: tuple[int, int, int], batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(1))


def agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * max(1.0, float(a.abs().max())))


@pytest.mark.parametrize("case", STRUCTURES)
def test_the_branches_one_after_another_are_the_model(case):
    model = variant(case)
    x = images(model.preprocess.input_size)
    blocks = model.family.blocks(model.module)
    data = torch.utils.data.TensorDataset(x, torch.zeros(len(x), dtype=torch.long))
    stream = first_residual(model.module, blocks[0].path, data)
    with torch.no_grad():
        wanted = model.module(x)
        (x,), added = stream, []
        for step in (step for block in blocks for step in block.steps):
            if isinstance(step, Branch):
                added.append(step.run(model.module, x))
            x = step(model.module, x)
        outputs = model.family.head(model.module, x)
    assert agree(wanted, outputs)
    assert min(float(each.abs().max()) for each in added) > 1e-3, "a branch that adds nothing: vacuous"


@pytest.mark.parametrize("case", STRUCTURES)
def test_what_a_branch_adds_is_what_its_last_module_gives(case):
    model = variant(case)
    x = images(model.preprocess.input_size)
    added = {}
    handles = [
        model.module.get_submodule(branch.added).register_forward_hook(
            lambda _m, _i, out, name=branch.module: added.update({name: out})
        )
        for branch in model.family.branches(model.module)
    ]
    blocks = model.family.blocks(model.module)
    data = torch.utils.data.TensorDataset(x, torch.zeros(len(x), dtype=torch.long))
    (stream,) = first_residual(model.module, blocks[0].path, data)
    with torch.no_grad():
        model.module(x)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        for step in (step for block in blocks for step in block.steps):
            if isinstance(step, Branch):
                y = step.run(model.module, stream)
                assert agree(added[step.module].reshape(y.shape), y)
            stream = step(model.module, stream)


@pytest.mark.parametrize("case", STRUCTURES)
def test_an_adapted_model_is_the_function_that_timm_made(case):
    name, kwargs = named(case)
    fresh = randomise(timm.create_model(name, **kwargs).eval())
    adapted = copy.deepcopy(fresh)
    adapt(adapted)
    size = family_of(adapted, case).input_size(adapted)
    with torch.no_grad():
        assert agree(fresh(images(size)), adapted(images(size)))


@pytest.mark.parametrize("case", STRUCTURES)
def test_every_linear_of_an_adapted_model_is_called(case):
    """What is computed past a module can be neither counted, nor looked at, nor replaced."""
    model = variant(case)
    called = set()
    linears = {name: child for name, child in model.module.named_modules() if isinstance(child, nn.Linear)}
    handles = [child.register_forward_hook(lambda *_, name=name: called.add(name)) for name, child in linears.items()]
    with torch.no_grad():
        model.module(images(model.preprocess.input_size))
    for handle in handles:
        handle.remove()
    assert called == set(linears)


@pytest.mark.parametrize("case", STRUCTURES)
def test_spans_lie_inside_their_linears_and_never_overlap(case):
    """Each position of a unit is one row or column of its own, so removing it can damage no other."""
    model = variant(case)
    assert len({(group.module, group.unit) for group in model.groups}) == len(model.groups)
    for group in model.groups:
        taken: set[tuple[str, int, int]] = set()
        for span in group.spans:
            linear = model.module.get_submodule(span.linear)
            assert isinstance(linear, nn.Linear)
            assert span.width == group.total
            last = span.offset + group.partitions * span.width
            assert last <= (linear.out_features if span.axis == 0 else linear.in_features)
            places = {(span.linear, span.axis, place) for place in range(span.offset, last)}
            assert not places & taken
            taken |= places
        for span in group.rescale_on_slice:
            assert span in group.spans
