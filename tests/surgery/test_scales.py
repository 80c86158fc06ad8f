"""LayerScales: moved into the linear before them and given back, without a change of the function."""

from __future__ import annotations

import copy

import pytest
import torch
from builders import close, images, variant

from toolchain.surgery.scales import LEAST_SCALE, fold_scales, restore_scales


@pytest.mark.parametrize("zeros", [False, True])
def test_scales_are_given_back_without_a_change_of_the_function(zeros):
    model = variant("parallel")
    branches = [branch for branch in model.family.branches(model.module) if branch.scale is not None]
    assert branches
    if zeros:
        for branch in branches:
            model.module.get_parameter(branch.scale).data[::3] = 0
    module, x = copy.deepcopy(model.module), images(model)
    fold_scales(module, branches)
    assert all(bool((module.get_parameter(branch.scale) == 1).all()) for branch in branches)
    restore_scales(module, model.module, branches)
    for branch in branches:
        gamma, dense = (each.get_parameter(branch.scale).detach() for each in (module, model.module))
        least = LEAST_SCALE * float(dense.square().mean().sqrt())
        away = dense.abs() >= least
        assert torch.equal(gamma[away], dense[away])
        assert torch.allclose(gamma[~away].abs(), torch.tensor(least))
        assert bool(away.all()) != zeros
    with torch.no_grad():
        assert close(module(x), model.module(x))


def test_linears_have_the_size_that_they_were_trained_in():
    model = variant("parallel")
    branches = [branch for branch in model.family.branches(model.module) if branch.scale is not None]
    module = copy.deepcopy(model.module)
    fold_scales(module, branches)
    restore_scales(module, model.module, branches)
    for branch in branches:
        ours, theirs = (each.get_submodule(branch.reader).weight for each in (module, model.module))
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_scales_that_are_all_zero_stay_folded():
    model = variant("parallel")
    branch = next(branch for branch in model.family.branches(model.module) if branch.scale is not None)
    model.module.get_parameter(branch.scale).data.zero_()
    module = copy.deepcopy(model.module)
    fold_scales(module, [branch])
    restore_scales(module, model.module, [branch])
    assert bool((module.get_parameter(branch.scale) == 1).all())
    assert not module.get_submodule(branch.reader).weight.any()
