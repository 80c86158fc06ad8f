"""What a branch can lose: the data-aware split, what the output cares about, and the scales that are folded away."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from builders import TWINS, VARIANTS, dense_model, variant
from test_closed_form import UNITS, Noise, outputs, sites, teacher

from toolchain.compress.branches import first_residual
from toolchain.compress.choices import key_of
from toolchain.compress.damage import follow
from toolchain.compress.factorisations import factorise, principal_outputs, truncated_svd
from toolchain.compress.moments import Moments
from toolchain.compress.reductions import REDUCTIONS, sites_in
from toolchain.compress.sensitivity import FLOOR, Sensitivity, sensitivities
from toolchain.compress.sequential import Pass, reduce_sequentially
from toolchain.errors import DataError, ModelError
from toolchain.families import Factorizable
from toolchain.likelihood import CATEGORICAL, likelihood_of
from toolchain.model import TimmModel
from toolchain.surgery.factorised import FactorisedLinear
from toolchain.surgery.scales import fold_scales


def splits(model: TimmModel) -> list[Factorizable]:
    return [item for item in model.family.factorizable(model.module) if item.kind == "attention"]


@pytest.mark.parametrize("case", [*VARIANTS, *TWINS])
def test_full_rank_is_the_model_itself(case):
    model = variant(case)
    module, found = copy.deepcopy(model.module), splits(model)
    ranks = {key_of(item): min(module.get_submodule(item.linear).weight.shape) for item in found}
    reduce_sequentially(teacher(model), module, found, ranks, Noise(model, 24), Pass(1.0))
    before, after = (outputs(m, Noise(model, 6, seed=1).images) for m in (model.module, module))
    assert (before - after).abs().max() <= 1e-5 * max(1.0, float(before.abs().max()))
    assert not any(isinstance(child, FactorisedLinear) for child in module.modules())


@pytest.mark.parametrize("case", ["classic", "layer scale", "q/k norm", "no proj bias"])
def test_the_split_beats_the_same_rank_by_weight_alone(case):
    model = variant(case)
    data, fresh = Noise(model, 256), Noise(model, 32, seed=1).images
    ranks = {item.linear: 12 for item in splits(model)}
    aware, plain = copy.deepcopy(model.module), copy.deepcopy(model.module)
    widths = {key_of(item): 12 for item in splits(model)}
    reduce_sequentially(teacher(model), aware, splits(model), widths, data, Pass(0.5))
    factorise(plain, ranks, truncated_svd)
    wanted = outputs(model.module, fresh)
    errors = [float((outputs(module, fresh) - wanted).square().mean()) for module in (aware, plain)]
    assert 0 < errors[0] < errors[1]
    kinds = {name: type(aware.get_submodule(name)) for name in ranks}
    assert set(kinds.values()) == {FactorisedLinear}


def test_principal_outputs_are_optimal_in_their_norm():
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).double()

    weight, mix, metric = drawn(12, 8), drawn(8, 8), drawn(12, 12)
    covariance = mix @ mix.T
    values, vectors = torch.linalg.eigh(metric @ metric.T)
    roots = tuple((vectors * values.pow(power)) @ vectors.T for power in (0.5, -0.5))
    up, down = principal_outputs(weight, covariance, roots)
    assert torch.allclose(up @ down, weight)
    for rank in (2, 5):
        lost = roots[0] @ (weight - up[:, :rank] @ down[:rank]) @ mix
        # Eckart–Young: no matrix of this rank comes closer than the dropped singular values of L W S^½.
        best = torch.linalg.svdvals(roots[0] @ weight @ mix)[rank:].square().sum()
        assert float(lost.square().sum()) == pytest.approx(float(best), rel=1e-8)


def test_sensitivity_is_the_gradient_of_the_models_own_predictions(tiny):
    data = Noise(tiny, 8)
    found = sensitivities(tiny.module, tiny.family, data, seed=3, likelihood=CATEGORICAL)
    last = tiny.family.branches(tiny.module)[-1]
    tokens = found[last.module].tokens
    assert torch.allclose(tokens.mean(), torch.tensor(1.0).double())
    assert torch.allclose(tokens[1:], torch.tensor(FLOOR).double()), "the head reads the class token alone"
    first = found[tiny.family.branches(tiny.module)[0].module]
    assert (first.tokens > FLOOR).all()
    assert torch.allclose(first.root @ first.inverse_root, torch.eye(48).double(), atol=1e-8)
    again = sensitivities(tiny.module, tiny.family, data, seed=3, likelihood=CATEGORICAL)
    assert all(found[name].root.equal(again[name].root) for name in found)
    assert not any(parameter.grad is not None for parameter in tiny.module.parameters())
    assert all(parameter.requires_grad for parameter in tiny.module.parameters())


def test_sensitivity_reads_no_labels(tiny):
    class Labelled(Noise):
        def __getitem__(self, index):
            return self.images[index], 10**6  # an index out of range, wherever it were used

    plain, labelled = (
        sensitivities(tiny.module, tiny.family, kind(tiny, 8), 0, CATEGORICAL) for kind in (Noise, Labelled)
    )
    assert all(plain[name].root.equal(labelled[name].root) for name in plain)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            lambda module: module.head.weight.fill_(3e38),
            pytest.raises(ModelError, match="not finite in float32: check"),
        ),
        (
            lambda module: module.head.weight.zero_(),
            pytest.raises(DataError, match="outputs are the same for all 8 cali"),
        ),
        (lambda module: module.norm.weight.zero_(), pytest.raises(DataError, match="weights that look at the image")),
    ],
)
@pytest.mark.parametrize("output", ["logits", "multi-label"])
def test_outputs_that_say_nothing_are_refused(change, error, output):
    model = dense_model()
    with torch.no_grad():
        change(model.module)
    likelihood = likelihood_of(output, model.module, Noise(model, 8))
    with error:
        sensitivities(model.module, model.family, Noise(model, 8), 0, likelihood)


def test_a_single_image_need_not_vary(tiny):
    assert sensitivities(tiny.module, tiny.family, Noise(tiny, 1), 0, CATEGORICAL)


def test_a_step_is_predicted_by_the_sensitivity(tiny):
    """An error in a direction that the output cares about costs more divergence than an equal one that it does not."""
    data = Noise(tiny, 64)
    branch = tiny.family.branches(tiny.module)[1]
    care = sensitivities(tiny.module, tiny.family, data, 0, CATEGORICAL)[branch.module]
    values, vectors = torch.linalg.eigh(care.root)
    costs = []
    for direction in (vectors[:, 0], vectors[:, -1]):
        module = copy.deepcopy(tiny.module)
        with torch.no_grad():
            module.get_submodule(branch.reader).bias.add_(0.3 * direction.float())
        costs.append(float((outputs(module, data.images) - outputs(tiny.module, data.images)).square().mean()))
    assert values[-1] > 1.5 * values[0]
    assert costs[1] > 1.5 * costs[0]


def test_scales_fold_exactly():
    model = variant("layer scale")
    module = copy.deepcopy(model.module)
    fold_scales(module, model.family.branches(module))
    images = Noise(model, 4).images
    assert (outputs(model.module, images) - outputs(module, images)).abs().max() <= 1e-5
    assert float(module.get_submodule("blocks.0.ls1").gamma.detach().min()) == 1.0
    assert not module.get_submodule("blocks.0.attn.proj").weight.equal(
        model.module.get_submodule("blocks.0.attn.proj").weight
    )


def test_gated_attention_is_not_rotated():
    model = dense_model("vit_tiny_patch16_224")
    attention = model.module.get_submodule("blocks.0.attn")
    attention.gate = torch.nn.Linear(48, 48)
    groups = {(g.module, g.unit): g for g in model.family.unit_groups(model.module)}
    assert not groups["blocks.0.attn", "head_dim"].mixable
    assert groups["blocks.1.attn", "head_dim"].mixable
    assert any("gate" in limit for limit in model.family.restrictions(model.module))


def test_damage_follows_the_error_between_measured_widths():
    errors = [16.0, 8.0, 4.0, 2.0, 1.0]
    assert follow(errors, {2: 0.4}) == pytest.approx([1.6, 0.8, 0.4, 0.2, 0.1])
    found = follow(errors, {0: 8.0, 4: 0.1})
    assert found[0] == 8.0
    assert found[4] == 0.1
    ratios = [d / e for d, e in zip(found, errors, strict=True)]
    assert all(a > b for a, b in itertools.pairwise(ratios)), "the ratio moves from one end to the other"
    assert follow([], {}) == []


def test_weighted_moments_count_rows_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 5, generator=generator) + 3, torch.randn(40, 2, generator=generator) - 7
    weights = torch.arange(40) % 3
    counted, plain = Moments(), Moments()
    for part in range(0, 40, 10):
        rows = slice(part, part + 10)
        counted.add(x[rows], y[rows], weights[rows].float())
    plain.add(x.repeat_interleave(weights, 0).double(), y.repeat_interleave(weights, 0).double())
    for name in ("mean", "covariance", "other_mean", "cross"):
        assert torch.allclose(getattr(counted, name), getattr(plain, name), rtol=1e-5, atol=1e-5), name
    assert counted.weight == pytest.approx(plain.weight)


def test_every_unit_of_a_method_has_a_reduction(tiny):
    branches = tiny.family.branches(tiny.module)
    found = [site for branch in branches for site in sites_in(branch, [*sites(tiny), *splits(tiny)])]
    assert {key_of(site)[1] for site in found} == set(REDUCTIONS) == {*UNITS, "rank"}
    assert len(found) == len(sites(tiny)) + len(splits(tiny))


def test_reductions_can_be_cut_again_and_widened_back(tiny):
    module = copy.deepcopy(tiny.module)
    stream = first_residual(module, "blocks.0", Noise(tiny, 16))
    for site in [*sites(tiny)[:2], *splits(tiny)[:2]]:
        branch = next(b for b in tiny.family.branches(module) if sites_in(b, [site]) == [site])
        total = min(module.get_submodule(site.linear).weight.shape) if isinstance(site, Factorizable) else site.total
        with torch.no_grad():
            before = [branch.run(module, x) for x in stream]
        reduction = REDUCTIONS[key_of(site)[1]](module, branch, site, stream, Sensitivity.flat(48, 5))
        moved = []
        for width in (total // 3, total):
            reduction.apply(width)
            with torch.no_grad():
                after = [branch.run(module, x) for x in stream]
            moved.append(max(float((y - x).abs().max()) for x, y in zip(before, after, strict=True)))
        assert moved[0] > 20 * moved[1], (key_of(site), moved)


def test_no_rank_is_spent_on_what_makes_removed_neurons():
    """Neurons and attention of one branch come out of one linear, where it cannot be rotated."""
    model = variant("parallel scaling, normed")
    module, branch = copy.deepcopy(model.module), model.family.branches(model.module)[0]
    stream = first_residual(module, "blocks.0", Noise(model, 16))
    neurons = next(group for group in model.groups if group.unit == "mlp_hidden")
    into = next(item for item in splits(model) if item.linear.endswith("in_proj"))
    care = Sensitivity.flat(48, stream[0].shape[1])
    reduction = REDUCTIONS["mlp_hidden"](module, branch, neurons, stream, care)
    linear = module.get_submodule(into.linear)
    whole = linear.weight.detach().clone(), linear.bias.detach().clone()
    reduction.apply(20)
    gone = torch.ones(neurons.total, dtype=torch.bool)
    gone[list(reduction.indices(20))] = False
    split = REDUCTIONS["rank"](module, branch, into, stream, care)
    split.apply(12)
    made = module.get_submodule(into.linear).up
    for part in (made.weight, made.bias):
        assert part[: neurons.total][gone].abs().max() < 1e-9 < part[: neurons.total][~gone].abs().max()
    split.apply(48)
    reduction.apply(neurons.total)
    assert linear.weight.equal(whole[0])
    assert linear.bias.equal(whole[1])
