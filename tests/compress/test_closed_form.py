"""The closed form against its definitions: exact at full size, optimal where it says so, brute force where it fits."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from builders import STRUCTURES, TWINS, VARIANTS, problem_of, variant
from sweeps import FEW, swept

from toolchain.compress.branches import captured, first_residual
from toolchain.compress.choices import Choices, Site, key_of
from toolchain.compress.heads import Heads, exact_first_steps
from toolchain.compress.moments import Moments, cholesky, damped
from toolchain.compress.obs import DAMPING, anchored_refit, eliminate, predict_removed
from toolchain.compress.reductions import AttentionReduction
from toolchain.compress.sensitivity import Sensitivity, Teacher, sensitivities
from toolchain.compress.sequential import Pass, reduce_sequentially
from toolchain.compress.solver import Candidate, interpolate
from toolchain.errors import ModelError
from toolchain.families import UnitGroup
from toolchain.likelihood import CATEGORICAL
from toolchain.model import TimmModel

UNITS = ("head_dim", "mlp_hidden")


class Noise(torch.utils.data.Dataset):
    def __init__(self, model: TimmModel, count: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(count, *model.preprocess.input_size, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], -1


def sites(model: TimmModel) -> list[Site]:
    """What the default method reduces."""
    return list(problem_of(model).sites)


def widths(model: TimmModel, share: float) -> dict[tuple[str, str], int]:
    def whole(site: Site) -> int:
        return site.total if isinstance(site, UnitGroup) else min(model.module.get_submodule(site.linear).weight.shape)

    return {key_of(site): max(1, round(share * whole(site))) for site in sites(model)}


def teacher(model: TimmModel) -> Teacher:
    cares = sensitivities(model.module, model.family, Noise(model, 16, seed=2), 0, CATEGORICAL)
    return Teacher(model.module, model.family, CATEGORICAL, cares)


def outputs(module: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(images)


@pytest.mark.parametrize("case", ["classic", "Swin"])
def test_reducing_nothing_of_the_dense_stream_changes_nothing(case):
    unchanged(case, 0.0)


@pytest.mark.parametrize("case", swept(STRUCTURES))
def test_reducing_nothing_changes_nothing(case):
    unchanged(case, 1.0)


def unchanged(case: str, beta: float) -> None:
    """Asserts that a model of which all is kept computes what it did, by other weights where heads are rotated."""
    model = variant(case)
    module = copy.deepcopy(model.module)
    data = Noise(model, 24)
    reduce_sequentially(teacher(model), module, sites(model), widths(model, 1.0), data, Pass(beta))
    before, after = (outputs(m, Noise(model, 6, seed=1).images) for m in (model.module, module))
    assert (before - after).abs().max() <= 1e-5 * max(1.0, float(before.abs().max()))
    moved = [
        n for (n, a), b in zip(model.module.named_parameters(), module.parameters(), strict=True) if not a.equal(b)
    ]
    rotated = any(key[1] == "head_dim" for key in widths(model, 1.0))
    assert moved or not rotated, "the exact steps and rotations were not taken at all"


@pytest.mark.parametrize("case", swept([*VARIANTS, *TWINS], FEW))
def test_refit_repairs_what_the_reduction_broke(case):
    model = variant(case)
    data, fresh = Noise(model, 256), Noise(model, 32, seed=1).images
    errors = {}
    for with_refit in (False, True):
        module = copy.deepcopy(model.module)
        how = Pass(0.5, refit=with_refit)
        kept = reduce_sequentially(teacher(model), module, sites(model), widths(model, 0.5), data, how).kept
        errors[with_refit] = float((outputs(model.module, fresh) - outputs(module, fresh)).square().mean())
        assert set(kept) == set(widths(model, 0.5))
    assert 0 < errors[True] <= errors[False]


def test_exact_first_steps_are_exact_and_taken(tiny):
    module = copy.deepcopy(tiny.module)
    for group in tiny.groups:
        if group.unit == "head_dim":
            exact_first_steps(Heads(module, group))
            bias = module.get_submodule(group.module).qkv.bias.reshape(3, -1)
            assert bias[0].any()
            assert not bias[1:].any()
    images = Noise(tiny, 5).images
    assert (outputs(tiny.module, images) - outputs(module, images)).abs().max() <= 1e-5


def test_truncated_logits_err_by_the_dropped_singular_values(tiny):
    """E over queries and images of Σ_keys (Δ logit)², keys centred within the image, is N·Σ_{i>r} σ_i² in expectation."""
    module = copy.deepcopy(tiny.module)
    group = next(g for g in tiny.groups if g.unit == "head_dim")
    branch = tiny.family.branches(module)[0]
    stream = first_residual(module, "blocks.0", Noise(tiny, 4000))
    reduction = AttentionReduction(module, branch, group, stream, Sensitivity.flat(48, 5))
    heads = Heads(module, group)

    def gram(keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        with captured(module, {"blocks.0.attn.qkv": "out"}) as seen, torch.no_grad():
            query = key = 0
            for x in stream:
                branch.run(module, x)
                q, k = (heads.activations(role, seen["blocks.0.attn.qkv"]).double() for role in ("query", "key"))
                k = k - k.mean(2, keepdim=True)
                query = query + torch.einsum("bhnd,bhne->hde", q[..., keep:], q[..., keep:]) / (q.shape[2] * 4000)
                key = key + torch.einsum("bhnd,bhne->hde", k[..., keep:], k[..., keep:]) / (k.shape[2] * 4000)
        return query, key

    query, key = gram(0)
    # After the rotation both Gram matrices are the same diagonal Σ: the dropped part of the logits is Σ_{i>r} σ_i².
    for matrix in (query, key):
        off = matrix - torch.diag_embed(matrix.diagonal(dim1=1, dim2=2))
        assert off.abs().max() <= 1e-4 * matrix.abs().max()
    assert torch.allclose(query, key, rtol=1e-3, atol=1e-4 * float(query.max()))
    diagonal = query.diagonal(dim1=1, dim2=2)
    assert (diagonal[:, :-1] >= diagonal[:, 1:] - 1e-6).all()
    assert reduction.indices(5) == (0, 1, 2, 3, 4)


def correlated(width: int, seed: int = 0, rows: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator).double() + width**0.5 * torch.eye(width).double()
    return torch.randn(rows, width, generator=generator).double() @ mix + 1.0


def loss_of(weight: torch.Tensor, covariance: torch.Tensor, kept: tuple[int, ...]) -> float:
    """E‖W_P (h_P − best linear prediction from h_S)‖², from the Schur complement."""
    gone = [j for j in range(weight.shape[1]) if j not in kept]
    s, p = torch.tensor(kept, dtype=torch.long), torch.tensor(gone)
    schur = covariance[p][:, p] - covariance[p][:, s] @ torch.linalg.solve(covariance[s][:, s], covariance[s][:, p])
    return float((weight[:, p] @ schur @ weight[:, p].T).trace())


def test_elimination_is_greedy_and_its_damage_is_the_true_one():
    moments = Moments()
    moments.add(correlated(9))
    covariance, weight = moments.covariance, torch.randn(5, 9, generator=torch.Generator().manual_seed(1)).double()
    path = eliminate(weight, covariance)
    kept = tuple(range(9))
    for step in range(8):
        best = min(itertools.combinations(kept, len(kept) - 1), key=lambda s: loss_of(weight, covariance, s))
        kept = best
        assert tuple(path.kept(8 - step).tolist()) == best
        assert float(path.damage[step + 1]) == pytest.approx(loss_of(weight, covariance, best), rel=5e-2)
    assert (path.damage.diff() >= 0).all()


def test_blocks_of_elimination_keep_the_damage_close_to_one_at_a_time():
    moments = Moments()
    moments.add(correlated(160, rows=20_000))
    weight = torch.randn(8, 160, generator=torch.Generator().manual_seed(1)).double()
    path = eliminate(weight, moments.covariance)
    assert sorted(path.order.tolist()) == list(range(160))
    for width in (120, 80, 40):
        kept = tuple(path.kept(width).tolist())
        assert float(path.damage[160 - width]) == pytest.approx(loss_of(weight, moments.covariance, kept), rel=0.1)


def test_a_covariance_that_rounding_left_indefinite_is_damped_until_it_has_a_factor():
    generator = torch.Generator().manual_seed(0)
    noise = 1e-6 * torch.randn(96, 96, generator=generator, dtype=torch.float64)
    indefinite = noise + noise.T
    indefinite[0, 0] = 1.0  # one neuron beside which the digits of the others are lost
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(damped(indefinite, DAMPING))
    factor = cholesky(indefinite, DAMPING)
    assert bool((factor.diagonal() > 0).all())
    torch.testing.assert_close(cholesky(indefinite, DAMPING, upper=True), factor.mT)
    path = eliminate(torch.randn(5, 96, generator=generator).double(), indefinite)
    assert bool(path.damage.isfinite().all())
    with pytest.raises(ModelError, match="not finite"):
        cholesky(indefinite * float("nan"), DAMPING)


def test_a_covariance_with_a_factor_is_damped_once():
    moments = Moments()
    moments.add(correlated(9))
    factor = cholesky(moments.covariance, DAMPING)
    torch.testing.assert_close(factor @ factor.mT, damped(moments.covariance, DAMPING))


def test_refit_is_the_least_squares_solution():
    rows = correlated(12)
    moments = Moments()
    moments.add(rows)
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(2)).double()
    kept = torch.tensor([0, 2, 3, 7, 8, 11])
    fitted, shift = predict_removed(weight, moments.covariance, moments.mean, kept)
    assert not fitted[:, [1, 4, 5, 6, 9, 10]].any()
    design = torch.cat([rows[:, kept], torch.ones(len(rows), 1).double()], 1)
    solved = torch.linalg.lstsq(design, rows @ weight.T).solution.T
    assert torch.allclose(fitted[:, kept], solved[:, :-1], rtol=1e-2, atol=1e-2)
    ours = (rows @ fitted.T + shift - rows @ weight.T).square().mean()
    best = (design @ solved.T - rows @ weight.T).square().mean()
    assert float(ours) == pytest.approx(float(best), rel=1e-2)


def test_anchored_refit_moves_nothing_when_there_is_no_error_and_removes_what_it_can():
    rows = correlated(6)
    weight, bias = torch.randn(3, 6).double(), torch.randn(3).double()
    moments = Moments()
    moments.add(rows, torch.zeros(len(rows), 3).double())
    same = anchored_refit(weight, bias, moments, 1e-3)
    assert torch.equal(same[0], weight)
    assert torch.equal(same[1], bias)
    target = rows @ (weight + 0.3).T + bias - 2.0
    moments = Moments()
    moments.add(rows, target - (rows @ weight.T + bias))
    moved = anchored_refit(weight, bias, moments, 1e-3)
    left = (target - (rows @ moved[0].T + moved[1])).square().mean()
    assert left <= 1e-3 * (target - (rows @ weight.T + bias)).square().mean()


def test_interpolated_damage_lies_between_its_neighbours(tiny):
    groups = [g for g in tiny.groups if g.unit == "mlp_hidden"]
    choices = Choices(groups, {}, {})
    key = (groups[0].module, groups[0].unit)
    measured = [Candidate(key, 48, 1.0), Candidate(key, 96, 0.01), Candidate(key, 192, 0.0)]
    finer = interpolate(measured, groups[:1], choices, (0.1, 0.375, 0.5, 0.9, 1.0))
    found = {c.kept: c.damage for c in finer}
    assert found[48] == 1.0
    assert found[96] == 0.01
    assert found[192] == 0.0
    assert found[72] == pytest.approx(0.1, rel=1e-6)
    assert 0 < found[172] < 0.01
    assert min(found) == 48
    assert choices.groups == groups
